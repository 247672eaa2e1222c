"""Learning rates over the course of a training."""

from __future__ import annotations

import pytest

from sfd_deploy.labels import Labels
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.schedule import linear_decay
from tests.conftest import tiny_generator


def test_the_rate_is_kept_then_falls_in_equal_parts_to_one_part_at_the_last_step():
    assert [linear_decay(step, 8, 0.5) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [linear_decay(step, 3, 0.0) for step in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(("share", "last"), [(0.0, 1.0), (1.0, 0.25)])
def test_both_networks_rates_fall_together(share: float, last: float):
    config = TrainConfig(
        teacher="x", iterations=4, retained_rows=2, fake_score_rate=1e-3, generator_rate=4e-4, decay_share=share
    )
    loop = SfdLoop(config, Labels(class_names=("a", "b", "c")), tiny_generator().denoiser)
    loop.iterate(3)
    assert [adam.param_groups[0]["lr"] for adam in (loop.fake_score_adam, loop.generator_adam)] == [
        pytest.approx(1e-3 * last), pytest.approx(4e-4 * last),
    ]  # fmt: skip
