"""Intervals of differences: two proportions, paired means over seeds, paired accuracies over samples. Pure.

All are two-sided and take their confidence as an argument; rates are from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, t


@dataclass(frozen=True)
class Difference:
    """A difference and its interval; low and high are nan where one value has no spread."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{100 * self.value:+.2f} points"
        return f"{100 * self.value:+.2f} points [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def of_rates(hits: int, n: int, other_hits: int, other_n: int, confidence: float = 0.95) -> Difference:
    """Rate minus other rate, independent samples: Newcombe's hybrid of two Wilson intervals (1998, method 10).

    Keeps its coverage where both rates are next to nothing, which Wald's interval does not.
    """
    rate, other = hits / n, other_hits / other_n
    low, high = _wilson(hits, n, confidence)
    other_low, other_high = _wilson(other_hits, other_n, confidence)
    value = rate - other
    return Difference(
        value, value - math.hypot(rate - low, other_high - other), value + math.hypot(high - rate, other - other_low)
    )


def _wilson(hits: int, n: int, confidence: float) -> tuple[float, float]:
    found = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def over_seeds(differences: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean of one paired difference a seed, by Student's t; of a single seed there is no interval."""
    mean = fmean(differences)
    if len(differences) < 2:
        return Difference(mean, math.nan, math.nan)
    half = float(t.ppf((1 + confidence) / 2, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


def over_samples(pairs: NDArray[np.float64], confidence: float = 0.95) -> Difference:
    """Mean over seeds, labels and latents of per-image differences (seeds, labels, n), these seeds taken as given.

    The latents are the same for every seed and for both sides, so an image's differences are averaged over the
    seeds first; labels are strata of equal weight. Normal approximation.
    """
    by_latent = pairs.mean(0)  # (labels, n)
    labels, n = by_latent.shape
    error = math.sqrt(float(by_latent.var(1, ddof=1).sum()) / n) / labels
    value, half = float(pairs.mean()), float(norm.ppf((1 + confidence) / 2)) * error
    return Difference(value, value - half, value + half)
