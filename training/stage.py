"""Train: teacher + config → a run folder with the generator, its fake score and its training record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfd_deploy.errors import ConfigError
from sfd_deploy.manifest import MANIFEST, Sealed, verify
from sfd_deploy.measure.judges import require_sight
from sfd_deploy.models.card import model_card
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator, image_shape, load_teacher, save_generator, save_teacher
from sfd_deploy.progress import log_to
from sfd_deploy.runs import Run, require_room, sealed_folder
from sfd_deploy.runtime.pytorch import torch_device
from sfd_deploy.training.config import LoopConfig, TrainConfig
from sfd_deploy.training.course import Course
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.inputs import FAKE_SCORE, Inputs, Origin, load_start, open_inputs
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.memory import saying_no_room
from sfd_deploy.training.monitor import Watch
from sfd_deploy.training.precision import settled
from sfd_deploy.training.started import note_start
from sfd_deploy.training.tensorboard import Scalars

CHECKPOINT = "checkpoint.safetensors"


def train(config: TrainConfig, folder: Path, device: str = "auto") -> Run:
    """Distil and forget; a killed call resumes from ``folder/work`` to the same weights.

    A finished run of the same config and teacher is returned as it is. Under ``accelerate launch`` every
    process calls this; the first one writes.

    Raises:
        LabelError: the forget map does not fit the teacher's labels, or what an earlier run forgot.
        ConfigError, RunError: ``folder`` holds a run of another config, or an input is not what was asked for.
        DivergedError: gradients stayed non-finite.
        MemoryLimitError: the batch does not fit.
        BackendError: cuda was asked for and there is none, or compile on a CPU.
    """
    config = settled(config, torch_device(device))
    inputs = open_inputs(config)
    run = Run(folder)
    return carry_out(
        run, config, inputs, device,
        prepare=lambda workers: _course(config, inputs, run, workers),
        seal=lambda outcome: _seal(run, config, inputs, outcome),
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a training made."""

    course: Course
    generator: OneStepGenerator
    fake_score: Denoiser


def carry_out(
    run: Run, config: LoopConfig, inputs: Origin, device: str, *, prepare: Callable[[Workers], Course],
    seal: Callable[[Outcome], None],
) -> Run:  # fmt: skip
    """Train to the end in every process and seal in the first; a finished run is returned as it is.

    Raises:
        ConfigError, RunError: the folder holds a run of another config or of other inputs.
        ProcessError: another process ended.
    """
    if (run.folder / "generator" / MANIFEST).is_file():
        return _finished(run, config, inputs)
    require_room(run.folder / "generator", "generator")
    require_room(run.folder / FAKE_SCORE, FAKE_SCORE)
    workers = Workers.here(torch_device(device))
    log = log_to(run.work / "train.log") if workers.is_main else nullcontext()
    with workers.needing_each_other(), log:
        with saying_no_room(workers.device.type):
            course = prepare(workers)
        if workers.is_main:  # not before: a checkpoint of another config keeps its own
            note_start(run.work, config)
        generator = course.run()
        fake_score = course.loop.whole_fake_score()
        if workers.is_main:
            seal(Outcome(course, generator, fake_score))
        workers.wait()
    return run


def _course(config: TrainConfig, inputs: Inputs, run: Run, workers: Workers) -> Course:
    teacher = load_teacher(inputs.teacher)
    watch = Watch(config.monitor, inputs.labels, run.work / "previews", teacher)
    judges = [*watch.judges, *([] if inputs.classifier is None else [inputs.classifier])]
    require_sight(judges, image_shape(teacher.unet))
    classify = None if inputs.classifier is None else inputs.classifier.classifier.to(workers.device)
    loop = SfdLoop(config, inputs.labels, teacher, load_start(inputs, config, teacher), classify, workers)
    return Course(
        loop, run.work / CHECKPOINT, watch=watch,
        identity=inputs.digests | {"judges": [judge.digest for judge in watch.judges]},
        scalars=scalars_of(run, workers, config.monitor.tensorboard),
    )  # fmt: skip


