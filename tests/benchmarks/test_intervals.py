from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from benchmarks.intervals import of_rates, over_samples, over_seeds


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((10, 10, 0, 10), 0.6075, 1.0000),
    ],
)
def test_the_interval_of_two_rates_is_newcombe_s_own_example(counts, low, high):
    """Newcombe, Statistics in Medicine 17 (1998) 873, table II, method 10."""
    found = of_rates(*counts)
    assert found.value == pytest.approx(counts[0] / counts[1] - counts[2] / counts[3])
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_interval_over_seeds_is_the_paired_t_test_s():
    ours, plain = np.array([0.91, 0.90, 0.93, 0.92, 0.89]), np.array([0.92, 0.90, 0.92, 0.925, 0.90])
    expected = ttest_rel(ours, plain).confidence_interval(0.95)
    found = over_seeds((ours - plain).tolist())
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_seed_has_a_difference_and_no_interval():
    found = over_seeds([-0.004])
    assert found.value == pytest.approx(-0.004)
    assert math.isnan(found.low)
    assert str(found) == "-0.40 points"


def test_the_interval_over_many_images_is_the_paired_t_test_s():
    pairs = np.random.default_rng(0).integers(-1, 2, 4000).astype(float)
    expected = ttest_1samp(pairs, 0).confidence_interval(0.95)
    found = over_samples(pairs.reshape(1, 1, -1))
    assert (found.low, found.high) == (pytest.approx(expected.low, rel=1e-3), pytest.approx(expected.high, rel=1e-3))


def test_the_interval_over_images_covers_the_true_difference_as_often_as_it_says():
    """Simulated: two labels of different difference, and two seeds that share most of an image's luck.

    P(u + 0.2 v < t) for uniform u, v and 0.2 <= t <= 1 is t - 0.1, so the differences are those of the thresholds.
    """
    draws, covered = np.random.default_rng(3), 0
    ours, plain = (np.array(rates)[None, :, None] for rates in ((0.93, 0.75), (0.90, 0.80)))
    for _ in range(400):
        luck = draws.random((2, 150))[None] + 0.2 * draws.random((2, 2, 150))
        found = over_samples((luck < ours).astype(float) - (luck < plain))
        covered += found.low <= (0.03 - 0.05) / 2 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_interval_over_images_narrows_with_their_number_and_not_with_copies_of_a_seed():
    draws = np.random.default_rng(4)
    pairs = draws.integers(-1, 2, (1, 3, 400)).astype(float)
    width = lambda values: over_samples(values).high - over_samples(values).low
    assert width(np.concatenate([pairs, pairs])) == pytest.approx(width(pairs))
    assert width(pairs[:, :, :100]) == pytest.approx(2 * width(pairs), rel=0.15)
