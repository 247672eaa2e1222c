from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from sfd_deploy.measure.rates import allowed_hits, lower_bound, paired_test, samples_to_certify, upper_bound

hits_of_n = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_zero_hits_in_459_samples_bound_the_rate_just_under_one_percent():
    assert upper_bound(hits=0, samples=459, confidence=0.99) == pytest.approx(1 - 0.01 ** (1 / 459))
    assert upper_bound(hits=0, samples=459, confidence=0.99) < 0.01 < upper_bound(hits=0, samples=458, confidence=0.99)


@pytest.mark.parametrize(
    ("hits", "samples", "confidence", "lower", "upper"),
    # Clopper-Pearson limits at alpha = 0.05 (two-sided 95 % = one-sided 97.5 % each), as tables and statsmodels'
    # proportion_confint(method="beta") print them.
    [(1, 10, 0.975, 0.002529, 0.445016), (5, 10, 0.975, 0.187086, 0.812914), (10, 100, 0.975, 0.049005, 0.176223)],
)
def test_bounds_are_the_tabulated_clopper_pearson_limits(hits, samples, confidence, lower, upper):
    assert lower_bound(hits, samples, confidence) == pytest.approx(lower, abs=1e-6)
    assert upper_bound(hits, samples, confidence) == pytest.approx(upper, abs=1e-6)


@given(hits_of_n, st.sampled_from([0.9, 0.95, 0.99, 0.999]))
def test_bounds_are_scipys_exact_one_sided_intervals(pair, confidence):
    hits, n = pair
    test_below, test_above = binomtest(hits, n, alternative="less"), binomtest(hits, n, alternative="greater")
    upper = test_below.proportion_ci(confidence, method="exact").high
    lower = test_above.proportion_ci(confidence, method="exact").low
    assert upper_bound(hits, n, confidence) == pytest.approx(upper, rel=1e-9, abs=1e-12)
    assert lower_bound(hits, n, confidence) == pytest.approx(lower, rel=1e-9, abs=1e-12)


@given(hits_of_n)
def test_at_the_upper_bound_so_few_hits_have_just_the_leftover_probability(pair):
    hits, n = pair
    bound = upper_bound(hits, n, 0.99)
    if hits < n:
        assert binom.cdf(hits, n, bound) == pytest.approx(0.01, rel=1e-6)


def test_the_bound_covers_the_truth_at_least_as_often_as_promised():
    draws = np.random.default_rng(0)
    for rate in (0.001, 0.004, 0.01, 0.05):
        hits = draws.binomial(2000, rate, size=4000)
        bounds = {int(k): upper_bound(int(k), 2000, 0.99) for k in np.unique(hits)}
        missed = np.mean([bounds[int(k)] < rate for k in hits])
        assert missed <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 4000)  # a 95 % bound misses five times as often


def test_all_hits_and_no_hits_are_bounded_by_one_and_zero():
    assert upper_bound(7, 7, 0.99) == 1.0
    assert lower_bound(0, 7, 0.99) == 0.0


@pytest.mark.parametrize(("hits", "samples", "confidence"), [(3, 2, 0.9), (-1, 2, 0.9), (0, 0, 0.9), (0, 9, 1.0)])
def test_impossible_counts_are_refused(hits, samples, confidence):
    for bound in (upper_bound, lower_bound):
        with pytest.raises(ValueError, match=r"impossible|confidence"):
            bound(hits, samples, confidence)


@pytest.mark.parametrize(
    ("rate", "confidence", "needed"), [(0.01, 0.95, 299), (0.01, 0.99, 459), (0.001, 0.99, 4603), (0.01, 0.999, 688)]
)
def test_sample_sizes_for_zero_hits_are_the_known_ones(rate, confidence, needed):
    assert samples_to_certify(rate, confidence) == needed


@pytest.mark.parametrize(("samples", "allowed"), [(458, -1), (459, 0), (662, 1), (838, 2), (1307, 5), (2010, 10)])
def test_allowed_hits_at_one_percent_and_99_are_the_known_ones(samples, allowed):
    assert allowed_hits(samples, 0.01, 0.99) == allowed


def test_mcnemars_exact_test_sees_only_discordant_pairs():
    # 9 pairs changed one way and 1 the other: two-sided sign test p = 2 * (C(10,0) + C(10,1)) / 2^10.
    first = np.array([True] * 9 + [False] * 1 + [True] * 40 + [False] * 50)
    second = np.array([False] * 9 + [True] * 1 + [True] * 40 + [False] * 50)
    found = paired_test(first, second)
    assert (found.only_first, found.only_second) == (9, 1)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 1024)


def test_equal_sides_have_no_evidence_of_change():
    hits = np.array([True, False, True])
    assert paired_test(hits, hits).p_value == 1.0


def test_sides_of_different_length_are_no_pairs():
    with pytest.raises(ValueError, match="not pairs"):
        paired_test(np.ones(3, bool), np.ones(4, bool))
