"""The published configurations, and what the loop makes of them.

``test_config`` holds most of their values; here are those that it leaves out.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from sfd_deploy.labels import Labels
from sfd_deploy.models.denoiser import DiscreteDenoiser
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.losses import sid_loss
from sfd_deploy.training.rows import draw_rows
from sfd_deploy.training.schedule import linear_decay
from tests.models.tiny import tiny_denoiser

# Rows of either half, and labels 0 → 1: CIFAR-10's airplane → automobile, STL-10's airplane → bird.
HALVES = {"cifar10": 128, "cifar10-distil": 128, "cifar10-two-stage": 128, "stl10": 64}
FORGETTING = {"cifar10": {0: 1}, "cifar10-distil": {}, "cifar10-two-stage": {0: 1}, "stl10": {0: 1}}
FAKE_SCORE_RATE = {"cifar10": 1e-5, "cifar10-distil": 3e-5, "cifar10-two-stage": 3e-5, "stl10": 3e-5}
NAMES = tuple(HALVES)


def preset(name: str) -> TrainConfig:
    return TrainConfig.load(name, "train")


def ten_labels(name: str) -> Labels:
    return Labels(class_names=tuple("abcdefghij")).forgetting(preset(name).forget)


@pytest.mark.parametrize("name", NAMES)
def test_published_presets_have_constant_rates_snapshots_of_5000_and_none_of_our_options(name: str):
    loaded = preset(name)
    assert [linear_decay(step, 50_000, loaded.decay_share) for step in (0, 25_000, 49_999)] == [1, 1, 1]
    assert loaded.monitor.every == 5000
    assert (loaded.share_generated, loaded.accumulate, loaded.compile) == (False, 1, False)
    assert (loaded.classifier, loaded.class_names) == (None, ())


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_one_stage_starts_at_the_teacher(name: str):
    assert preset(name).init_from is None


@pytest.mark.parametrize("name", NAMES)
def test_published_presets_draw_at_timestep_440_and_train_from_38_to_711(name: str):
    loaded, ddpm = preset(name), DiscreteDenoiser(nn.Identity(), DDPMScheduler())
    levels = (loaded.sigma_min, loaded.sigma_init, loaded.sigma_max)
    assert [ddpm.nearest_timestep(sigma) for sigma in levels] == [38, 440, 711]


@pytest.mark.parametrize("step", ["fake-score", "generator"])
@pytest.mark.parametrize("name", NAMES)
def test_published_presets_weigh_retained_rows_1_and_forget_rows_a_hundredth_in_both_steps(name: str, step: str):
    labels, half = ten_labels(name), HALVES[name]
    rows = draw_rows(preset(name), labels, (1, 1, 1), step, 0)
    asked = list(zip(rows.labels.tolist(), rows.targets.tolist(), strict=True))
    assert labels.forget == FORGETTING[name]
    assert {label for label, _ in asked[:half]} == set(range(10)) - set(FORGETTING[name])
    assert all(label == target for label, target in asked[:half])
    assert asked[half:] == [pair for pair in FORGETTING[name].items() for _ in range(half)]
    weights = [1 / half] * half + [0.01 / half] * (half if FORGETTING[name] else 0)
    torch.testing.assert_close(rows.weights, torch.tensor(weights))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_iteration_of_a_published_preset_has_its_rates_and_its_loss(name: str):
    few = preset(name).model_copy(update={"retained_rows": 2, "forget_rows": 1})
    loop = SfdLoop(few, ten_labels(name), tiny_denoiser("epsilon", classes=10))
    _, (moved,) = loop.iterate(49_999)
    rates = [adam.param_groups[0]["lr"] for adam in (loop.fake_score_adam, loop.generator_adam)]
    assert rates == pytest.approx([FAKE_SCORE_RATE[name], 1e-5], rel=1e-12)
    assert moved.x_phi is not None
    torch.testing.assert_close(moved.loss, sid_loss(moved.x, moved.x_phi, moved.x_psi, alpha=1.2))
    assert (loop.ema.decay, loop.ema.ramp) == (0.9999, False)


def differing(one: str, other: str) -> set[str]:
    first, second = preset(one).resolved(), preset(other).resolved()
    return {key for key in first if first[key] != second[key]}


def test_the_two_stages_differ_in_what_is_forgotten_and_where_they_start_alone():
    """One teacher above all: the official code took the first stage's fake score for it."""
    assert differing("cifar10-distil", "cifar10-two-stage") == {"forget", "forget_rows", "forget_weight", "init_from"}
    assert preset("cifar10-two-stage").teacher != preset("cifar10-two-stage").init_from


def test_one_stage_and_two_and_both_data_sets_differ_in_nothing_else():
    assert differing("cifar10", "cifar10-two-stage") == {"fake_score_rate", "init_from"}
    assert differing("cifar10", "stl10") == {"fake_score_rate", "retained_rows", "forget_rows", "teacher"}
