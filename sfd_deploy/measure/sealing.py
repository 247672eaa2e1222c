"""What a judge's folder holds beside its model: its error on labelled images, and statistics of its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from sfd_deploy.errors import DataError, LimitError, ModelError
from sfd_deploy.measure.judges import HELD_OUT, REFERENCE, Sight

# A covariance a class is float32 in the folder and float64 in memory: 134 MB at this width.
MOST_FEATURES = 4096


class Labelled(Protocol):
    """Images with a label each, read in batches."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), counted in ``class_names``."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 in [-1, 1] (B, C, H, W) and labels (B,) at ``rows``."""
        ...


@dataclass(frozen=True)
class Measured:
    """What a judge said of labelled images."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,)
    predictions: NDArray[np.int64]  # (N,)
    features: NDArray[np.float32]  # (N, F)

    @property
    def accuracy(self) -> float:
        """Share of the images that it called by their label."""
        return float((self.predictions == self.labels).mean())

    @property
    def facts(self) -> dict[str, Any]:
        """The card that later stages read from the manifest."""
        classes = range(len(self.class_names))
        confusion = [[int(((self.labels == i) & (self.predictions == j)).sum()) for j in classes] for i in classes]
        return {
            "class_names": list(self.class_names), "held_out_images": len(self.labels), "accuracy": self.accuracy,
            "confusion": confusion, "features": int(self.features.shape[1]),
        }  # fmt: skip

    def require(self, min_accuracy: float, mend: str) -> None:
        """Refuse a judge that errs more often than its config allows.

        Raises:
            LimitError: naming both accuracies.
        """
        if self.accuracy < min_accuracy:
            raise LimitError(f"judge accuracy is {self.accuracy:.4f}, the config wants {min_accuracy}", mend)

    def write(self, folder: Path) -> None:
        """Write ``held_out.safetensors`` and ``reference.safetensors``."""
        pair = {"labels": self.labels.astype(np.int16), "predictions": self.predictions.astype(np.int16)}
        save_file({key: torch.from_numpy(value) for key, value in pair.items()}, folder / HELD_OUT)
        classes = range(len(self.class_names))
        by_class = [self.features[self.labels == label].astype(np.float64) for label in classes]
        covariance = [np.atleast_2d(np.cov(rows.T)) for rows in by_class]
        statistics = {
            "mean": torch.from_numpy(np.stack([rows.mean(0) for rows in by_class])).float(),
            "covariance": torch.from_numpy(np.stack(covariance)).float(),
        }
        save_file(statistics, folder / REFERENCE)


@torch.inference_mode()
def measure_judge(sight: Sight, data: Labelled, class_names: Sequence[str]) -> Measured:
    """Show every labelled image to a judge of ``class_names``, which may stand in another order than the data's.

    Raises:
        DataError: a class that has fewer than two images, or that the judge does not know.
        ModelError: features that are not finite, or more than a covariance can be kept of.
    """
    labels = _by_name(data, class_names)
    seen = [sight.see(data.batch(rows)[0]) for rows in torch.arange(len(data)).split(256)]
    predictions, features = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    if not np.isfinite(features).all():
        raise ModelError("the judge's features of real images are not finite", "give a judge with finite weights")
    if features.shape[1] > MOST_FEATURES:
        raise ModelError(
            f"{features.shape[1]} features an image; at most {MOST_FEATURES} are kept", "name a smaller features_output"
        )
    return Measured(tuple(class_names), labels, predictions, features)


def _by_name(data: Labelled, class_names: Sequence[str]) -> NDArray[np.int64]:
    """The data's labels, counted in ``class_names``."""
    counts = dict(zip(data.class_names, np.bincount(data.labels, minlength=len(data.class_names)), strict=True))
    if unknown := sorted(set(counts) - set(class_names)):
        raise DataError(f"images of {unknown[0]}, which is no class of the judge", f"classes: {', '.join(class_names)}")
    for name in class_names:
        if (count := counts.get(name, 0)) < 2:
            raise DataError(
                f"{count} labelled images of {name}: its error and its features' spread need at least two", "add some"
            )
    return np.array([class_names.index(name) for name in data.class_names], np.int64)[data.labels]
