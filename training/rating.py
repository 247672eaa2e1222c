"""Rating a generator while it trains: forget rate, retained accuracy, spread, and which look was the best so far.

Of class labels and of prompt families alike: ``Experts`` say who judges the images of each. What is drawn, and
when, is the caller's: ``monitor.Watch`` and ``text_watch.TextWatch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import DivergedError
from sfd_deploy.labels import Labels
from sfd_deploy.measure.fidelity import spread, spread_error
from sfd_deploy.measure.judges import Judge
from sfd_deploy.measure.rates import upper_bound
from sfd_deploy.runtime.seam import Images
from sfd_deploy.training.steps import LOWER_SFD_RATES

CONFIDENCE = 0.95
# The default audit policy's limit on the least label's spread over the teacher's.
HEALTHY = 0.7
# Of the teacher per label: many evaluations each, and a yardstick that only thresholds are held to. With 32 a spread
# between two backgrounds was 20 % off, and a generator that an audit found healthy was not.
YARDSTICK_SAMPLES = 64

Spreads = dict[int, tuple[float, float]]  # per retained label: the spread, and its relative standard error
DrawLabel = Callable[[int, int], Images]  # a label and how many → its images (N, C, H, W)


class Yardstick(StageConfig):
    """The teacher by the same judges on the same latents."""

    retained_accuracy: float
    spread: Spreads


class Look(StageConfig):
    """What one look at a generator found."""

    step: int
    # Of the worst forget label: the one whose bound is farthest above what its own judge's errors explain.
    forget_rate: float
    forget_bound: float  # its upper bound; 0 when nothing is forgotten
    excused_bound: float  # the bound if only the judge's own errors were seen
    retained_accuracy: float
    accuracy_ratio: float  # to the teacher's
    spread_ratio: float  # to the teacher's, of the retained label whose bound is least
    spread_error: float  # its relative standard error

    def figures(self) -> dict[str, float]:
        """What the record and TensorBoard show of it."""
        return {
            "watch/forget-rate": self.forget_rate, "watch/forget-bound": self.forget_bound,
            "watch/retained-accuracy": self.retained_accuracy, "watch/spread": self.spread_ratio,
            "watch/spread-bound": self.spread_ratio * stretch(self.spread_error),
        }  # fmt: skip


def stretch(error: float) -> float:
    """What a spread of relative standard error ``error`` is multiplied by for its one-sided 95 % upper bound."""
    return math.exp(float(norm.ppf(CONFIDENCE)) * error)


def rank(look: Look) -> tuple[float, float, float, int]:
    """How good a look is; the greatest is the best. A fixed order, so that the pick needs no history.

    1. Health: accuracy and spread, each over the teacher's, whichever is worse. All above 0.7 count the
       same; below, more is better. A collapsed generator, the blurry start (which a judge may well name
       right), one that draws the override for everything, and noise (whose spread is far above 1) lose here.
       Of the spread its bound counts: the least of a dozen ratios of few images each reads low by chance alone,
       and a rule that takes it as read throws healthy looks away.
    2. How far the forget rate's upper bound is above what the judge's own confusion of override with forget label
       explains. All that are not above it count the same: there, fewer hits are luck.
    3. Retained accuracy, then the later step, whose average holds less of the start.
    """
    spread_health = min(look.spread_ratio, 1 / max(look.spread_ratio, 1e-9)) * stretch(look.spread_error)
    health = min(spread_health, look.accuracy_ratio, HEALTHY)
    return health, -max(look.forget_bound - look.excused_bound, 0.0), look.retained_accuracy, look.step


@dataclass(frozen=True)
class Experts:
    """Who judges what: by label a judge, and the class of its that the label's images should be called."""

    labels: Labels
    judges: tuple[Judge, ...]
    shows: tuple[str, ...]

    @classmethod
    def of(cls, judge: Judge, labels: Labels) -> Experts:
        """One judge, of the same classes as ``labels``."""
        return cls(labels, (judge,) * labels.count, labels.class_names)

    def named(self, label: int, images: Images) -> NDArray[np.bool_]:
        """Which of ``images`` (N, C, H, W) the label's judge calls what the label shows; (N,)."""
        called: NDArray[np.bool_] = self.judges[label].look(images)[0] == self._number(label, label)
        return called

    def error(self, forgotten: int) -> float:
        """The share of real images of the override's classes that the forget label's judge calls by it."""
        truth, called = self.judges[forgotten].held_out
        shown = np.isin(truth, [self._number(forgotten, override) for override in self.labels.overrides_of(forgotten)])
        return float((called[shown] == self._number(forgotten, forgotten)).mean()) if shown.any() else 0.0

    def _number(self, label: int, shown: int) -> int:
        """To the judge of ``label``, the number of the class that ``shown`` shows."""
        return self.judges[label].class_names.index(self.shows[shown])


