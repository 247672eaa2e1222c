"""Trains what a table needs below one folder: judges, teachers, generators. All of it resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger import metered, seconds_in
from sfd_deploy.embedded import embedded_names, judges_for, resolve
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import MANIFEST, Sealed, verify
from sfd_deploy.measure.judges import Judge, open_judge, require_same_classes
from sfd_deploy.models.generator import labels_of
from sfd_deploy.progress import log_to
from sfd_deploy.runs import Run
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.judge import JudgeConfig, make_judge
from sfd_deploy.training.precision import settled
from sfd_deploy.training.stage import train
from sfd_deploy.training.teacher import TeacherConfig, seal_teacher, train_teacher

JUDGES = ("plain", "residual")


@dataclass(frozen=True)
class Workshop:
    """Where the trained folders of one data set lie, and the configs they are trained from."""

    name: str
    folder: Path
    images: Path
    train_config: TrainConfig
    teacher_config: TeacherConfig
    judge_configs: tuple[JudgeConfig, ...]
    device: str = "cpu"  # of the trainings, and of what is drawn

    @classmethod
    def of_preset(cls, name: str, folder: Path, images: Path, device: str = "cpu") -> Workshop:
        """The presets called ``name``; ``images`` is read only where a teacher or a judge must be trained."""
        judges = tuple(JudgeConfig.load(f"{name}-{kind}", "judge") for kind in JUDGES)
        configs = TrainConfig.load(name, "train"), TeacherConfig.load(name, "teacher"), judges
        return cls(name, folder, images, *configs, device)

    @property
    def shipped(self) -> bool:
        """Whether teacher and judges come with the package: then every seed shares them."""
        return self.name in embedded_names()

    @property
    def settings(self) -> dict[str, Any]:
        """What results belong to, whatever their table is."""
        # Minutes of two devices in one table would compare nothing.
        device = {} if self.device == "cpu" else {"device": self.device}
        return {"train": self.train_config.resolved(), "judges": [judge.digest for judge in self.judges]} | device

    @cached_property
    def data(self) -> LabelledImages:
        """The training images."""
        return self.teacher_config.read(self.images, "train")

    @cached_property
    def labels(self) -> Labels:
        """Class names, and the preset's forget map."""
        names = self.teacher_config.class_names or self.data.class_names
        return Labels(class_names=names).forgetting(self.train_config.forget)

    @property
    def forget(self) -> dict[int, int]:
        """Forget label → the one override label."""
        return {label: self.labels.overrides_of(label)[0] for label in self.labels.forget}

    @cached_property
    def judges(self) -> list[Judge]:
        """The two judges: shipped, or trained once for all seeds."""
        if self.shipped:
            return [open_judge(folder) for folder in judges_for(self.labels.class_names)]
        return [open_judge(self._judge(config)) for config in self.judge_configs]

    def _judge(self, config: JudgeConfig) -> Path:
        config, kind = settled(config, self.device), config.classifier.architecture
        target = self.folder / "judges" / kind
        if not (target / MANIFEST).is_file():
            make_judge(config, self.images, target, self.device)
        return target

    def teacher(self, seed: int) -> Sealed:
        """The teacher that a seed's rows are distilled from."""
        if self.shipped:
            return resolve(self.name, "teacher")
        return self._teacher(f"seed-{seed}/teacher", seed, lambda: self.data)

    def retrained_teacher(self, seed: int) -> Sealed:
        """A teacher of the same config that never saw the forget label's images: override images stand in for them."""
        return self._teacher(f"seed-{seed}/retrained-teacher", seed, lambda: replaced(self.data, self.forget))

    def _teacher(self, name: str, seed: int, data: Callable[[], LabelledImages]) -> Sealed:
        target, config = self.folder / name, self.unwatched_teacher.model_copy(update={"seed": seed})
        if not (target / MANIFEST).is_file():
            work, images = target.with_name(f"{target.name}.work"), data()
            with metered(self._meter(name)), log_to(work / "train.log"):
                denoiser = train_teacher(config, images, work / "checkpoint.safetensors", self.device)
            seal_teacher(config, denoiser, images, target, data_name=self.images.name)
        return verify(target, "teacher")

    @property
    def unwatched_teacher(self) -> TeacherConfig:
        """The teacher's config on this device, without previews: looking on while training is time, a column."""
        values = self.teacher_config.resolved() | {"monitor": {"every": 0, "tensorboard": False}}
        return settled(TeacherConfig.from_mapping(values, f"preset {self.name}"), self.device)

    def run(self, name: str, seed: int) -> Run:
        """Where the run called ``name`` of ``seed`` is, or will be."""
        return Run(self.folder / f"seed-{seed}" / name)

    def generator(self, name: str, seed: int, teacher: Sealed, **changes: Any) -> Run:
        """A run of the preset with ``changes`` to its config, called ``name``, of ``seed``."""
        run, config = self.run(name, seed), self.config_of(seed, teacher, changes)
        if (run.folder / "generator" / MANIFEST).is_file():
            return train(config, run.folder, self.device)  # finished: it is verified and returned
        with metered(self._meter(f"seed-{seed}/{name}")):
            return train(config, run.folder, self.device)

    def config_of(self, seed: int, teacher: Sealed, changes: Mapping[str, Any]) -> TrainConfig:
        """The preset with its teacher, seed and ``changes`` put in."""
        reference = self.name if self.shipped and teacher.folder == self.teacher(seed).folder else str(teacher.folder)
        unwatched = {"monitor": {"every": 0, "tensorboard": False}}
        values = self.train_config.resolved() | unwatched | {"teacher": reference, "seed": seed} | dict(changes)
        return TrainConfig.from_mapping(values, f"preset {self.name}")

    def seconds(self, seed: int, *names: str) -> float:
        """Seconds spent training the named folders of a seed."""
        return sum(seconds_in(self._meter(f"seed-{seed}/{name}")) for name in names)

    def _meter(self, name: str) -> Path:
        return self.folder / f"{name}.seconds.json"

    def require_labels(self, teacher: Sealed) -> None:
        """Refuse judges whose class order is not the teacher's.

        Raises:
            LabelError: naming the judge.
        """
        require_same_classes(self.judges, labels_of(teacher).class_names, "the teacher")


def replaced(data: LabelledImages, forget: Mapping[int, int]) -> LabelledImages:
    """The data with every image of a forget label replaced by one of its override label, in turn."""
    images = data.images.copy()
    for label, override in forget.items():
        rows = np.flatnonzero(data.labels == label)
        images[rows] = data.images[np.resize(np.flatnonzero(data.labels == override), len(rows))]
    return replace(data, images=images)