def scalars_of(run: Run, workers: Workers, wanted: bool) -> Callable[[int], Scalars]:
    """What makes the run's TensorBoard writer for a first step; one process writes."""
    return lambda step: Scalars(run.work / "tensorboard", enabled=wanted and workers.is_main, step=step)


def _seal(run: Run, config: TrainConfig, inputs: Inputs, outcome: Outcome) -> None:
    """The fake score first: a run is finished when its generator is there."""
    with sealing_fake_score(run, config, inputs, outcome, {"labels": inputs.labels.plain().resolved()}) as target:
        save_teacher(outcome.fake_score, target)
    facts = {"labels": inputs.labels.resolved(), "watched_by": outcome.course.identity["judges"]}
    with sealing_generator(run, config, inputs, outcome, facts) as target:
        save_generator(outcome.generator, target)
        teacher = inputs.teacher
        card = model_card(
            "One-step generator by score forgetting distillation",
            f"Distilled from teacher `{teacher.name}` (digest `{teacher.digest}`) in {config.iterations} iterations. "
            "The teacher's licence applies.", "Forgotten:", inputs.labels, outcome.generator, teacher.name,
        )  # fmt: skip
        (target / "README.md").write_text(card, encoding="utf-8")


def sealing_fake_score(
    run: Run, config: LoopConfig, inputs: Origin, outcome: Outcome, facts: dict[str, Any]
) -> AbstractContextManager[Path]:
    """The folder that becomes the run's fake score, of the last step, when the block succeeds."""
    shape = list(image_shape(outcome.fake_score.unet))
    return sealed_folder(
        run.folder / FAKE_SCORE, FAKE_SCORE, parents=inputs.parents, config=config.resolved(), seed=config.seed,
        facts=facts | {"image_shape": shape, "step": outcome.course.step},
    )  # fmt: skip


@contextmanager
def sealing_generator(
    run: Run, config: LoopConfig, inputs: Origin, outcome: Outcome, facts: dict[str, Any]
) -> Iterator[Path]:
    """The folder that becomes the run's generator, training record included, when the block succeeds."""
    course, generator = outcome.course, outcome.generator
    facts = facts | {
        "sigma_init": generator.sigma_init,
        "image_shape": list(generator.image_shape),
        "teacher": _teacher_reference(config.teacher, inputs.teacher),
        "fake_score": verify(run.folder / FAKE_SCORE, FAKE_SCORE).digest,
        "iterations": config.iterations,
        "exported": course.exported,
        "skipped_steps": course.loop.skipped,
        "processes": course.loop.workers.count,
        "device": course.loop.workers.device.type,
        "threads": torch.get_num_threads(),
    }
    with sealed_folder(
        run.folder / "generator", "generator", parents=inputs.parents, config=config.resolved(), seed=config.seed,
        facts=facts,
    ) as target:  # fmt: skip
        yield target
        rows = "".join(json.dumps({key: _number(value) for key, value in row.items()}) + "\n" for row in course.record)
        (target / "training.jsonl").write_text(rows, encoding="utf-8")


def _number(value: float) -> float | None:
    """JSON has no NaN, which a skipped step may leave."""
    return value if math.isfinite(value) else None


def _teacher_reference(asked: str, teacher: Sealed) -> str:
    """Where the audit finds the teacher again: a folder from anywhere, a hub's model at its very commit."""
    return str(Path(asked).resolve()) if Path(asked).is_dir() else str(teacher.facts.get("reference", asked))


def _finished(run: Run, config: LoopConfig, inputs: Origin) -> Run:
    sealed = verify(run.folder / "generator", "generator")
    # Read anew, so that a key which this version adds does not make an older run another config.
    if type(config).from_mapping(sealed.manifest.config, str(sealed.folder)).bound() != config.bound():
        raise ConfigError(f"{run.folder}: holds a finished run of another config", "choose another --output folder")
    inputs.require_made(sealed)
    return run
