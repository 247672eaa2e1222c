"""How images differ: PSNR and agreement between two sets, Fréchet distance to real statistics, spread in one set.

Images are float32 (N, C, H, W) in [-1, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.runtime.seam import Images

DATA_RANGE = 2.0
# Float32 cannot tell images apart that are closer; also keeps the PSNR of equal images finite.
PSNR_CAP_DB = 150.0


def psnr_db(images: Images, reference: Images) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image (N,), in dB over the data range of 2, at most 150.

    Raises:
        ValueError: the sets differ in shape.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images {images.shape} and reference {reference.shape} are not pairs")
    error = (images.astype(np.float64) - reference).reshape(len(images), -1)
    mean_square = np.square(error).mean(1)
    floor = DATA_RANGE**2 * 10 ** (-PSNR_CAP_DB / 10)
    decibels: NDArray[np.float64] = 10 * np.log10(DATA_RANGE**2 / np.maximum(mean_square, floor))
    return decibels


def agreement(called: NDArray[np.int64], reference: NDArray[np.int64]) -> float:
    """Share of images that every judge calls the same in both sets; labels are (judges, N)."""
    return float((called == reference).all(0).mean())


def spread(images: Images) -> float:
    """Root mean square distance between two different images of one set, in pixel space; 0 if all are one image.

    Equals ``sqrt(2 * trace(covariance))`` with the unbiased covariance, so it does not depend on N
    in expectation and sets of different sizes compare.

    Pixel space rather than a judge's features, for three reasons. A classifier is trained to *remove*
    variation within a class, so its features are blind to just what this figure is for. The Fréchet
    distance already looks at features, and two figures that fail in the same way are one. And it needs
    no judge. What pixel space gets wrong, noise counted as variety, the other figures catch: noise has
    a large spread and no accuracy.

    Of a prompt family the images come from many prompts, so the variety between these counts too: ``scatter`` has
    the variety within each.

    Raises:
        ValueError: fewer than two images.
    """
    return math.sqrt(2 * float(_from_mean(images).sum()) / (len(images) - 1))


class Scatter(NamedTuple):
    """Squared distances of images to the mean of their group, summed, and the degrees of freedom that they have."""

    squares: float
    freedom: int

    def __add__(self, other: object) -> Scatter:
        """Of both sets' groups together."""
        if not isinstance(other, Scatter):
            return NotImplemented
        return Scatter(self.squares + other.squares, self.freedom + other.freedom)

    @property
    def spread(self) -> float | None:
        """As ``spread``, of two different images of one group; None where no group has two."""
        return math.sqrt(2 * self.squares / self.freedom) if self.freedom else None


def scatter(images: Images, groups: NDArray[np.int64]) -> Scatter:
    """How far images are from the mean of their own group; ``groups`` (N,) numbers it."""
    sets = [images[groups == group] for group in np.unique(groups)]
    return Scatter(
        sum(float(_from_mean(found).sum()) for found in sets if len(found) > 1), sum(len(found) - 1 for found in sets)
    )


def spread_error(images: Images) -> float:
    """Relative standard error of ``spread``; 0 if all are one image.

    By the delta method: the squared distances of the images to their mean vary from image to image, the spread is
    the root of their average, and a root halves a relative error.

    Raises:
        ValueError: fewer than two images.
    """
    distances = _from_mean(images)
    if not (average := float(distances.mean())):
        return 0.0
    return float(distances.std(ddof=1)) / (2 * average * math.sqrt(len(images)))


def _from_mean(images: Images) -> NDArray[np.float64]:
    """Squared distance of each image to the mean of all; (N,)."""
    if len(images) < 2:
        raise ValueError("spread needs at least two images")
    flat = images.reshape(len(images), -1).astype(np.float64)
    distances: NDArray[np.float64] = np.square(flat - flat.mean(0)).sum(1)
    return distances


def gaussian(features: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (F,) and unbiased covariance (F, F) of features (N, F)."""
    values = features.astype(np.float64)
    return values.mean(0), np.atleast_2d(np.cov(values.T))


def frechet_distance(
    mean_a: NDArray[np.float64], covariance_a: NDArray[np.float64], mean_b: NDArray[np.float64],
    covariance_b: NDArray[np.float64],
) -> float:  # fmt: skip
    """Squared Fréchet distance between two Gaussians: |a - b|^2 + tr(A + B - 2 (A B)^(1/2)); at least 0.

    Called FID only where the features are the Inception network's of 2015: here they are a judge's,
    so values compare under one judge digest only.
    """
    # tr((A B)^1/2) = tr((A^1/2 B A^1/2)^1/2): symmetric, so no complex part to throw away, and rank
    # deficiency (fewer images than features) is harmless.
    root = _root(covariance_a)
    values = np.linalg.eigvalsh(root @ covariance_b @ root)
    cross = float(np.sqrt(np.maximum(values, 0.0)).sum())
    shift = float(np.square(mean_a - mean_b).sum())
    return max(0.0, shift + float(np.trace(covariance_a) + np.trace(covariance_b)) - 2 * cross)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
