"""Adopt: a one-step generator trained elsewhere → a run, on which every later stage works unchanged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfd_deploy.adopt.checkpoint import read_checkpoint
from sfd_deploy.adopt.config import OFFICIAL_TIMESTEP, AdoptConfig, SourceConfig
from sfd_deploy.adopt.official import Architecture, class_vectors, read_architecture, to_stock
from sfd_deploy.adopt.source import name_labels, open_source, read_generator
from sfd_deploy.adopt.stock import draw_stock
from sfd_deploy.errors import ConfigError, LabelError, LimitError, RunError
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import MANIFEST, Parent, Sealed, verify
from sfd_deploy.models.card import model_card
from sfd_deploy.models.generator import OneStepGenerator, save_generator
from sfd_deploy.models.parameterisation import read_denoiser
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.runs import Run, sealed_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST_DIFFERENCE = 1e-4
FEWEST_IMAGES, MOST_IMAGES = 8, 32


def adopt_folder(config: AdoptConfig, folder: Path) -> Run:
    """The run of a diffusers folder: the same weights, sealed, and found to draw what stock diffusers draws from it.

    A finished run of the same bytes and claims is returned as it is.

    Raises:
        ModelError: a source that is no one-step generator, or cannot be read without running code.
        LabelError, ConfigError: names, claim, teacher or noise level that do not fit it.
        RunError: ``folder`` holds something else.
        LimitError: the run's images differ from the source's.
    """
    source = open_source(Path(config.source))
    teacher = _teacher(config)
    if (run := finished(folder, config, source.as_parent(), teacher)) is not None:
        return run
    generator, labels = read_generator(source, config, teacher)
    _refuse_remap(generator.denoiser.unet.class_embedding.weight, labels)
    latents, asked = _samples(generator, labels)
    expected = draw_stock(source.folder, latents, asked, generator.sigma_init)
    rows = source.layout.network_config()["num_class_embeds"]
    adopted = {"layout": "diffusers", "scheduler": source.scheduler.get("_class_name"),
               "null_label_dropped": rows > labels.count,
               "files": {name: record.sha256 for name, record in source.files.items()}}  # fmt: skip
    with sealing(folder, config, source.as_parent(), teacher, _facts(generator, labels, teacher, adopted)) as target:
        _write(generator, target, _card(source.as_parent(), generator, labels, teacher))
        source.require_unchanged()
        _require_same(generator, target, latents, asked, expected)
    return Run(folder)


def adopt_checkpoint(config: AdoptConfig, folder: Path) -> Run:
    """The run of an official SFD checkpoint, converted to a stock network that draws the same images.

    Raises:
        ModelError: a checkpoint that holds more than tensors, or another network's.
        As ``adopt_folder``.
    """
    file = Path(config.source)
    checkpoint = read_checkpoint(file)
    parent = Parent(kind="generator", name=file.name, digest=checkpoint.sha256)
    teacher = _teacher(config)
    if (run := finished(folder, config, parent, teacher)) is not None:
        return run
    architecture = read_architecture(checkpoint.tensors, config.image_size)
    labels = name_labels(file, architecture.classes, config, teacher)
    generator, timestep = _converted(checkpoint.tensors, architecture, config)
    # Converted label rows are one-hot, whatever the class embedding was: export cannot see it there.
    _refuse_remap(class_vectors(checkpoint.tensors), labels)
    latents, asked = _samples(generator, labels)
    adopted = {"layout": "official DDPM", "entry": checkpoint.entry, "step": checkpoint.step, "timestep": timestep,
               "null_label_dropped": True, "sha256": checkpoint.sha256}  # fmt: skip
    with sealing(folder, config, parent, teacher, _facts(generator, labels, teacher, adopted)) as target:
        _write(generator, target, _card(parent, generator, labels, teacher))
        _require_same(generator, target, latents, asked, draw_stock(target, latents, asked, generator.sigma_init))
    return Run(folder)


def _converted(
    tensors: Mapping[str, Tensor], architecture: Architecture, config: AdoptConfig
) -> tuple[OneStepGenerator, int]:
    """The generator, and the timestep at which it was asked: the only one that its network still knows."""
    from diffusers import DDPMScheduler

    from sfd_deploy.models.denoiser import DiscreteDenoiser

    schedule = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                             prediction_type="epsilon", clip_sample=False)  # fmt: skip
    denoiser = DiscreteDenoiser(architecture.build(), schedule)
    timestep = config.timestep
    if timestep is None:
        timestep = OFFICIAL_TIMESTEP if config.sigma_init is None else denoiser.nearest_timestep(config.sigma_init)
    if timestep not in range(1000):
        raise ConfigError(f"--timestep {timestep:g} is not one of its schedule", "use 0 to 999 (official: 440)")
    denoiser.unet = to_stock(tensors, architecture, float(timestep))
    sigma = float(denoiser.log_sigmas[int(timestep)].exp())
    return OneStepGenerator(denoiser, sigma).eval(), int(timestep)


def _refuse_remap(table: Tensor, labels: Labels) -> None:
    for label in labels.forget:
        for override in labels.overrides_of(label):
            if torch.equal(table[label], table[override]):
                raise LabelError(
                    f"forget label {label} has the very embedding of its override {override}: a remap, not forgetting",
                    "adopt a generator that was trained to forget",
                )


def _teacher(config: AdoptConfig) -> Sealed | None:
    return None if config.teacher is None else open_teacher(config.teacher, class_names=config.class_names)


def finished(folder: Path, config: SourceConfig, source: Parent, teacher: Sealed | None) -> Run | None:
    """The run in ``folder`` if it is this very one; None if there is nothing yet.

    Raises:
        RunError: something else is there.
    """
    target = folder / "generator"
    if not target.exists():
        return None
    if not (target / MANIFEST).is_file():
        raise RunError(f"{target}: exists and is not one of ours", "choose another --output folder")
    sealed = verify(target, "generator")
    moved = {"source": config.source, "teacher": config.teacher}  # a place is not what was adopted
    if sealed.manifest.config | moved != config.resolved() or sealed.manifest.parents != _parents(source, teacher):
        raise RunError(f"{folder}: holds another run's generator", "choose another --output folder")
    return Run(folder)


def _parents(source: Parent, teacher: Sealed | None) -> tuple[Parent, ...]:
    return (source, *([teacher.as_parent()] if teacher is not None else []))


def sealing(
    folder: Path, config: SourceConfig, source: Parent, teacher: Sealed | None, facts: dict[str, Any]
) -> AbstractContextManager[Path]:
    """The folder that becomes the run's generator when the block succeeds."""
    return sealed_folder(
        folder / "generator", "generator", parents=_parents(source, teacher), config=config.resolved(), facts=facts
    )


