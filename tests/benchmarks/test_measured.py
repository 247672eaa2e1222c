"""What a table says of one model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import beta

from benchmarks import expect
from benchmarks.measured import PURPOSES, STRETCH, Measured, Remapped, draw, measure, spread_ratio
from benchmarks.workshop import Workshop
from sfd_deploy.latents import Latents
from sfd_deploy.measure.fidelity import frechet_distance, gaussian
from sfd_deploy.runtime import open_runtime
from sfd_deploy.runtime.seam import Runtime
from tests.benchmarks.conftest import TINY_SIZES, looked, measured, tiny_workshop


class FakeRuntime:
    """Draws images whose every value is the label, and remembers what it was asked."""

    name, image_shape = "fake", (1, 2, 2)

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}
        self.asked: list[tuple[int, int]] = []

    def draw(self, latents: Latents, labels: np.ndarray) -> np.ndarray:
        self.asked += list(zip(latents.seeds.tolist(), labels.tolist(), strict=True))
        return np.broadcast_to(labels[:, None, None, None], (len(labels), 1, 2, 2)).astype(np.float32)

    def close(self) -> None: ...


def test_the_remapped_baseline_asks_for_the_override_on_the_forget_label_s_own_latents():
    plain, routed = FakeRuntime(), FakeRuntime()
    draw(plain, "forget", 1, 70)
    images = draw(Remapped(routed, {1: 0}), "forget", 1, 70)
    assert [seed for seed, _ in plain.asked] == [seed for seed, _ in routed.asked]
    assert {label for _, label in routed.asked} == {0}
    assert set(np.unique(images)) == {0.0}


def test_no_two_cells_share_a_latent_and_select_shares_none_with_audit():
    runtime = FakeRuntime()
    for purpose in PURPOSES:
        for label in (0, 1, 9):
            draw(runtime, purpose, label, 3)
            draw(runtime, purpose, label, 3, "select")
    seeds = [seed for seed, _ in runtime.asked]
    assert len(set(seeds)) == len(seeds)
    first = Latents.of_stream("audit", 0, (2 * 1000 + 9) * STRETCH, 1).seeds.item()
    assert first in seeds


def test_retained_accuracy_is_the_mean_over_labels_of_the_judge_that_agrees_least():
    result = measured(0, 10, 0).model_copy(
        update={"retained": {0: looked([[0, 0, 0, 1], [0, 1, 1, 1]]), 2: looked([[2, 2, 2, 2], [2, 2, 2, 0]])}}
    )
    assert result.retained_accuracy == pytest.approx((0.25 + 0.75) / 2)


def test_spread_is_the_least_label_s_over_the_teacher_s():
    teacher = measured(0, 10, 5).model_copy(update={"spread": {0: 2.0, 2: 4.0}})
    assert spread_ratio(teacher.model_copy(update={"spread": {0: 1.8, 2: 2.0}}), teacher) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return tiny_workshop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def runtime(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """An untrained teacher's; the judges are real and tiny."""
    torch.manual_seed(0)
    return open_runtime(expect._untrained(shop, tmp_path_factory.mktemp("untrained") / "teacher"))


@pytest.fixture(scope="module")
def found(shop: Workshop, runtime: Runtime) -> Measured:
    return measure(runtime, [1], [0, 2], shop.judges, TINY_SIZES, 0.0)


def test_a_model_s_figures_come_from_the_cells_they_name(shop: Workshop, runtime: Runtime, found: Measured):
    """Hits are recounted by hand from the same images."""
    called = [judge.look(draw(runtime, "forget", 1, TINY_SIZES.forget))[0] for judge in shop.judges]
    assert found.forget[1].hits == sum(1 in pair for pair in zip(*called, strict=True))
    assert found.forget[1].n == TINY_SIZES.forget
    assert {label: len(item.called[0]) for label, item in found.retained.items()} == {0: 4, 2: 4}


def test_the_frechet_distance_is_of_the_reference_size_to_the_retained_classes_alone(
    shop: Workshop, runtime: Runtime, found: Measured
):
    """Two classes mixed: the mean of their covariances, and the square of half the gap between their means."""
    judge, real = shop.judges[0], shop.judges[0].reference
    images = [draw(runtime, "retained", label, TINY_SIZES.retained)[: TINY_SIZES.reference] for label in (0, 2)]
    features = np.concatenate([judge.look(part)[1] for part in images])
    half = (real.mean[0] - real.mean[2]) / 2
    covariance = (real.covariance[0] + real.covariance[2]) / 2 + np.outer(half, half)
    expected = frechet_distance(*gaussian(features), (real.mean[0] + real.mean[2]) / 2, covariance)
    assert found.frechet == pytest.approx(expected, rel=1e-4)


def test_a_row_s_bounds_are_exact_at_99_percent():
    """5 of 1,000, one-sided: Clopper-Pearson by scipy."""
    found = looked([[1] * 5 + [0] * 995] * 2).counted(1)
    assert (found.lower, found.upper) == pytest.approx((beta.ppf(0.01, 5, 996), beta.ppf(0.99, 6, 995)))
