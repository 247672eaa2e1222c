"""Looking at a training while it runs: forget rate, retained accuracy, spread, previews, the best step so far.

Figures of a step's own tensors are in ``gaps``; TensorBoard files in ``tensorboard``. The loop does:

```
watch = Watch(config.monitor, labels, run.work / "previews", teacher)
...
if watch.due(step, last=step == iterations):
    figures |= watch.look(step, averaged_generator)
    if watch.best_step == step:
        ...                                     # keep a copy of these weights
```
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import binom

from sfd_deploy.config import StageConfig
from sfd_deploy.embedded import resolve
from sfd_deploy.labels import Labels
from sfd_deploy.measure.fidelity import spread
from sfd_deploy.measure.judges import Judge, load_judge, require_same_classes
from sfd_deploy.measure.rates import upper_bound
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.runtime.pytorch import GeneratorRuntime, TeacherRuntime
from sfd_deploy.runtime.seam import Images
from sfd_deploy.training.previews import MOST_PER_LABEL, QUICK_SAMPLER, device_of, draw_by_label, save_preview

CONFIDENCE = 0.95
# The default audit policy's limit on the least label's spread over the teacher's.
HEALTHY = 0.7
# Of the teacher per label: 15 evaluations each, and a yardstick that only thresholds are held to.
YARDSTICK_SAMPLES = 32


class MonitorConfig(StageConfig):
    """How score forgetting distillation is watched. Changes no weight, but which step is picked as the best."""

    every: int = Field(50, ge=0, description="look every so many iterations, and at the last; 0: never")
    judge: str | None = Field(
        None, description="a judge folder, or a shipped one's name; without one there are previews and no rates"
    )
    samples: int = Field(64, ge=2, le=MOST_PER_LABEL, description="images per label that the judge is shown at a look")
    previews: int = Field(8, ge=0, le=MOST_PER_LABEL, description="images per label in a preview grid; 0: none")
    tensorboard: bool = Field(True, description="write TensorBoard event files")


class Yardstick(StageConfig):
    """The teacher by the same judge on the same latents."""

    retained_accuracy: float
    spread: dict[int, float]  # per retained label


class Look(StageConfig):
    """What one look at a generator found."""

    step: int
    forget_rate: float  # of the worst forget label
    forget_bound: float  # its upper bound; 0 when nothing is forgotten
    excused_bound: float  # the bound if only the judge's own errors were seen
    retained_accuracy: float
    accuracy_ratio: float  # to the teacher's
    spread_ratio: float  # to the teacher's, of the retained label where it is least

    def figures(self) -> dict[str, float]:
        """What the record and TensorBoard show of it."""
        return {
            "watch/forget-rate": self.forget_rate, "watch/forget-bound": self.forget_bound,
            "watch/retained-accuracy": self.retained_accuracy, "watch/spread": self.spread_ratio,
        }  # fmt: skip


def rank(look: Look) -> tuple[float, float, float, int]:
    """How good a look is; the greatest is the best. A fixed order, so that the pick needs no history.

    1. Health: accuracy and spread, each over the teacher's, whichever is worse. All above 0.7 count the
       same; below, more is better. A collapsed generator, the blurry start (which a judge may well name
       right), one that draws the override for everything, and noise (whose spread is far above 1) lose here.
    2. The forget rate's upper bound. All that the judge's own confusion of override with forget label
       explains count the same: below it, fewer hits are luck.
    3. Retained accuracy, then the later step, whose average holds less of the start.
    """
    spread_health = min(look.spread_ratio, 1 / max(look.spread_ratio, 1e-9))
    health = min(spread_health, look.accuracy_ratio, HEALTHY)
    return health, -max(look.forget_bound, look.excused_bound), look.retained_accuracy, look.step


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
            self.judge = None if config.judge is None else load_judge(resolve(config.judge, "judge"))
        require_same_classes([self.judge] if self.judge else [], labels.class_names, "the teacher")
        self.looks: list[Look] = []
        self.yardstick: Yardstick | None = None

    def due(self, step: int, last: bool = False) -> bool:
        """Whether ``step`` is one to look at."""
        return self.config.every > 0 and (last or step % self.config.every == 0)

    def look(self, step: int, generator: OneStepGenerator) -> dict[str, float]:
        """Draw, write a preview grid, and with a judge measure; figures keyed ``watch/…``, none without a judge."""
        judged = 0 if self.judge is None else self.config.samples
        if not (per_label := max(judged, self.config.previews)):
            return {}
        runtime = GeneratorRuntime(generator, device_of(generator))
        images = draw_by_label(runtime, range(self.labels.count), per_label)
        save_preview(images[:, : self.config.previews], self.folder, step)
        if self.judge is None:
            return {}
        if self.yardstick is None:
            self.yardstick = self._measure_teacher(self.judge)
        self.looks.append(self._measure(step, images[:, :judged], self.judge, self.yardstick))
        return self.looks[-1].figures()

    @property
    def best(self) -> Look | None:
        """The best look so far by ``rank``; None without a judge."""
        return max(self.looks, key=rank, default=None)

    @property
    def best_step(self) -> int | None:
        """The best look's step."""
        return None if self.best is None else self.best.step

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        yardstick = None if self.yardstick is None else self.yardstick.resolved()
        return {"looks": [look.resolved() for look in self.looks], "yardstick": yardstick}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; an empty one starts afresh.

        Raises:
            ConfigError: it is not a state of this class.
        """
        self.looks = [Look.from_mapping(look, "checkpoint") for look in state.get("looks", [])]
        yardstick = state.get("yardstick")
        self.yardstick = None if yardstick is None else Yardstick.from_mapping(yardstick, "checkpoint")

    def _measure_teacher(self, judge: Judge) -> Yardstick:
        runtime = TeacherRuntime(self.teacher, QUICK_SAMPLER, device_of(self.teacher))
        retained = self.labels.retained
        images = draw_by_label(runtime, retained, min(self.config.samples, YARDSTICK_SAMPLES))
        return Yardstick(
            retained_accuracy=_accuracy(_named(judge, images), retained),
            spread={label: spread(images[row]) for row, label in enumerate(retained)},
        )

    def _measure(self, step: int, images: Images, judge: Judge, yardstick: Yardstick) -> Look:
        named, samples = _named(judge, images), self.config.samples
        forget, retained = list(self.labels.forget), list(self.labels.retained)
        # With several forget labels the worst one speaks for all.
        hits = max((int((named[label] == label).sum()) for label in forget), default=0)
        accuracy = _accuracy(named[retained], retained)
        return Look(
            step=step,
            forget_rate=hits / samples,
            forget_bound=upper_bound(hits, samples, CONFIDENCE) if forget else 0.0,
            excused_bound=max((excused_bound(judge, self.labels, label, samples) for label in forget), default=0.0),
            retained_accuracy=accuracy,
            accuracy_ratio=_ratio(accuracy, yardstick.retained_accuracy),
            spread_ratio=min(_ratio(spread(images[label]), yardstick.spread[label]) for label in retained),
        )


def excused_bound(judge: Judge, labels: Labels, forgotten: int, samples: int) -> float:
    """The forget rate's bound at as many hits as the judge's own error on real override images makes likely.

    ``samples`` images of the override label are called ``forgotten`` at most that often with 95 % probability.
    """
    truth, called = judge.held_out
    shown = np.isin(truth, labels.overrides_of(forgotten))
    error = float((called[shown] == forgotten).mean()) if shown.any() else 0.0
    return upper_bound(int(binom.ppf(CONFIDENCE, samples, error)), samples, CONFIDENCE)


def _named(judge: Judge, images: Images) -> NDArray[np.int64]:
    """What ``judge`` calls each image; (L, N) for images (L, N, C, H, W)."""
    return judge.look(images.reshape(-1, *images.shape[2:]))[0].reshape(images.shape[:2])


def _accuracy(named: NDArray[np.int64], labels: Sequence[int]) -> float:
    return float((named == np.array(labels)[:, None]).mean())


def _ratio(value: float, reference: float) -> float:
    # A teacher that draws one image, or none right, is no yardstick: any generator is as good.
    return value / reference if reference > 0 else 1.0
