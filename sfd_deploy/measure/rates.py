"""Hits of n to exact one-sided bounds, the sample size a limit needs, and a paired test. Pure.

The bounds are Clopper and Pearson's (1934): each holds with at least the given confidence for every
true rate, however small n. They hold for a number of samples fixed before the first draw; reading
them again and again while sampling goes on voids them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv
from scipy.stats import binomtest


def upper_bound(hits: int, samples: int, confidence: float) -> float:
    """The rate that ``hits`` of ``samples`` stays below with ``confidence``, one-sided, exact; 0 to 1.

    Raises:
        ValueError: hits outside 0..samples, no samples, or a confidence outside (0, 1).
    """
    _check(hits, samples, confidence)
    return 1.0 if hits == samples else float(betaincinv(hits + 1, samples - hits, confidence))


def lower_bound(hits: int, samples: int, confidence: float) -> float:
    """The rate that ``hits`` of ``samples`` stays above with ``confidence``, one-sided, exact; 0 to 1.

    Raises:
        ValueError: as ``upper_bound``.
    """
    _check(hits, samples, confidence)
    return 0.0 if hits == 0 else float(betaincinv(hits, samples - hits + 1, 1 - confidence))


def samples_to_certify(rate: float, confidence: float) -> int:
    """The fewest samples of which zero hits bound the true rate at or below ``rate``."""
    # upper_bound(0, n, c) = 1 - (1 - c)^(1/n)
    needed = max(1, math.ceil(math.log1p(-confidence) / math.log1p(-rate)))
    return needed if upper_bound(0, needed, confidence) <= rate else needed + 1


def allowed_hits(samples: int, rate: float, confidence: float) -> int:
    """The most hits of ``samples`` whose upper bound is still at or below ``rate``; -1 if not even zero are."""
    hits = -1
    while hits < samples and upper_bound(hits + 1, samples, confidence) <= rate:
        hits += 1
    return hits


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test on the pairs where exactly one side was a hit."""

    only_first: int
    only_second: int
    p_value: float  # two-sided; 1.0 without a discordant pair


def paired_test(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> PairedTest:
    """Do two sides hit at different rates? ``first`` and ``second`` (N,) are the same latents' hits on each.

    Far more sensitive to a change than two separate rates: what both sides share cancels.

    Raises:
        ValueError: the sides differ in length.
    """
    if first.shape != second.shape:
        raise ValueError(f"sides of {first.shape} and {second.shape} are not pairs")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return PairedTest(only_first, only_second, p_value)


def _check(hits: int, samples: int, confidence: float) -> None:
    if samples < 1 or not 0 <= hits <= samples:
        raise ValueError(f"{hits} hits of {samples} samples is impossible")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
