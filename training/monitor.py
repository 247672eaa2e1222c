"""Looking at a training of class labels while it runs: previews, and with a judge a rating of each look.

What is rated is in ``rating``; figures of a step's own tensors in ``gaps``; TensorBoard files in ``tensorboard``.
The loop does:

```
watch = Watch(config.monitor, labels, run.work / "previews", teacher)
...
if watch.due(step, last=step == iterations):
    figures |= watch.look(step, averaged_generator)
    if watch.rating.best.step == step:
        ...                                     # keep a copy of these weights
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.embedded import resolve
from sfd_deploy.labels import Labels
from sfd_deploy.measure.judges import load_judge, require_same_classes
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.runtime.pytorch import GeneratorRuntime, TeacherRuntime
from sfd_deploy.runtime.seam import Images
from sfd_deploy.training.previews import (
    LABELS_SHOWN,
    MOST_PER_LABEL,
    QUICK_SAMPLER,
    device_of,
    draw_by_label,
    save_preview,
)
from sfd_deploy.training.rating import Experts, Rating


class MonitorConfig(StageConfig):
    """How score forgetting distillation is watched. Changes no weight, but which step is picked as the best."""

    every: int = Field(50, ge=0, description="look every so many iterations, and at the last; 0: never")
    judge: str | None = Field(
        None, description="a judge folder, or a shipped one's name; without one there are previews and no rates"
    )
    samples: int = Field(64, ge=2, le=MOST_PER_LABEL, description="images per label that the judge is shown at a look")
    previews: int = Field(8, ge=0, le=MOST_PER_LABEL, description="images per label in a preview grid; 0: none")
    tensorboard: bool = Field(True, description="write TensorBoard event files")

    @model_validator(mode="after")
    def a_judge_must_look(self) -> Self:
        if self.judge is not None and self.every == 0:
            raise ValueError("`judge` is set, but `every: 0` never looks: leave one out")
        return self


class Watch:
    """Looks at the averaged generator now and then, on the ``select`` stream of latents.

    Args:
        config: what to look at; its ``judge`` folder is verified and opened.
        labels: classes and what is forgotten.
        folder: where preview grids go.
        teacher: the yardstick of spread and accuracy; asked at the first look with a judge.

    Raises:
        LabelError: the judge knows other classes.
        RunError: there is no such judge.
        ManifestError, DigestError: the judge's folder is incomplete or was changed.
    """

    def __init__(self, config: MonitorConfig, labels: Labels, folder: Path, teacher: Denoiser) -> None:
        self.config, self.labels, self.folder, self.teacher = config, labels, folder, teacher
        with torch.random.fork_rng():  # a judge is built with random weights before its own are loaded
            judge = None if config.judge is None else load_judge(resolve(config.judge, "judge"))
        self.judges = [] if judge is None else [judge]
        require_same_classes(self.judges, labels.class_names, "the teacher")
        self.rating = None if judge is None else Rating(Experts.of(judge, labels), config.samples, self._draw_teacher)

    def due(self, step: int, last: bool = False) -> bool:
        """Whether ``step`` is one to look at."""
        return self.config.every > 0 and (last or step % self.config.every == 0)

    def look(self, step: int, generator: OneStepGenerator) -> dict[str, float]:
        """Draw, write a preview grid, and with a judge measure; figures keyed ``watch/…``, none without a judge."""
        shown, previews = self.labels.foremost(LABELS_SHOWN), self.config.previews
        if self.rating is None and not previews:
            return {}
        runtime = GeneratorRuntime(generator, device_of(generator))
        if self.rating is None:
            save_preview(draw_by_label(runtime, shown, previews), self.folder, step)
            return {}
        images = draw_by_label(runtime, range(self.labels.count), max(self.config.samples, previews))
        figures = self.rating.look(step, lambda label, count: images[label, :count])
        save_preview(images[list(shown), :previews], self.folder, step)
        return figures

    def _draw_teacher(self, label: int, count: int) -> Images:
        runtime = TeacherRuntime(self.teacher, QUICK_SAMPLER, device_of(self.teacher))
        images: Images = draw_by_label(runtime, [label], count)[0]
        return images
