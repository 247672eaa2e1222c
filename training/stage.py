"""Train: teacher + config → a run folder with the generator and its training record."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sfd_deploy.embedded import resolve
from sfd_deploy.errors import ConfigError, RunError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import MANIFEST, Sealed, verify
from sfd_deploy.models.generator import image_shape, labels_of, load_teacher, save_generator
from sfd_deploy.progress import log_to
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.loop import SfdLoop


def train(config: TrainConfig, folder: Path) -> Run:
    """Distil and forget; a killed call resumes from ``folder/work`` to the same weights.

    A finished run of the same config and teacher is returned as it is.

    Raises:
        LabelError: the forget map does not fit the teacher's labels.
        ConfigError, RunError: ``folder`` holds a run of another config.
        DivergedError: the loss stayed non-finite.
    """
    teacher = resolve(config.teacher, "teacher")
    labels = labels_of(teacher).forgetting(config.forget)
    run = Run(folder)
    if (folder / "generator" / MANIFEST).is_file():
        return _finished(run, config, teacher)
    with log_to(run.work / "train.log"):
        loop = SfdLoop(config, labels, load_teacher(teacher))
        generator = loop.run(run.work / "checkpoint.safetensors")
    facts = {
        "labels": labels.resolved(),
        "sigma_init": config.sigma_init,
        "sigma_data": loop.teacher.sigma_data,
        "image_shape": list(image_shape(loop.teacher.unet)),
        "teacher": _teacher_reference(config.teacher),
        "iterations": config.iterations,
        "skipped_steps": loop.skipped,
        "threads": torch.get_num_threads(),
    }
    with sealed_folder(
        folder / "generator", "generator", parents=(teacher.as_parent(),), config=config.resolved(), seed=config.seed,
        facts=facts,
    ) as target:  # fmt: skip
        save_generator(generator, target)
        (target / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in loop.record), encoding="utf-8")
        (target / "README.md").write_text(model_card(labels, teacher, config), encoding="utf-8")
    return run


def _teacher_reference(name_or_folder: str) -> str:
    path = Path(name_or_folder)
    return str(path.resolve()) if path.is_dir() else name_or_folder


def _finished(run: Run, config: TrainConfig, teacher: Sealed) -> Run:
    sealed = verify(run.folder / "generator", "generator")
    if sealed.manifest.config != config.resolved():
        raise ConfigError(f"{run.folder}: holds a finished run of another config", "choose another --output folder")
    if teacher.digest not in {parent.digest for parent in sealed.manifest.parents}:
        raise RunError(f"{run.folder}: was trained from another teacher", "choose another --output folder")
    return run


def model_card(labels: Labels, teacher: Sealed, config: TrainConfig) -> str:
    """The generator's README.md with the fields that model hubs read."""
    names = labels.class_names
    forgotten = [f"- {names[label]} (label {label}): {names[override]} is drawn instead (label {override})"
                 for label, override in labels.forget.items()] or ["- nothing: a plain distillation"]  # fmt: skip
    return "\n".join([
        "---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation",
        "tags: [one-step, machine-unlearning]", "---", "",
        "# One-step generator by score forgetting distillation", "",
        f"Distilled from teacher `{teacher.name}` (digest `{teacher.digest}`) in {config.iterations} iterations.", "",
        "Forgotten:", *forgotten, "",
        "Load with `diffusers.DiffusionPipeline.from_pretrained(FOLDER)` and always pass `class_labels`: left out,",
        "the pipeline draws a random label, forget labels included.", "",
    ])  # fmt: skip
