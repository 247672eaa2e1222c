"""What a command line asks to audit, and the teacher and judges it is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfd_deploy.embedded import judges_for
from sfd_deploy.errors import LabelError, ManifestError, RunError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import MANIFEST, Sealed, verify
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.models.generator import labels_of
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.models.text.folder import open_text_teacher
from sfd_deploy.prompts import draws_from_prompts
from sfd_deploy.runs import RUNS, Run

Forget = Mapping[str | int, str | int]


@dataclass(frozen=True)
class Selection:
    """A run and the rows named in it (none named: all), or else one folder that belongs to no run."""

    run: Run | None = None
    names: tuple[str, ...] = ()
    folder: Sealed | None = None

    def sealed(self) -> Sealed:
        """The run's verified generator, or the folder.

        Raises:
            ManifestError, DigestError: the generator is not whole.
        """
        if self.run is not None:
            return self.run.generator()
        if self.folder is None:
            raise ValueError("an empty selection")
        return self.folder


def select(arguments: Sequence[str]) -> Selection:
    """Read ``[RUN|ARTEFACT…]``: a run, names or folders of its artefacts, or one teacher or generator folder.

    Nothing given means everything that the latest run exported.

    Raises:
        RunError: something that is none of these, two runs, or a folder of no run beside other arguments.
        ManifestError, DigestError: a folder that is not whole.
    """
    runs: list[Run] = []
    names: list[str] = []
    loose: list[Sealed] = []
    for text in arguments:
        if (Path(text) / MANIFEST).is_file():
            sealed = verify(Path(text))
            home = _run_around(sealed)
            if home is None:
                loose.append(sealed)
            else:
                runs.append(home)
                names.append(sealed.name)
        elif (run := _run(text)) is not None:
            runs.append(run)
        elif Path(text).is_dir():
            raise ManifestError(f"{text}: no {MANIFEST}, and not a run", "give a folder that sfd-deploy wrote")
        else:
            names.append(text)
    if loose and len(arguments) > 1:
        raise RunError(f"{loose[0].folder}: belongs to no run, so it is audited alone", "name it as the only argument")
    if loose:
        return Selection(folder=loose[0])
    folders = {run.folder.resolve(): run for run in runs}
    if len(folders) > 1:
        raise RunError(f"{len(folders)} runs are named", "audit one run at a time")
    run = next(iter(folders.values()), None) or Run.latest()
    _require_known(run, names)
    return Selection(run=run, names=tuple(dict.fromkeys(names)))


def _run(text: str) -> Run | None:
    try:
        return Run.named(text)
    except RunError:
        return None


def _run_around(sealed: Sealed) -> Run | None:
    """The run that a generator or artefact folder lies in; None for what needs none."""
    folder, kind = sealed.folder.resolve(), sealed.manifest.kind
    if kind == "generator" and folder.name == "generator":
        return Run(folder.parent)
    if kind in {"teacher", "generator"}:
        return None
    if kind != "artefact":
        raise ManifestError(
            f"{sealed.folder}: is a {kind}, which draws nothing", "give a run, an artefact or a teacher"
        )
    run = Run(folder.parent.parent)
    if folder.parent.name != "artefacts" or not (run.folder / "generator" / MANIFEST).is_file():
        # Without its generator nothing says what the artefact should draw.
        raise RunError(f"{sealed.folder}: lies in no run", "audit it where it was exported: RUN/artefacts/NAME")
    return run


def _require_known(run: Run, names: Iterable[str]) -> None:
    known = ["generator", *run.artefact_names()]
    for name in names:
        if name not in known:
            raise RunError(
                f"{name}: no such run, folder, or artefact of {run.folder}", f"artefacts: {', '.join(known)}"
            )


def forget_labels(sealed: Sealed, forget: Forget) -> Labels:
    """The labels an audit asks about: what the model records as forgotten, or ``forget`` where it records nothing.

    Raises:
        LabelError: neither says which label is forgotten, or the two contradict.
    """
    recorded = labels_of(sealed)
    if not forget:
        if not recorded.forget:
            raise LabelError(
                f"{sealed.folder}: records no forgotten label",
                "say which with --forget LABEL=OVERRIDE, e.g. --forget 1=8",
            )
        return recorded
    asked = recorded.plain().forgetting(forget)
    if recorded.forget and recorded.forget != asked.forget:
        raise LabelError(
            f"{sealed.folder}: has forgotten {recorded.forget}, --forget asks about {asked.forget}",
            "leave --forget out",
        )
    return asked


def forget_labels_of_folder(sealed: Sealed, forget: Forget) -> Labels:
    """As ``forget_labels``; a folder of no run that records nothing borrows the latest run's map, if classes match.

    Raises:
        LabelError: nothing says which label is forgotten.
    """
    recorded = labels_of(sealed)
    if not forget and not recorded.forget and (latest := latest_run()) is not None:
        borrowed = labels_of(latest.generator())
        if borrowed.class_names == recorded.class_names and borrowed.forget:
            return borrowed
    return forget_labels(sealed, forget)


def home_of(sealed: Sealed) -> Path:
    """Where a folder of no run is audited into."""
    return RUNS / f"audit-of-{sealed.name}"


def latest_run() -> Run | None:
    """The latest run, if there is any."""
    try:
        return Run.latest()
    except RunError:
        return None


def find_teacher(sealed: Sealed, given: Path | None) -> Sealed:
    """The verified teacher of a generator (or the teacher itself): ``given``, or where the generator says it was.

    Raises:
        RunError: the generator does not say, or the teacher found is another than it was distilled from.
        ModelError, LabelError: a foreign teacher that cannot be used, or that knows other classes.
    """
    if sealed.manifest.kind == "teacher":
        return sealed if given is None else _open_yardstick(sealed, given)
    recorded = sealed.facts.get("teacher")
    if given is None and recorded is None:
        raise RunError(f"{sealed.folder}: does not say where its teacher is", "name its folder with --teacher")
    teacher = _open_yardstick(sealed, given if given is not None else str(recorded))
    require_parent(sealed, teacher)
    return teacher


def _open_yardstick(sealed: Sealed, reference: str | Path) -> Sealed:
    if draws_from_prompts(sealed.folder):
        return open_text_teacher(reference)
    return open_teacher(reference, class_names=labels_of(sealed).class_names)


def require_parent(generator: Sealed, teacher: Sealed) -> None:
    """Refuse to measure a generator against a teacher that it was not distilled from.

    An adopted generator with no teacher on record takes any of its classes and image size: a yardstick that the
    auditor answers for, named in the audit's parents.

    Raises:
        RunError: naming both digests, or both shapes.
    """
    digests = [parent.digest for parent in generator.manifest.parents if parent.kind == "teacher"]
    if not digests and "adopted" in generator.facts:
        _require_yardstick(generator, teacher)
        return
    if teacher.digest not in digests:
        wanted = ", ".join(digest[:12] for digest in digests) or "no teacher on record"
        raise RunError(
            f"{teacher.folder}: teacher {teacher.digest[:12]}, but {generator.folder} was distilled from {wanted}",
            "name the right teacher with --teacher",
        )


def _require_yardstick(generator: Sealed, teacher: Sealed) -> None:
    if draws_from_prompts(generator.folder):
        _require_latents(generator, teacher)
        return
    drawn = [(labels_of(sealed).class_names, sealed.facts.get("image_shape")) for sealed in (generator, teacher)]
    if drawn[0] != drawn[1]:
        raise RunError(
            f"{teacher.folder}: draws {len(drawn[1][0])} classes of shape {drawn[1][1]}, {generator.folder}"
            f" {len(drawn[0][0])} of {drawn[0][1]}, or of other names",
            "name a teacher of the same classes and image size with --teacher",
        )


def _require_latents(generator: Sealed, teacher: Sealed) -> None:
    shapes = [sealed.facts.get("image_shape") for sealed in (generator, teacher)]
    if shapes[0] != shapes[1]:
        raise RunError(
            f"{teacher.folder}: latents of shape {shapes[1]}, {generator.folder} draws from {shapes[0]}",
            "name a teacher of the same latents with --teacher",
        )


def find_judges(class_names: tuple[str, ...], given: Sequence[Path]) -> list[Judge]:
    """The judges in ``given``, or the embedded ones that know these classes.

    Raises:
        RunError: none are embedded for these classes, or a folder does not exist.
    """
    return open_judges(given or judges_for(class_names))


def open_judges(folders: Sequence[Path]) -> list[Judge]:
    """The verified judges in ``folders``.

    Raises:
        RunError: a folder does not exist.
        ManifestError, DigestError: one is not whole.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder}: no such judge folder", "train one with `sfd-deploy judge`")
    return [open_judge(folder) for folder in folders]
