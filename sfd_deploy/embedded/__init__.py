"""Models shipped inside the package: teachers and judges, sealed like any other.

``resolve`` is how every stage turns "a name or a folder" into a verified folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from importlib import resources
from itertools import chain
from pathlib import Path

from sfd_deploy.errors import RunError
from sfd_deploy.manifest import Kind, Sealed, verify

HERE = Path(str(resources.files("sfd_deploy.embedded")))


def embedded_names() -> list[str]:
    """Data sets whose models are shipped."""
    return sorted(path.name for path in HERE.iterdir() if (path / "teacher").is_dir())


def resolve(name_or_folder: str | Path, kind: Kind) -> Sealed:
    """A verified folder of ``kind``: a path, or the name of a shipped one: a data set's for its teacher
    (``fashion-mnist``), data set and judge for a judge (``fashion-mnist/judge-plain``).

    Raises:
        RunError: neither exists.
        ManifestError, DigestError: the folder is not what its manifest says.
    """
    if Path(name_or_folder).is_dir():
        return verify(Path(name_or_folder), kind)
    shipped = _shipped(kind)
    if str(name_or_folder) in shipped:
        return verify(shipped[str(name_or_folder)], kind)
    near = difflib.get_close_matches(str(name_or_folder), shipped, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else f"give a {kind} folder, or one of: {', '.join(shipped)}"
    raise RunError(f"{name_or_folder}: no such {kind}", hint)


def _shipped(kind: Kind) -> dict[str, Path]:
    if kind == "teacher":
        return {name: HERE / name / "teacher" for name in embedded_names()}
    return {
        f"{name}/{path.name}": path for name in embedded_names() for path in sorted((HERE / name).glob(f"{kind}-*"))
    }


def judges_for(class_names: tuple[str, ...]) -> list[Path]:
    """Folders of the shipped judges that know exactly these classes.

    Raises:
        RunError: there are none.
    """
    for name in embedded_names():
        if folders := [folder for folder, known in _judges_of(name).items() if known == class_names]:
            return folders
    raise RunError(
        "no shipped judge knows these classes", "train two with `sfd-deploy judge` and name them with --judge"
    )


def judges_knowing(classes: Collection[str]) -> list[Path]:
    """Folders of the shipped judges that know any of ``classes``, of the data set whose judges know them all.

    Raises:
        RunError: there is none.
    """
    for name in embedded_names():
        judges = _judges_of(name)
        if set(classes) <= set(chain.from_iterable(judges.values())):
            return [folder for folder, known in judges.items() if not set(classes).isdisjoint(known)]
    raise RunError(
        f"no shipped judges know {', '.join(sorted(classes))}",
        "make some with `sfd-deploy judge`, two for each, and name them with --judge",
    )


def _judges_of(name: str) -> dict[Path, tuple[str, ...]]:
    folders = sorted((HERE / name).glob("judge-*"))
    return {folder: tuple(verify(folder, "judge").facts["class_names"]) for folder in folders}
