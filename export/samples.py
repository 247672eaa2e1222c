"""The latents and labels that calibrate and check graphs: from one stream, every label in turn. No data needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.export.config import LATENT_STREAM
from sfd_deploy.latents import Latents

Feeds = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Samples:
    """Latents with a label each."""

    latents: Latents
    labels: NDArray[np.int64]  # (N,)

    @classmethod
    def of(cls, seed: int, start: int, count: int, classes: int) -> Samples:
        """Images ``start`` to ``start + count`` of the calibration stream, labels cycling through all classes."""
        labels = (np.arange(count) % classes).astype(np.int64)
        return cls(Latents.of_stream(LATENT_STREAM, seed, start, count), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Samples:
        return Samples(self.latents[rows], self.labels[rows])

    def feeds(self, shape: tuple[int, ...], batch: int) -> Iterator[Feeds]:
        """The graph's inputs in batches of at most ``batch``."""
        for start in range(0, len(self), batch):
            part = self[start : start + batch]
            yield {"latents": part.latents.array(shape), "class_labels": part.labels}

    def digest(self, shape: tuple[int, ...]) -> str:
        """Hex sha256 of the latents' float32 bytes, then the labels' int64 bytes."""
        return hashlib.sha256(self.latents.array(shape).tobytes() + self.labels.tobytes()).hexdigest()
