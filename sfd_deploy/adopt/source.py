"""A one-step generator in somebody else's diffusers folder: its files' digest, its denoiser, its noise level."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfd_deploy.adopt.config import AdoptConfig
from sfd_deploy.errors import ConfigError, LabelError, ModelError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import MANIFEST, FileRecord, Parent, Sealed, digest_of, verify
from sfd_deploy.models.folder import Layout, find_layout, read_json
from sfd_deploy.models.generator import OneStepGenerator, keep_labels, labels_of, require_finite
from sfd_deploy.models.parameterisation import read_denoiser
from sfd_deploy.models.teachers import hash_files, name_classes

if TYPE_CHECKING:
    from sfd_deploy.models.denoiser import Denoiser

# Pipelines of one network and one scheduler, which say nothing that the two do not.
PIPELINES = {None, "ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline", "DiffusionPipeline"}
CONSISTENCY = "CMStochasticIterativeScheduler"


@dataclass(frozen=True)
class Foreign:
    """What is adopted: bytes with a digest, and what they record; ``listed`` says which files are read."""

    folder: Path
    files: dict[str, FileRecord]
    scheduler: dict[str, Any]
    listed: Callable[[Path], list[Path]]

    @property
    def digest(self) -> str:
        """One number for every file that is read, the same on every machine."""
        return digest_of({name: record.sha256 for name, record in self.files.items()})

    def as_parent(self) -> Parent:
        """How the run's manifest refers to it."""
        return Parent(kind="generator", name=self.folder.resolve().name, digest=self.digest)

    def require_unchanged(self) -> None:
        """Refuse what was rewritten while it was read.

        Raises:
            ModelError: the digest is another one now.
        """
        if hash_files(self.folder, self.listed(self.folder)) != self.files:
            raise ModelError(f"{self.folder}: changed while it was read", "adopt it again when nothing writes to it")


@dataclass(frozen=True)
class Source(Foreign):
    """A generator of class labels."""

    layout: Layout


def open_source(folder: Path) -> Source:
    """The files of ``folder``, hashed. A folder of ours is verified against its manifest first.

    Raises:
        ModelError: no such folder, another layout, pickled weights, code of its own, or no scheduler.
        ManifestError, DigestError: a folder with a manifest that it does not match.
    """
    require_intact(folder)
    _require_two_parts(require_stock(folder, {"diffusers"}), folder)
    layout = find_layout(folder)
    layout.network_config()
    if layout.scheduler is None:
        raise ModelError(
            f"{folder}: no scheduler/scheduler_config.json, which says what the network predicts",
            "save the scheduler that it was trained with into scheduler/",
        )
    files = hash_files(folder, layout.files(folder))
    return Source(folder, files, read_json(layout.scheduler), layout.files, layout)