def excused_bound(experts: Experts, forgotten: int, samples: int) -> float:
    """The forget rate's bound at as many hits as the judge's own error on real override images makes likely.

    ``samples`` images of the override label are called ``forgotten`` at most that often with 95 % probability.
    """
    return upper_bound(int(binom.ppf(CONFIDENCE, samples, experts.error(forgotten))), samples, CONFIDENCE)


class Rating:
    """Every look at one training, and the best of them by ``rank``.

    Args:
        experts: who judges.
        samples: images per label and look.
        draw_teacher: the teacher's images of a label, on the generator's latents; asked at the first look.
    """

    def __init__(self, experts: Experts, samples: int, draw_teacher: DrawLabel) -> None:
        self.experts, self.samples, self.draw_teacher = experts, samples, draw_teacher
        self.looks: list[Look] = []
        self.yardstick: Yardstick | None = None

    def look(self, step: int, draw: DrawLabel) -> dict[str, float]:
        """Rate the generator that ``draw`` asks; figures keyed ``watch/…``.

        Raises:
            DivergedError: a value of an image is not finite.
        """
        if self.yardstick is None:
            accuracy, by_label = self._see(self.draw_teacher, min(self.samples, YARDSTICK_SAMPLES))
            self.yardstick = Yardstick(retained_accuracy=accuracy, spread=by_label)

        def draw_finite(label: int, count: int) -> Images:
            images = draw(label, count)
            if not np.isfinite(images).all():
                raise DivergedError(
                    f"training diverged: the look at step {step} is of images that are no number", LOWER_SFD_RATES
                )
            return images

        self.looks.append(self._measure(step, draw_finite, self.yardstick))
        return self.looks[-1].figures()

    @property
    def best(self) -> Look | None:
        """The best look so far by ``rank``; None before the first."""
        return max(self.looks, key=rank, default=None)

    @property
    def doubt(self) -> str:
        """What speaks against the best look, in words; empty where its forget rate may be the judge's own error."""
        best = self.best
        if best is None or best.forget_bound <= best.excused_bound:
            return ""
        return (f"the exported look, of step {best.step}, still draws what was to be forgotten in"
                f" {best.forget_rate:.1%} of images (at most {best.forget_bound:.1%})")  # fmt: skip

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

    def _see(self, draw: DrawLabel, count: int) -> tuple[float, Spreads]:
        """Retained accuracy, and the spread of each retained label: one at a time, for images may be large."""
        right: list[NDArray[np.bool_]] = []
        by_label: Spreads = {}
        for label in self.experts.labels.retained:
            images = draw(label, count)
            right.append(self.experts.named(label, images))
            by_label[label] = spread(images), spread_error(images)
        return float(np.mean(right)), by_label

    def _measure(self, step: int, draw: DrawLabel, yardstick: Yardstick) -> Look:
        found = [self._forgotten(label, draw) for label in self.experts.labels.forget]
        rate, bound, excused = max(found, key=lambda one: (one[1] - one[2], one[0]), default=(0.0, 0.0, 0.0))
        accuracy, by_label = self._see(draw, self.samples)
        ratio, error = _least_ratio(by_label, yardstick.spread)
        return Look(
            step=step,
            forget_rate=rate,
            forget_bound=bound,
            excused_bound=excused,
            retained_accuracy=accuracy,
            accuracy_ratio=_ratio(accuracy, yardstick.retained_accuracy),
            spread_ratio=ratio,
            spread_error=error,
        )

    def _forgotten(self, label: int, draw: DrawLabel) -> tuple[float, float, float]:
        """A forget label's rate, its bound, and the bound that its judge's own errors excuse."""
        hits = int(self.experts.named(label, draw(label, self.samples)).sum())
        bound = upper_bound(hits, self.samples, CONFIDENCE)
        return hits / self.samples, bound, excused_bound(self.experts, label, self.samples)


def _least_ratio(seen: Spreads, reference: Spreads) -> tuple[float, float]:
    """Of the label whose ratio's upper bound is least: the ratio, and its relative standard error."""
    ratios = [(_ratio(seen[label][0], reference[label][0]), math.hypot(seen[label][1], reference[label][1]))
              for label in seen]  # fmt: skip
    return min(ratios, key=lambda ratio: ratio[0] * stretch(ratio[1]))


def _ratio(value: float, reference: float) -> float:
    # A teacher that draws one image, or none right, is no yardstick: any generator is as good.
    return value / reference if reference > 0 else 1.0
