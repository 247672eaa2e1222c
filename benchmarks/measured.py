"""What a table says of one model: hits on forget labels, retained accuracy, spread, Fréchet distance.

Definitions are the audit's (docs/audit.md); latents come from the ``audit`` stream, unless a choice is made by
them. Every (purpose, label) has a stretch of the stream to itself, so all rows and seeds draw the same latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sfd_deploy.audit.figures import count
from sfd_deploy.audit.samples import BATCH
from sfd_deploy.config import StageConfig
from sfd_deploy.evidence import Count
from sfd_deploy.latents import Latents
from sfd_deploy.measure.fidelity import frechet_distance, gaussian, spread
from sfd_deploy.measure.judges import Judge
from sfd_deploy.progress import progress_bar
from sfd_deploy.runtime.seam import Images, Runtime

CONFIDENCE = 0.99
STRETCH = 1_000_000
PURPOSES = ("forget", "override", "retained")
Purpose = Literal["forget", "override", "retained"]
Stream = Literal["audit", "select"]


class Sizes(StageConfig):
    """Images per label."""

    forget: int = Field(10_000, ge=1, description="of the forget label, by each generator")
    override: int = Field(10_000, ge=1, description="of the override label, by the teacher: the judges' own error")
    retained: int = Field(1_000, ge=2, description="of each retained label, by each generator")
    reference: int = Field(500, ge=2, description="of each retained label, by the teacher; all distances are at this n")
    teacher_forget: int = Field(1_000, ge=1, description="of the forget label, by the teacher")


class Looked(StageConfig):
    """What each judge called the images drawn under one label."""

    called: tuple[tuple[int, ...], ...]  # (judges, n)

    def hits(self, label: int) -> NDArray[np.bool_]:
        """Which images (n,) at least one judge calls ``label``."""
        hits: NDArray[np.bool_] = (np.array(self.called) == label).any(0)
        return hits

    def counted(self, label: int) -> Count:
        """Hits of ``label`` with their bounds."""
        return count(self.hits(label), CONFIDENCE)


class Measured(StageConfig):
    """One model's figures. ``called`` of ``retained`` allow paired comparisons: latents are shared."""

    forget: dict[int, Count]
    retained: dict[int, Looked]
    spread: dict[int, float]
    frechet: float
    seconds: float = Field(description="of training, all stages that led to this model")

    @property
    def worst(self) -> int:
        """The forget label with the highest rate."""
        return max(self.forget, key=lambda label: self.forget[label].rate)

    @property
    def retained_accuracy(self) -> float:
        """Mean over retained labels of the share called by the label asked for, by the judge that says so least."""
        return fmean(float(self.right(label).mean()) for label in self.retained)

    def right(self, label: int) -> NDArray[np.float64]:
        """1 where (n,) the judge that agrees least with ``label`` agrees."""
        agrees = (np.array(self.retained[label].called) == label).astype(np.float64)
        least: NDArray[np.float64] = agrees[agrees.mean(1).argmin()]
        return least


def draw(runtime: Runtime, purpose: Purpose, label: int, n: int, stream: Stream = "audit") -> Images:
    """``n`` images (n, C, H, W) of ``label`` from the purpose's stretch of the stream."""
    start = (PURPOSES.index(purpose) * 1000 + label) * STRETCH
    latents = Latents.of_stream(stream, 0, start, n)
    parts = []
    with progress_bar(f"{purpose} {label}", n) as advance:
        for i in range(0, n, BATCH):
            rows = latents[i : i + BATCH]
            parts.append(runtime.draw(rows, np.full(len(rows), label, np.int64)))
            advance(len(rows), "")
    return np.concatenate(parts)


def look(images: Images, judges: Sequence[Judge]) -> Looked:
    """Show images to every judge."""
    return Looked(called=tuple(tuple(judge.look(images)[0].tolist()) for judge in judges))


def look_at(runtime: Runtime, purpose: Purpose, label: int, n: int, judges: Sequence[Judge]) -> Looked:
    """Draw under one label and show to every judge."""
    return look(draw(runtime, purpose, label, n), judges)


def measure(
    runtime: Runtime, forget: Sequence[int], retained: Sequence[int], judges: Sequence[Judge], sizes: Sizes,
    seconds: float, stream: Stream = "audit",
) -> Measured:  # fmt: skip
    """Figures of one model; the Fréchet distance is over the first ``sizes.reference`` images of each label."""
    looked, spreads, features = {}, {}, []
    for label in retained:
        images = draw(runtime, "retained", label, sizes.retained, stream)
        looked[label], spreads[label] = look(images, judges), spread(images)
        features.append(judges[0].look(images[: sizes.reference])[1])
    hits = {label: look(draw(runtime, "forget", label, sizes.forget, stream), judges) for label in forget}
    return Measured(
        forget={label: found.counted(label) for label, found in hits.items()},
        retained=looked,
        spread=spreads,
        frechet=frechet_distance(*gaussian(np.concatenate(features)), *judges[0].reference.pooled(retained)),
        seconds=seconds,
    )


def spread_ratio(measured: Measured, teacher: Measured) -> float:
    """Least spread of a retained label over the teacher's."""
    return min(value / max(teacher.spread[label], 1e-9) for label, value in measured.spread.items())


class Remapped:
    """A runtime asked for the override wherever a forget label is asked for: the trivial baseline."""

    def __init__(self, runtime: Runtime, forget: dict[int, int]) -> None:
        self.runtime, self.forget = runtime, forget
        self.name, self.settings, self.image_shape = runtime.name, runtime.settings, runtime.image_shape
        self.close: Callable[[], None] = runtime.close

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """The runtime's images of the routed labels."""
        routed: NDArray[Any] = np.array([self.forget.get(label, label) for label in labels.tolist()], np.int64)
        return self.runtime.draw(latents, routed)
