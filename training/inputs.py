"""What a training is made from, each verified by its own digest: teacher, earlier run, classifier.

The teacher is always opened by itself, never taken from an earlier run: what such a run holds is a
generator and its fake score, and neither is the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sfd_deploy.embedded import resolve
from sfd_deploy.errors import ConfigError, RunError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import MANIFEST, Parent, Sealed, verify
from sfd_deploy.measure.judges import Judge, load_judge, require_same_classes
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import labels_of, load_generator, load_teacher
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.progress import LOGGER
from sfd_deploy.runs import Run
from sfd_deploy.training.config import LoopConfig, TrainConfig
from sfd_deploy.training.loop import Start

FAKE_SCORE: Final = "fake-score"
OTHER_FOLDER: Final = "choose another --output folder"


@dataclass(frozen=True)
class Earlier:
    """The run that a training starts from. An adopted run has no fake score."""

    generator: Sealed
    fake_score: Sealed | None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What every training starts from, verified."""

    teacher: Sealed
    earlier: Earlier | None = None

    @property
    def parents(self) -> tuple[Parent, ...]:
        """What the generator was made from, as its manifest lists it."""
        earlier = [] if self.earlier is None else [self.earlier.generator.as_parent()]
        return (self.teacher.as_parent(), *earlier)

    @property
    def digests(self) -> dict[str, list[str]]:
        """What a checkpoint belongs to."""
        psi = None if self.earlier is None else self.earlier.fake_score
        return {"inputs": [parent.digest for parent in self.parents] + ([] if psi is None else [psi.digest])}

    def require_made(self, generator: Sealed) -> None:
        """Refuse a finished generator that was made from something else.

        Raises:
            RunError: naming the kind of what differs.
        """
        made_from = {parent.digest for parent in generator.manifest.parents}
        for parent in self.parents:
            if parent.digest not in made_from:
                kind = "run" if parent.kind == "generator" else parent.kind
                raise RunError(f"{generator.folder.parent}: was trained from another {kind}", OTHER_FOLDER)


