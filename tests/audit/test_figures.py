from __future__ import annotations

import numpy as np
import pytest

from sfd_deploy.audit.figures import Yardstick, count, frechet_to_real, subject_figures
from sfd_deploy.audit.samples import Samples, Seen
from sfd_deploy.evidence import Figures, TeacherFigures
from sfd_deploy.labels import Labels
from sfd_deploy.measure.fidelity import frechet_distance, gaussian, spread
from sfd_deploy.measure.judges import FeatureStatistics
from sfd_deploy.policy.plan import Plan, Policy

LABELS = Labels(class_names=("coat", "trouser", "bag"), forget={1: 2})
POLICY = Policy(max_forget_rate=0.4, forget_samples=10, override_samples=8, retained_samples=6, reference_samples=4)
PLAN = Plan.of(POLICY, LABELS)
CLASSES = np.tile(np.arange(3), (2, 1))  # two judges of the labels' own classes
REAL = FeatureStatistics(np.zeros((3, 2)), np.stack([np.eye(2)] * 3))
TEACHER = TeacherFigures(
    name="teacher", digest="t", retained_accuracy=1.0, accuracy_by_label={0: 1.0, 2: 1.0},
    spread_by_label={0: 2.0, 2: 4.0}, frechet=0.5, images_per_second=20.0, network_evaluations=35,
)  # fmt: skip


@pytest.fixture
def seen() -> Seen:
    """Ten forget, eight override and twice six retained images; both judges right about all of them."""
    draws = np.random.default_rng(0)
    cells = PLAN.subject_cells
    labels = np.concatenate([np.full(cell.n, 2 if cell.purpose == "forget" else cell.label) for cell in cells])
    images = draws.uniform(-1, 1, (len(labels), 1, 2, 2)).astype(np.float32)
    features = draws.normal(size=(len(labels), 2)).astype(np.float32)
    return Seen(Samples(cells, images, 700.0), np.stack([labels, labels]), features, CLASSES)


def figures(seen: Seen, parity: Seen | None = None) -> Figures:
    return subject_figures(seen, PLAN, POLICY, Yardstick(TEACHER, REAL), parity)


def test_a_hit_is_what_either_judge_says_and_is_counted_once(seen):
    seen.called[0, :3] = 1  # images 0, 1, 2 by the first judge
    seen.called[1, 2:5] = 1  # images 2, 3, 4 by the second
    found = figures(seen).forget
    assert (found.hits, found.n, found.rate) == (5, 10, 0.5)
    assert figures(seen).hit_indices == {1: (0, 1, 2, 3, 4)}


def test_shares_and_accuracies_are_the_stricter_judges(seen):
    seen.called[0, :3] = 0  # three of ten forget images: not the override, says the first judge
    retained = seen.samples.rows("retained", 0)
    seen.called[1, retained.start : retained.start + 3] = 1  # three of six coats, says the second judge
    found = figures(seen)
    assert found.override_share == pytest.approx(0.7)
    assert found.retained_accuracy_by_label == {0: 0.5, 2: 1.0}
    assert found.retained_accuracy == pytest.approx(0.75)


def test_override_error_counts_forget_calls_on_override_images_alone(seen):
    override = seen.samples.rows("override", 2)
    seen.called[0, override.start] = 1
    seen.called[1, override.start + 1] = 0  # wrong, but not the forget label
    found = figures(seen)
    assert (found.override_error.hits, found.override_error.n) == (1, 8)
    assert found.forget.hits == 0


def test_spread_is_the_least_ratio_to_the_teachers_same_label(seen):
    own = {label: spread(seen.samples.images[seen.samples.rows("retained", label)]) for label in (0, 2)}
    found = figures(seen)
    assert found.spread_by_label == {0: pytest.approx(own[0] / 2.0), 2: pytest.approx(own[2] / 4.0)}
    assert own[2] / 4.0 < own[0] / 2.0
    assert found.spread == pytest.approx(own[2] / 4.0)


def test_frechet_distance_is_taken_at_the_teachers_sample_size(seen):
    rows = [seen.features[seen.samples.rows("retained", label)][:4] for label in (0, 2)]
    expected = frechet_distance(*gaussian(np.concatenate(rows)), np.zeros(2), np.eye(2))
    assert frechet_to_real(seen, "retained", (0, 2), 4, REAL) == pytest.approx(expected)
    assert figures(seen).frechet == pytest.approx(expected)
    assert figures(seen).frechet_ratio == pytest.approx(expected / 0.5)


def test_parity_is_with_the_reference_image_by_image(seen):
    samples = Samples(seen.samples.cells, seen.samples.images + np.float32(0.02), 1.0)
    moved = Seen(samples, seen.called.copy(), seen.features, CLASSES)
    moved.called[1, 0] = 0
    found = figures(moved, parity=seen)
    assert found.psnr_db == pytest.approx(40.0, abs=1e-3)
    assert found.agreement == pytest.approx(29 / 30)
    assert figures(seen).psnr_db is None


def test_speed_up_is_over_the_teachers_own_speed(seen):
    assert figures(seen).speedup_over_teacher == pytest.approx(35.0)


def test_upper_99_does_not_follow_the_policys_confidence():
    hits = np.zeros(459, bool)
    assert count(hits, 0.95).upper == pytest.approx(1 - 0.05 ** (1 / 459))
    assert count(hits, 0.95).upper_99 == pytest.approx(1 - 0.01 ** (1 / 459))
