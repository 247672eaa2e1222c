"""The table of methods: its criteria, their intervals, and its bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from benchmarks.measured import Measured
from benchmarks.rows_table import Facts, criteria, report
from sfd_deploy.audit.figures import count
from sfd_deploy.labels import Labels
from tests.benchmarks.conftest import TINY_SIZES, looked, measured


def facts(sfd: dict[int, Measured], plain: dict[int, Measured], error: int, shipped: bool = False) -> Facts:
    seeds = sorted(sfd.keys() | plain.keys())
    teacher_of = {seed: 0 if shipped else seed for seed in seeds}
    errors = {teacher: {1: looked([[1] * error + [0] * (1000 - error)] * 2)} for teacher in teacher_of.values()}
    rows = {"teacher": dict.fromkeys(teacher_of.values(), measured(90, 100, 99)), "distilled": plain, "sfd": sfd}
    labels = Labels(class_names=("zero", "one"), forget={1: 0})
    return Facts(labels, TINY_SIZES, rows, teacher_of, errors, shipped)


@pytest.mark.parametrize(
    ("sfd_right", "hits", "missed"),
    [
        (950, 6, []), (951, 6, []), (949, 6, ["retained accuracy"]), (1000, 6, []), (960, 8, ["judges' error"]),
        (960, 0, []),
        (949, 8, ["retained", "judges'"]),
    ],
)  # fmt: skip
def test_the_criteria_are_a_loss_of_one_point_and_half_a_point_above_the_judges_error(sfd_right, hits, missed):
    """Plain distillation is right on 960 of 1,000; the judges' error is 2 of 1,000: 950 and 7 are the limits."""
    sfd, plain = measured(hits, 1000, sfd_right, 1000), measured(900, 1000, 960, 1000)
    found = criteria(facts({0: sfd}, {0: plain}, error=2)).missed
    assert len(found) == len(missed)
    assert all(word in line for word, line in zip(missed, found, strict=True))


def test_seeds_are_paired_and_a_shared_teacher_s_error_counts_once():
    sfd = {seed: measured(3, 1000, 940 + seed, 1000) for seed in (0, 1)}
    plain = {seed: measured(900, 1000, 942 + 3 * seed, 1000) for seed in (0, 1)}
    shared, apart = (criteria(facts(sfd, plain, 2, shipped)) for shipped in (True, False))
    assert shared.retained_seeds is not None
    assert shared.retained_seeds.value == pytest.approx(-0.003)
    assert shared.excess is not None
    assert apart.excess is not None
    assert shared.excess.value == pytest.approx(0.001)
    assert shared.excess.high - shared.excess.low > apart.excess.high - apart.excess.low


def test_missing_rows_leave_their_criterion_unmeasured():
    found = criteria(facts({}, {0: measured(9, 10, 9)}, 0))
    assert (found.retained_seeds, found.excess, found.missed) == (None, None, [])


def test_of_several_forget_labels_the_worst_excess_counts():
    """The judges err on no image: an excess is the rate itself."""
    counts = {label: count(np.arange(1000) < hits, 0.99) for label, hits in {1: 2, 2: 30, 3: 5}.items()}
    sfd = measured(0, 1000, 960, 1000).model_copy(update={"forget": counts})
    clean = dict.fromkeys(counts, looked([[0] * 1000] * 2))
    labels = Labels(class_names=("zero", "one", "two", "three"), forget={1: 0, 2: 0, 3: 0})
    several = replace(facts({0: sfd}, {}, error=0), labels=labels, errors={0: clean})
    excess = criteria(several).excess
    assert excess is not None
    assert excess.value == pytest.approx(0.03)


def test_both_intervals_of_retained_accuracy_are_of_sfd_minus_distilled():
    found = criteria(facts({0: measured(3, 1000, 940, 1000)}, {0: measured(3, 1000, 960, 1000)}, 2))
    assert found.retained_seeds is not None
    assert found.retained_samples is not None
    assert found.retained_seeds.value == pytest.approx(-0.02)
    assert found.retained_samples.value == pytest.approx(-0.02)


def test_the_table_s_bound_is_the_worst_seed_s_exact_one():
    """0 and 5 hits of 1,000 at 99 %: Clopper-Pearson by scipy."""
    sfd = {0: measured(0, 1000, 9), 1: measured(5, 1000, 9)}
    table = report(facts(sfd, {0: measured(900, 1000, 9)}, error=0))
    (row,) = [line for line in table.splitlines() if "**SFD**" in line]
    assert row.split(" | ")[3] == f"{100 * beta.ppf(0.99, 6, 995):.2f}"