@dataclass(frozen=True, kw_only=True)
class Inputs(Origin):
    """Everything that a training on class labels reads, verified."""

    labels: Labels
    classifier: Judge | None = None
    watched_by: str | None = None  # digest of the judge that picks which step is exported

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The classifier of a mixture too."""
        judge = self.classifier
        judges = [] if judge is None else [Parent(kind="judge", name=judge.name, digest=judge.digest)]
        return (*super().parents, *judges)

    def require_made(self, generator: Sealed) -> None:
        """Also refuse one whose step another judge picked."""
        super().require_made(generator)
        if self.watched_by is not None and self.watched_by not in generator.facts.get("watched_by", [self.watched_by]):
            raise RunError(f"{generator.folder.parent}: its looks were rated by another judge", OTHER_FOLDER)


def open_inputs(config: TrainConfig) -> Inputs:
    """Open and verify what ``config`` names.

    Raises:
        ConfigError: another teacher than the pinned one; a mixture without classifier, or the other way round.
        RunError: the earlier run is of another teacher, or none; no such classifier or judge.
        LabelError: the forget map does not fit the labels, or what was forgotten earlier.
        ManifestError, DigestError: a folder is not what its manifest says.
    """
    teacher = open_teacher(config.teacher, class_names=config.class_names)
    require_pinned(config, teacher)
    earlier = None if config.init_from is None else open_earlier(config.init_from, teacher)
    known = labels_of(teacher).plain() if earlier is None else labels_of(earlier.generator)
    labels = known.forgetting(config.forget)
    config.require_classifier(labels)
    classifier = None if config.classifier is None else load_judge(resolve(config.classifier, "judge"))
    require_same_classes([] if classifier is None else [classifier], labels.class_names, "the teacher")
    judge = config.monitor.judge
    watched_by = None if judge is None else resolve(judge, "judge").digest
    return Inputs(teacher=teacher, earlier=earlier, labels=labels, classifier=classifier, watched_by=watched_by)


def require_pinned(config: LoopConfig, teacher: Sealed) -> None:
    """Refuse another teacher than the one that the config's digest pins.

    Raises:
        ConfigError: naming both digests.
    """
    if not teacher.digest.startswith(config.teacher_digest or ""):
        raise ConfigError(
            f"teacher {config.teacher}: digest {teacher.digest[:12]}, teacher_digest says {config.teacher_digest}",
            "give the teacher that was meant, or mend teacher_digest",
        )


def open_earlier(name: str, teacher: Sealed) -> Earlier:
    """The run ``name``, which must be of ``teacher`` and its classes.

    Raises:
        RunError: no such run, or it is of another teacher or other classes.
    """
    earlier = open_run_of(teacher, name)
    if labels_of(earlier.generator).class_names != labels_of(teacher).class_names:
        raise RunError(f"{name}: knows other classes than the teacher", "start from a run of the same teacher")
    return earlier


def open_run_of(teacher: Sealed, name: str) -> Earlier:
    """The run ``name``, which must be of ``teacher``, whatever its conditions.

    Raises:
        RunError: no such run, or it is of another teacher.
    """
    run = Run.named(name)
    generator = run.generator()
    taught_by = _digests(generator.manifest.parents, "teacher")
    # An adopted generator may not know its teacher; its classes are all that can be compared.
    if taught_by and teacher.digest not in taught_by:
        raise RunError(
            f"{run.folder}: its teacher was {taught_by[0][:12]}, this one is {teacher.digest[:12]}",
            "start from a run of the same teacher",
        )
    return Earlier(generator, _fake_score_of(run, generator))


def _fake_score_of(run: Run, generator: Sealed) -> Sealed | None:
    if not (run.folder / FAKE_SCORE / MANIFEST).is_file():
        if generator.facts.get("fake_score") is not None:
            raise RunError(f"{run.folder / FAKE_SCORE}: missing, and this run's generator had one", "restore it")
        LOGGER.info("%s has no fake score: it starts at the teacher", run.folder)
        return None
    found = verify(run.folder / FAKE_SCORE, FAKE_SCORE)
    if found.digest != generator.facts.get("fake_score"):
        raise RunError(f"{found.folder}: is not the fake score of this run's generator", "restore it, or remove it")
    return found


def _digests(parents: Sequence[Parent], kind: str) -> list[str]:
    return [parent.digest for parent in parents if parent.kind == kind]


def load_start(inputs: Inputs, config: TrainConfig, teacher: Denoiser) -> Start:
    """Where generator and fake score start: at the earlier run's networks, or at the teacher where there is none.

    Raises:
        RunError: another network or another noise level of the one step.
    """
    if inputs.earlier is None:
        return Start()
    sealed = inputs.earlier.generator
    generator = load_generator(sealed)
    require_same_level(sealed, generator.sigma_init, config, teacher)
    psi = None if inputs.earlier.fake_score is None else load_teacher(inputs.earlier.fake_score)
    for network, folder in ((generator.denoiser, sealed.folder), (psi, sealed.folder.with_name(FAKE_SCORE))):
        if network is not None:
            require_same_network(network, teacher, folder)
    return Start(generator.denoiser, psi)


def require_same_level(generator: Sealed, sigma_init: float, config: LoopConfig, teacher: Denoiser) -> None:
    """Refuse an earlier generator that draws at another noise level than the config's.

    Raises:
        RunError: naming both.
    """
    if sigma_init != teacher.nearest_sigma(config.sigma_init):
        raise RunError(
            f"{generator.folder}: draws at sigma_init {sigma_init:g}, the config says {config.sigma_init:g}",
            "keep the earlier run's: it is part of the model",
        )


def require_same_network(network: Denoiser, teacher: Denoiser, folder: Path) -> None:
    """Refuse an earlier run's network that is not the teacher's, by parameterisation and shapes.

    Raises:
        RunError: naming the folder.
    """
    if not _same_network(network, teacher):
        raise RunError(f"{folder}: its network is another than the teacher's", "start from a run of this teacher")


def _same_network(one: Denoiser, other: Denoiser) -> bool:
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]
