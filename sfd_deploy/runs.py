"""Run folders: where each stage's sealed folder lies, and how one is written whole or not at all.

```
runs/NAME/generator/            plain diffusers folder
runs/NAME/artefacts/<name>/     compiled: model.onnx or model.plan
runs/NAME/reference/            teacher samples that audits compare with
runs/NAME/audit/                audit.json, report.html
runs/NAME/repository/           Triton model repository
runs/NAME/work/                 checkpoints and logs; not sealed, safe to delete once the run is done
```
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd_deploy.errors import ManifestError, RunError
from sfd_deploy.manifest import MANIFEST, Kind, Parent, Sealed, read_manifest, verify, write_manifest

RUNS = Path("runs")
WRITING = ".writing"


@contextmanager
def sealed_folder(
    target: Path, kind: Kind, *, parents: tuple[Parent, ...] = (), config: Mapping[str, Any] | None = None,
    seed: int | None = None, facts: Mapping[str, Any] | None = None,
) -> Iterator[Path]:  # fmt: skip
    """Yield a temporary folder that becomes ``target``, manifest included, when the block succeeds.

    ``facts`` may be a dict that the block still fills. An earlier ``target`` of the same kind is replaced at the end.

    Raises:
        RunError: no permission or space, or ``require_room`` refuses; nothing is left behind.
    """
    require_room(target, kind)
    try:
        with _beside(target) as temporary:
            yield temporary
            write_manifest(
                temporary, kind, target.name, parents=parents, config=config or {}, seed=seed, facts=facts or {}
            )  # fmt: skip
            require_room(target, kind)
            _publish(temporary, target)
    except OSError as error:
        if error.errno in {
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.ENOTDIR,
            errno.EEXIST,
        }:
            raise RunError(
                f"{target}: cannot be written ({os.strerror(error.errno)})", "free space or choose a writable folder"
            ) from None
        raise


def require_room(target: Path, kind: Kind) -> None:
    """Refuse a ``target`` that holds anything but an earlier sealed folder of ``kind``: it would be replaced.

    Long work asks before it begins.

    Raises:
        RunError: a file, a folder of somebody else's, or one of ours of another kind.
    """
    if target.is_dir():
        try:
            found = read_manifest(target).kind if any(target.iterdir()) else kind
        except ManifestError:
            raise RunError(f"{target}: exists and is not one of ours", "choose another folder or remove it") from None
        if found != kind:
            raise RunError(f"{target}: holds a {found}, and a {kind} would replace it", "choose another folder")
    elif target.exists():
        raise RunError(f"{target}: is a file, and a folder is to be written", "choose another name")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder next to ``target``, which it can be renamed to; what is left of it at the end is removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=WRITING, dir=target.parent))
        folder.chmod(0o755)
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror})", "choose a writable folder") from None
    with ExitStack() as held:
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(OSError):  # a file system without locks, where nothing is swept either
            held.enter_context(_locked(folder))
        yield folder


def _sweep(target: Path) -> None:
    """Remove what killed processes left beside ``target``: a living one holds the lock of its folder."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{WRITING}"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _publish(temporary: Path, target: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    if target.exists():
        retired = temporary.with_suffix(".old")
        os.rename(target, retired)
        os.rename(temporary, target)
        shutil.rmtree(retired)
    else:
        os.rename(temporary, target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: temporary name, fsync, rename. NaN is refused."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, ensure_ascii=False, allow_nan=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path

    @classmethod
    def named(cls, name_or_path: str | None) -> Run:
        """An existing run by path, by name under ``runs/``, or, with None, the latest.

        Raises:
            RunError: there is none.
        """
        if name_or_path is None:
            return cls.latest()
        for folder in (Path(name_or_path), RUNS / name_or_path):
            if (folder / "generator" / MANIFEST).is_file():
                return cls(folder)
        raise RunError(f"{name_or_path}: no such run", "give a run folder, or make one with `sfd-deploy train`")

    @classmethod
    def latest(cls) -> Run:
        """The run below ``runs/`` whose generator was sealed last."""
        manifests = list(RUNS.glob(f"*/generator/{MANIFEST}"))
        if not manifests:
            raise RunError(f"{RUNS}/: no finished run", "make one with `sfd-deploy train`")
        return cls(max(manifests, key=lambda path: path.stat().st_mtime_ns).parent.parent)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def work(self) -> Path:
        """Checkpoints and logs."""
        return self.folder / "work"

    def generator(self) -> Sealed:
        """The verified generator folder."""
        return verify(self.folder / "generator", "generator")

    def artefact(self, name: str) -> Sealed:
        """One verified artefact.

        Raises:
            RunError: it was not exported.
        """
        folder = self.folder / "artefacts" / name
        if not folder.is_dir():
            known = ", ".join(self.artefact_names()) or "none"
            raise RunError(f"{folder}: no such artefact", f"exported: {known}; see `sfd-deploy export --help`")
        return verify(folder, "artefact")

    def artefact_names(self) -> list[str]:
        """Names of what was exported, sorted."""
        return sorted(path.parent.name for path in (self.folder / "artefacts").glob(f"*/{MANIFEST}"))

    def artefacts(self) -> list[Sealed]:
        """All verified artefacts, sorted by name."""
        return [self.artefact(name) for name in self.artefact_names()]

    def audit(self) -> Sealed:
        """The verified latest audit.

        Raises:
            RunError: the run was not audited.
        """
        try:
            return verify(self.folder / "audit", "audit")
        except ManifestError as error:
            if (self.folder / "audit").exists():
                raise
            raise RunError(f"{self.folder}: no audit", "run `sfd-deploy audit` first") from error
