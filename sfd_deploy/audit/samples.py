"""Samples: the images of a plan's cells, drawn through one runtime, and what the judges say of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """Samples with what each judge called them.

    ``classes`` (judges, labels) is what a judge numbers a label's class, -1 where it knows none such: of a label's
    images it is asked nothing.
    """

    samples: Samples
    called: NDArray[np.int64]  # (judges, N), each judge's own numbers
    features: NDArray[np.float32]  # (N, F), the extractor's
    classes: NDArray[np.int64]
    extractor: int = 0

    def images(self, purpose: Purpose, label: int) -> Images:
        """A cell's images (n, C, H, W)."""
        return self.samples.images[self.samples.rows(purpose, label)]

    def featured(self, labels: Sequence[int]) -> tuple[int, ...]:
        """Those of ``labels`` whose class the extractor knows."""
        return tuple(label for label in labels if self.classes[self.extractor, label] >= 0)

    def hits(self, purpose: Purpose, drawn: int, called: int) -> NDArray[np.bool_]:
        """Which images (n,) of a cell *at least one* judge calls the label ``called``: the wary side for a leak."""
        hits: NDArray[np.bool_] = np.logical_or.reduce(self._said(purpose, drawn, (called,)))
        return hits

    def share(self, purpose: Purpose, drawn: int, called: int | Sequence[int]) -> float:
        """Share of a cell's images called (one of) ``called`` by the judge that says so *least*: wary for quality."""
        return float(self._said(purpose, drawn, np.atleast_1d(called).tolist()).mean(1).min())

    def share_of_others(self, purpose: Purpose, drawn: int, called: Sequence[int]) -> float:
        """Share of a cell's images called none of ``called`` by the judge that says so least."""
        return float((~self._said(purpose, drawn, called)).mean(1).min())

    def _said(self, purpose: Purpose, drawn: int, called: Sequence[int]) -> NDArray[np.bool_]:
        """(judges that know one of ``called``, n): whether each calls an image one of them."""
        rows = self.samples.rows(purpose, drawn)
        asked = self.classes[:, list(called)]
        return np.stack([np.isin(said[rows], numbers) for said, numbers in zip(self.called, asked, strict=True)
                         if (numbers >= 0).any()])  # fmt: skip