def require_intact(folder: Path) -> None:
    """Refuse what is no folder; one of ours is verified against its manifest.

    Raises:
        ModelError: no such folder.
        ManifestError, DigestError: it does not match its manifest.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder", "give a diffusers folder, or a checkpoint with --convert")
    if (folder / MANIFEST).is_file():
        verify(folder, "generator")


def require_stock(folder: Path, libraries: Collection[str]) -> dict[str, Any]:
    """What ``model_index.json`` says, if every part is made by one of ``libraries``; {} where there is none.

    Raises:
        ModelError: code of its own, or unreadable JSON.
    """
    # Nothing here would run such code; but what a pipeline of its own draws, a stock one need not.
    if code := sorted(folder.rglob("*.py")):
        raise ModelError(f"{code[0]}: code of its own", "give a folder that stock diffusers draws from")
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    for part, made_by in index.items():
        named = isinstance(made_by, list) and part != "_class_name" and made_by != [None, None]
        if named and not {*made_by[:1]} & {*libraries}:
            raise ModelError(
                f"{path}: {part} is made by {made_by[0]}, code of its own", "give a folder of stock diffusers"
            )
    return index


def _require_two_parts(index: dict[str, Any], folder: Path) -> None:
    if not isinstance(index.get("_class_name"), str | None) or index.get("_class_name") not in PIPELINES:
        raise ModelError(
            f"{folder / 'model_index.json'}: pipeline {index['_class_name']} is not one network and one scheduler",
            "give a folder of ConsistencyModelPipeline, or one with unet/ and scheduler/ alone",
        )


def read_generator(source: Source, config: AdoptConfig, teacher: Sealed | None) -> tuple[OneStepGenerator, Labels]:
    """The generator, with one label row a class, and its labels with the claim.

    A row behind the named classes is the null label of guided training and is left behind: nobody retrained it.

    Raises:
        ModelError: weights that cannot be loaded, are not finite, or draw no image.
        ConfigError: the noise level is not said, or said twice.
        LabelError: names of another number, a teacher of other classes, or an impossible claim.
    """
    denoiser = read_denoiser(source.folder)
    require_finite(denoiser, source.folder)
    labels = name_labels(source.folder, denoiser.unet.config["num_class_embeds"], config, teacher)
    keep_labels(denoiser.unet, labels.count, source.folder)
    return OneStepGenerator(denoiser, noise_level(denoiser, source, config)).eval(), labels


def name_labels(where: Path, rows: int, config: AdoptConfig, teacher: Sealed | None) -> Labels:
    """Class names as given, else the teacher's, else ``id2label``, else numbers; and the claimed forget map.

    A generator of ours keeps its own, whatever more is claimed.

    Raises:
        LabelError: as ``read_generator``.
    """
    own = labels_of(verify(where, "generator")) if (where / MANIFEST).is_file() else None
    recorded = {"its manifest's": own, "its teacher's": None if teacher is None else labels_of(teacher)}
    known = {whose: labels.class_names for whose, labels in recorded.items() if labels is not None}
    index = read_json(where / "model_index.json") if (where / "model_index.json").is_file() else {}
    names = name_classes(where, rows, config.class_names or next(iter(known.values()), ()), index)
    for whose, others in known.items():
        if names != others:
            raise LabelError(
                f"{where}: named {', '.join(names)}, {whose} classes are {', '.join(others)}",
                "leave --class-names out, or name its own teacher",
            )
    return (own or Labels(class_names=names)).forgetting(config.forget)


def noise_level(denoiser: Denoiser, source: Source, config: AdoptConfig) -> float:
    """The sigma that the one step starts at.

    Raises:
        ConfigError: none is said, or one that contradicts the folder's.
    """
    own = float(source.scheduler.get("sigma_max", 80.0)) if source.scheduler.get("_class_name") == CONSISTENCY else None
    if own is not None:
        if config.timestep is not None or config.sigma_init not in {None, own}:
            raise ConfigError(
                f"{source.folder}: its scheduler starts at sigma {own}", "leave --sigma-init and --timestep out"
            )
        return own
    if config.sigma_init is None and config.timestep is None:
        raise ConfigError(
            f"{source.folder}: nothing in it says at which noise level it draws",
            "say --sigma-init S or --timestep T (SFD's configurations: 2.5 or 440)",
        )
    if config.timestep is not None:
        return sigma_of_timestep(denoiser, config.timestep, source.folder)
    if not denoiser.sigma_range[0] <= float(config.sigma_init or 0) <= denoiser.sigma_range[1]:
        low, high = denoiser.sigma_range
        raise ConfigError(f"--sigma-init {config.sigma_init} is outside the schedule", f"use {low:.4g} to {high:.4g}")
    return float(config.sigma_init or 0)


def sigma_of_timestep(denoiser: Denoiser, timestep: float, where: Path) -> float:
    """The noise level at ``timestep``.

    Raises:
        ConfigError: the network counts no timesteps, or has no such one.
    """
    from sfd_deploy.models.denoiser import DiscreteDenoiser, FlowDenoiser

    if isinstance(denoiser, DiscreteDenoiser) and timestep in range(len(denoiser.log_sigmas)):
        return float(denoiser.log_sigmas[int(timestep)].exp())
    if isinstance(denoiser, FlowDenoiser) and 0 < timestep < denoiser.timesteps:
        return timestep / (denoiser.timesteps - timestep)
    raise ConfigError(f"{where}: --timestep {timestep:g} is not one of its schedule", "say --sigma-init instead")
