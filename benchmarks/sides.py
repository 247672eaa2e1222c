"""The two sides of the training benchmark, ours and the official schedule's, from one config and one teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.official import OfficialSchedule
from sfd_deploy.config import preset_names
from sfd_deploy.errors import RunError
from sfd_deploy.labels import Labels
from sfd_deploy.models.denoiser import Denoiser, EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator, labels_of, load_teacher
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.teacher import TeacherConfig

Build = Callable[[TrainConfig, Labels, Denoiser, str], "Side"]


@dataclass
class Side:
    """One way to train: an iteration, and the averaged generator it has come to."""

    iterate: Callable[[int], Any]
    generator: OneStepGenerator
    step: int = 0

    def go(self, iterations: int, device: str) -> None:
        """Train on, and wait until the device is done."""
        for _ in range(iterations):
            self.iterate(self.step)
            self.step += 1
        if device == "cuda":
            torch.cuda.synchronize()


def ours(config: TrainConfig, labels: Labels, teacher: Denoiser, device: str) -> Side:
    """Our loop as ``sfd-deploy train`` runs it."""
    loop = SfdLoop(config, labels, teacher, workers=Workers(torch.device(device)))
    return Side(loop.iterate, loop.ema.network)  # type: ignore[arg-type]


def official(config: TrainConfig, labels: Labels, teacher: Denoiser, device: str) -> Side:
    """The official schedule, literally: FP32, four terms, as many forget as retained rows."""
    schedule = OfficialSchedule(config, labels, teacher, device)
    return Side(schedule.iterate, schedule.ema.network)  # type: ignore[arg-type]


SIDES: dict[str, Build] = {"ours": ours, "official": official}


@dataclass(frozen=True)
class Task:
    """What both sides train: a config, its labels and a teacher, and whether that teacher was trained."""

    config: TrainConfig
    labels: Labels
    teacher: Denoiser
    trained: bool

    def side(self, name: str, device: str) -> Side:
        """One side at its first step; the teacher is copied, never shared."""
        import copy

        return SIDES[name](self.config, self.labels, copy.deepcopy(self.teacher), device)


def open_task(name: str, **changes: Any) -> Task:
    """A train config by preset or file, its teacher if that is here, else an untrained network of its preset's shape.

    Raises:
        RunError: there is neither.
    """
    config = TrainConfig.load(name, "train")
    config = TrainConfig.from_mapping(config.resolved() | changes, name)
    try:
        sealed = open_teacher(config.teacher, class_names=config.class_names)
    except RunError:
        if name not in preset_names("teacher"):
            raise
        return _untrained(config, name)
    return Task(config, labels_of(sealed).forgetting(config.forget), load_teacher(sealed), trained=True)


def _untrained(config: TrainConfig, name: str) -> Task:
    """Speed does not depend on the weights."""
    shape = TeacherConfig.load(name, "teacher")
    names = config.class_names or shape.class_names or tuple(str(label) for label in range(10))
    torch.manual_seed(0)
    denoiser = EdmDenoiser(shape.network.build(len(names)), shape.sigma_data).eval()
    return Task(config, Labels(class_names=names).forgetting(config.forget), denoiser, trained=False)