def _facts(
    generator: OneStepGenerator, labels: Labels, teacher: Sealed | None, adopted: dict[str, Any]
) -> dict[str, Any]:
    shape = list(generator.image_shape)
    facts: dict[str, Any] = {
        "labels": labels.resolved(), "sigma_init": generator.sigma_init, "image_shape": shape, "adopted": adopted,
    }  # fmt: skip
    return facts | teacher_facts(teacher, shape)


def teacher_facts(teacher: Sealed | None, shape: list[int]) -> dict[str, Any]:
    """Where audits find the teacher of a generator of images, or latents, of ``shape``.

    Raises:
        ConfigError: it draws others.
    """
    if teacher is None:
        return {}
    if list(teacher.facts.get("image_shape", shape)) != shape:
        raise ConfigError(
            f"{teacher.folder}: draws images of shape {teacher.facts['image_shape']}, the generator of {shape}",
            "name the teacher that it was distilled from",
        )
    return {"teacher": str(teacher.folder.resolve())}


def _samples(generator: OneStepGenerator, labels: Labels) -> tuple[Tensor, Tensor]:
    count = min(max(FEWEST_IMAGES, labels.count), MOST_IMAGES)
    latents = Latents.of_stream("calibrate", 0, 0, count).array(generator.image_shape)
    return torch.from_numpy(latents), torch.arange(count) % labels.count


def _write(generator: OneStepGenerator, target: Path, card: str) -> None:
    save_generator(generator, target)
    (target / "README.md").write_text(card, encoding="utf-8")


@torch.inference_mode()
def _require_same(generator: OneStepGenerator, target: Path, latents: Tensor, labels: Tensor, expected: Tensor) -> None:
    """Reload what was written: every tensor the very one, every image the source's.

    Raises:
        LimitError: a tensor or an image that differs.
    """
    written = read_denoiser(target)
    stored = written.unet.state_dict()
    for name, value in generator.denoiser.unet.state_dict().items():
        if name not in stored or not torch.equal(stored[name], value):
            raise LimitError(f"{target}: {name} was not written as it was read", "adopt it again")
    found = OneStepGenerator(written, generator.sigma_init).eval()(latents, labels)
    require_close(found, expected)


def require_close(found: Tensor, expected: Tensor) -> None:
    """Refuse images that are not the source's.

    Raises:
        LimitError: with the largest difference.
    """
    difference = (found - expected).abs().max().item()
    if not difference <= LARGEST_DIFFERENCE:  # NaN fails too
        raise LimitError(
            f"the adopted generator's images differ from the source's by {difference:.2g}, more than"
            f" {LARGEST_DIFFERENCE:g}",
            "its scheduler does something in its one step that is not taken over; report this with its config",
        )


def _card(source: Parent, generator: OneStepGenerator, labels: Labels, teacher: Sealed | None) -> str:
    distilled = f"`{teacher.name}` (digest `{teacher.digest}`)" if teacher is not None else "not on record"
    return model_card(
        "One-step generator, trained elsewhere",
        f"Adopted from `{source.name}` (digest `{source.digest}`). Teacher: {distilled}.",
        "Claimed to be forgotten, which an audit has to show:", labels, generator,
        None if teacher is None else teacher.name,
    )  # fmt: skip
