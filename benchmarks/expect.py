"""How long a table will take, measured on this machine before it begins: a few steps of each kind of work."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.workshop import Workshop
from sfd_deploy.audit.samples import BATCH
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.stage import train
from sfd_deploy.training.teacher import seal_teacher, train_teacher

SHORT, LONG = 2, {"cpu": 6, "cuda": 46}  # on a GPU four steps are lost in what a training does once


@dataclass(frozen=True)
class Work:
    """Amounts: iterations of SFD, images a teacher is trained on, images drawn in one step and by a teacher."""

    iterations: float = 0
    teacher_images: float = 0
    draws: float = 0
    teacher_draws: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.iterations + other.iterations, self.teacher_images + other.teacher_images, self.draws + other.draws,
            self.teacher_draws + other.teacher_draws,
        )  # fmt: skip

    def seconds(self, cost: Work) -> float:
        """Time of this work at ``cost`` seconds for one of each."""
        return (
            self.iterations * cost.iterations + self.teacher_images * cost.teacher_images + self.draws * cost.draws
            + self.teacher_draws * cost.teacher_draws
        )  # fmt: skip


def costs(workshop: Workshop, teacher_training: bool) -> Work:
    """Seconds for one of each, measured with untrained networks of the preset's shape in a folder that goes away.

    Trainings are timed at two lengths, so that what they do once cancels.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        teacher = _untrained(workshop, place / "teacher")
        device = workshop.device

        def iterate(n: int) -> None:
            train(workshop.config_of(0, teacher, {"iterations": n}), place / f"run-{n}", device)

        def step_teacher(n: int) -> None:
            _train_teacher(workshop, place / f"steps-{n}", n)

        iterations = _slope(iterate, device)
        images = _slope(step_teacher, device) if teacher_training else 0.0
        generator = Run(place / f"run-{SHORT}").generator()
        return Work(
            iterations, images / workshop.teacher_config.batch_size, _draw_seconds(generator, device),
            _draw_seconds(teacher, device),
        )  # fmt: skip


def _slope(work: Callable[[int], object], device: str) -> float:
    work(1)  # a GPU's first steps load its kernels: they would count against the short training
    seconds = []
    for n in (SHORT, LONG[device]):
        began = time.perf_counter()
        work(n)
        seconds.append(time.perf_counter() - began)
    return max(0.0, (seconds[1] - seconds[0]) / (LONG[device] - SHORT))


def _untrained(workshop: Workshop, target: Path) -> Sealed:
    config, names = workshop.teacher_config, workshop.labels.class_names
    denoiser = EdmDenoiser(config.network.build(len(names)), config.sigma_data)
    return seal_teacher(config, denoiser, _noise(workshop), target, data_name="none")


def _train_teacher(workshop: Workshop, folder: Path, steps: int) -> None:
    config = workshop.unwatched_teacher.model_copy(update={"images": steps * workshop.teacher_config.batch_size})
    train_teacher(config, _noise(workshop), folder / "checkpoint.safetensors", workshop.device)


def _noise(workshop: Workshop) -> LabelledImages:
    network, names = workshop.teacher_config.network, workshop.labels.class_names
    images = np.zeros((len(names), network.channels, network.image_size, network.image_size), np.uint8)
    return LabelledImages(images, np.arange(len(names), dtype=np.int64), names)


def _draw_seconds(sealed: Sealed, device: str) -> float:
    runtime = open_runtime(sealed, device)
    latents, labels = Latents.of_stream("bench", 0, 0, BATCH), np.zeros(BATCH, np.int64)
    runtime.draw(latents, labels)
    began = time.perf_counter()
    runtime.draw(latents, labels)
    return (time.perf_counter() - began) / BATCH
