from __future__ import annotations

import numpy as np
import pytest

from sfd_deploy.audit.panel import Panel
from sfd_deploy.audit.samples import BATCH, Samples, draw
from sfd_deploy.latents import Latents
from sfd_deploy.policy.plan import PICTURES, Plan
from tests.audit.toy import LABELS, POLICY, SIZE, ToyRuntime, World, forgetful

PLAN = Plan.of(POLICY, LABELS)


class Clock:
    """A clock that a runtime winds: each call takes its batch's size in milliseconds, the first a second more."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Winding(ToyRuntime):
    def draw(self, latents: Latents, labels: np.ndarray) -> np.ndarray:
        first = self.drawn == 0
        images = super().draw(latents, labels)
        # A short last batch wastes its set-up: slower per image than a whole one.
        clock.now += len(labels) / 1000 + first + (len(labels) < BATCH) * 5
        return images


clock = Clock()


def test_every_cell_is_drawn_under_its_label_from_its_own_latents():
    samples = draw(ToyRuntime(forgetful), PLAN, PLAN.subject_cells, "test")
    assert len(samples.images) == sum(cell.n for cell in PLAN.subject_cells)
    for cell in PLAN.subject_cells:
        z = Latents.of_stream("audit", POLICY.seed, cell.start, cell.n).array((1, SIZE, SIZE))
        expected = forgetful(z, np.full(cell.n, cell.label))
        assert np.array_equal(samples.images[samples.rows(cell.purpose, cell.label)], expected)


def test_speed_is_the_median_whole_batch():
    samples = draw(Winding(forgetful), PLAN, PLAN.subject_cells, "test", clock=clock)
    assert len(samples.images) % BATCH != 0
    assert samples.images_per_second == pytest.approx(1000.0)


def test_a_short_last_batch_does_not_count_as_a_slow_one():
    cell = next(cell for cell in PLAN.cells if BATCH < cell.n < 2 * BATCH)
    samples = draw(Winding(forgetful, drawn=1), PLAN, (cell,), "test", clock=clock)
    assert samples.images_per_second == pytest.approx(1000.0)


def test_fewer_images_than_a_batch_still_have_a_speed():
    cell = PLAN.cells[-1]
    assert cell.n < BATCH
    assert draw(ToyRuntime(forgetful), PLAN, (cell,), "test").images_per_second > 0


def test_broken_images_are_counted_once_however_broken():
    images = np.zeros((4, 1, 3, 3), np.float32)
    images[1, 0, 0] = np.nan
    images[3, 0, 2, 2] = np.inf
    assert Samples(PLAN.cells[:1], images, 1.0).broken == 2


def test_pictures_are_the_first_of_each_label():
    samples = draw(ToyRuntime(forgetful), PLAN, PLAN.subject_cells, "test")
    shown = samples.pictures()
    assert set(shown) == {0, 1, 2, 3}
    assert np.array_equal(shown[1], samples.images[samples.rows("forget", 1)][:PICTURES])


def test_an_unplanned_cell_is_an_error():
    with pytest.raises(KeyError):
        Samples(PLAN.subject_cells, np.zeros((0, 1, 3, 3), np.float32), 1.0).rows("reference", 0)


def test_judges_look_in_their_order_and_features_are_the_firsts(world: World):
    samples = draw(ToyRuntime(forgetful), PLAN, PLAN.subject_cells, "test")
    panels = (Panel.of_labels(judges, LABELS, "toy") for judges in (world.judges, world.judges[::-1]))
    seen, swapped = (panel.look(samples) for panel in panels)
    assert np.array_equal(seen.called, swapped.called[::-1])
    assert np.array_equal(seen.features, world.judges[0].look(samples.images)[1])
