"""Samples: the images of a plan's cells, drawn through one runtime, and what the judges say of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.measure.judges import Judge
from sfd_deploy.measure.timing import Clock, images_per_second
from sfd_deploy.policy.plan import PICTURES, Cell, Plan, Purpose
from sfd_deploy.progress import progress_bar
from sfd_deploy.runtime.seam import Images, Runtime

BATCH = 64


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W) of ``cells``, one cell after the other, and how fast they came."""

    cells: tuple[Cell, ...]
    images: Images
    images_per_second: float

    def rows(self, purpose: Purpose, label: int) -> slice:
        """Where a cell's images are.

        Raises:
            KeyError: there is no such cell.
        """
        start = 0
        for cell in self.cells:
            if (cell.purpose, cell.label) == (purpose, label):
                return slice(start, start + cell.n)
            start += cell.n
        raise KeyError((purpose, label))

    @property
    def broken(self) -> int:
        """How many images hold a value that is not finite."""
        return int((~np.isfinite(self.images).reshape(len(self.images), -1).all(1)).sum())

    def pictures(self) -> dict[int, Images]:
        """The first few images of each label, as a report shows them."""
        shown: dict[int, Images] = {}
        for cell in self.cells:
            shown.setdefault(cell.label, self.images[self.rows(cell.purpose, cell.label)][:PICTURES].copy())
        return shown


def draw(runtime: Runtime, plan: Plan, cells: tuple[Cell, ...], task: str, clock: Clock = time.perf_counter) -> Samples:
    """Draw ``cells`` in batches of 64, timed, under a progress bar called ``task``."""
    latents, labels = plan.latents(cells)
    parts: list[Images] = []
    seconds: list[float] = []
    with progress_bar(task, len(labels)) as advance:
        for start in range(0, len(labels), BATCH):
            stop = min(start + BATCH, len(labels))
            began = clock()
            parts.append(runtime.draw(latents[start:stop], labels[start:stop]))
            if stop - start == min(BATCH, len(labels)):  # a last, smaller batch would count as a slow one
                seconds.append(clock() - began)
            advance(stop - start, "")
    return Samples(cells, np.concatenate(parts), images_per_second(min(BATCH, len(labels)), seconds))


@dataclass(frozen=True)
class Seen:
    """Samples with what each judge called them."""

    samples: Samples
    called: NDArray[np.int64]  # (judges, N)
    features: NDArray[np.float32]  # (N, F), the first judge's

    def images(self, purpose: Purpose, label: int) -> Images:
        """A cell's images (n, C, H, W)."""
        return self.samples.images[self.samples.rows(purpose, label)]

    def hits(self, purpose: Purpose, drawn: int, called: int) -> NDArray[np.bool_]:
        """Which images (n,) of a cell *at least one* judge calls the label ``called``: the wary side for a leak."""
        hits: NDArray[np.bool_] = (self.called[:, self.samples.rows(purpose, drawn)] == called).any(0)
        return hits

    def share(self, purpose: Purpose, drawn: int, called: int | Sequence[int]) -> float:
        """Share of a cell's images called (one of) ``called`` by the judge that says so *least*: wary for quality."""
        return float(np.isin(self.called[:, self.samples.rows(purpose, drawn)], called).mean(1).min())


def look(samples: Samples, judges: Sequence[Judge]) -> Seen:
    """Show every image to every judge; features are the first judge's."""
    views = [judge.look(samples.images) for judge in judges]
    return Seen(samples, np.stack([labels for labels, _ in views]), views[0][1])
