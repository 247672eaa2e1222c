"""The loop against a closed form: Gaussian classes, with a fake score that has to be learned.

Where it must end is known: the forget class at its override, the retained class at the teacher, the fake score at
the generator. ``test_losses`` has the other half, the losses alone with an exact fake score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sfd_deploy.labels import Labels
from sfd_deploy.models.denoiser import DiscreteDenoiser, EdmDenoiser
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.gaps import gap_figures
from sfd_deploy.training.loop import Pass, SfdLoop, Start
from sfd_deploy.training.losses import fake_score_loss
from sfd_deploy.training.rows import Rows
from tests.training.test_losses import (
    EPS,
    FORGET,
    MU,
    OVERRIDE,
    RETAINED,
    SCALED,
    TAU,
    Levels,
    Z,
    ddpm_levels,
    denoise,
    descend,
    edm_levels,
    gradients,
    toy_loss,
)

LABELS = Labels(class_names=("forget", "override", "retained"), forget={FORGET: OVERRIDE})
Law = tuple[float, float]  # mean and standard deviation


class Laws(nn.Module):
    """One N(mean, std^2) a label, of images of ``size`` values."""

    def __init__(self, means: tuple[float, ...], stds: tuple[float, ...], size: int) -> None:
        super().__init__()
        self.config = {"sample_size": (1, size), "in_channels": 1}
        self.mean = nn.Parameter(torch.tensor(means, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(stds, dtype=torch.float64).log())

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (values[labels].reshape(-1, 1, 1, 1) for values in (self.mean, self.log_std.exp()))
        return mean, std

    def law(self, label: int) -> Law:
        return self.mean[label].item(), self.log_std[label].exp().item()


class Exact(DiscreteDenoiser):
    """Teacher or fake score: the denoiser of its laws."""

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        mean, std = self.unet(labels)
        return denoise(Levels(torch.ones_like(sigma), sigma), noisy, mean, std)


class Draws(DiscreteDenoiser):
    """Generator: what it is asked is ``sigma * z``, and mean + std z is what it draws."""

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        mean, std = self.unet(labels)
        return mean + std * noisy / sigma.reshape(-1, 1, 1, 1)


class AtItsPosition(Exact):
    """Its rows say their noise level themselves."""

    def training_sigma(self, u: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        return u


def toy_loop(
    start: tuple[tuple[float, ...], tuple[float, ...]], size: int, kind: type[Exact] = Exact, **changes: object
) -> SfdLoop:
    """Teacher and fake score at (MU, TAU), the generator at ``start``. Unclipped: a clipped mean is no mean."""
    values = {"teacher": "unused", "iterations": 1, "forget_weight": 0.01, "clip_value": 1e9, "precision": "fp32"}
    config = TrainConfig.from_mapping(values | changes, "test")
    teacher, generator = kind(Laws(MU, TAU, size), DDPMScheduler()), Draws(Laws(*start, size), DDPMScheduler())
    return SfdLoop(config, LABELS, teacher, Start(generator=generator))


@pytest.mark.parametrize(("alpha", "value", "gm", "gs"), SCALED)
def test_the_generators_step_has_the_pinned_loss_and_gradients(monkeypatch, alpha, value, gm, gs):
    """With psi exact at (3, 0.5), and all four points of (z, eps) at three noise levels in one batch.

    Of images of two values alike: a row's loss is their sum, its omega their mean.
    """
    sigma = edm_levels().b.expand(3, 4).reshape(-1)
    latents, noise = (points.repeat(3).reshape(-1, 1, 1, 1).expand(-1, 1, 1, 2) for points in (Z, EPS))
    labels, ones = torch.full((12,), FORGET), torch.ones(12, dtype=torch.float64)
    rows = Rows(labels, torch.full_like(labels, OVERRIDE), ones / 12, latents, sigma, noise)
    monkeypatch.setattr("sfd_deploy.training.loop.draw_rows", lambda *_: rows)
    loop = toy_loop((MU, TAU), 2, AtItsPosition, alpha=alpha)
    laws = loop.generator.denoiser.unet
    (done,) = loop.generator_step(0)
    found = (done.loss.mean().item(), laws.mean.grad[FORGET].item(), laws.log_std.grad[FORGET].item() / TAU[FORGET])
    assert found == pytest.approx((2 * value, 2 * gm, 2 * gs), abs=4e-9)
    assert laws.mean.grad[[OVERRIDE, RETAINED]].tolist() == [0, 0]


@dataclass(frozen=True)
class Learned:
    """A finished training, the way of the forget class's mean to there, and what the last steps computed."""

    loop: SfdLoop
    way: list[float]
    fitted: Pass
    moved: Pass

    @property
    def generator(self) -> Laws:
        return self.loop.generator.denoiser.unet

    @property
    def fake_score(self) -> Laws:
        return self.loop.fake_score.unet


# The start is what one shot through the teachers draws, but for the forget class: that is drawn well.
ONE_SHOT = ((3.0, -0.4, -0.3), (0.5, 0.407, 0.602))


@pytest.fixture(
    scope="module", params=[pytest.param(0.5, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), 1.2]
)
def learned(request: pytest.FixtureRequest) -> Learned:
    """6,000 iterations on 32 values, psi three times as fast as theta."""
    loop = toy_loop(
        ONE_SHOT, 32, alpha=request.param, iterations=6000, retained_rows=64, forget_rows=64, fake_score_rate=3e-3,
        generator_rate=1e-3,
    )  # fmt: skip
    way = []
    for step in range(loop.config.iterations):
        (fitted,), (moved,) = loop.iterate(step)
        way.append(loop.generator.denoiser.unet.mean[FORGET].item())
    return Learned(loop, way, fitted, moved)


@pytest.mark.parametrize(
    ("label", "law"), [(FORGET, (-1.0, 1.0)), (OVERRIDE, (-1.0, 1.0)), (RETAINED, (0.5, 2.0))]
)  # fmt: skip
def test_with_a_learned_fake_score_forget_becomes_override_and_the_rest_the_teacher(
    learned: Learned, label: int, law: Law
):
    assert learned.generator.law(label) == pytest.approx(law, abs=0.06)
    assert learned.fake_score.law(label) == pytest.approx(learned.generator.law(label), abs=0.05)


def test_a_fake_score_three_times_as_fast_takes_the_forget_class_to_its_override_and_not_past_it(learned: Learned):
    assert learned.way[0] == pytest.approx(3.0, abs=0.01)
    assert min(learned.way) > -1.06


def test_a_learned_fake_score_is_at_its_floor_and_not_stale(learned: Learned):
    """The floor is that of the override class's spread, for it is this that the forget class is drawn with now."""
    fitted, done = learned.fitted, learned.moved
    assert fitted.loss[fitted.rows.forgotten].mean().item() / 32 == pytest.approx(0.352219975, rel=0.15)
    figures = gap_figures(done.rows.labels, done.rows.forgotten, done.sigma, done.x, done.x_phi, done.x_psi)
    assert abs(figures["staleness/forget-0"]) < 0.01
    assert figures["gap/forget-0"] < 0.01


def floor_of(std: float) -> float:
    """The fake score's loss per value where it is exact, over every timestep that training draws."""
    denoiser = DiscreteDenoiser(nn.Identity(), DDPMScheduler())
    middles = (torch.arange(674, dtype=torch.float64) + 0.5) / 674
    sigma = denoiser.training_sigma(middles, 0.137, 13.0)
    return fit_error(std, sigma, denoiser.fit_weight)


def fit_error(std: float, sigma: Tensor, fit_weight: Callable[[Tensor], Tensor]) -> float:
    levels = Levels(torch.ones_like(sigma)[:, None], sigma[:, None])
    x = (3.0 + std * Z).expand(len(sigma), 4)
    x_psi = denoise(levels, x + levels.b * EPS, 3.0, std)
    weight = fit_weight(sigma)[:, None].expand(-1, 4).reshape(-1)
    return fake_score_loss(x.reshape(-1, 1), x_psi.reshape(-1, 1), weight).mean().item()


@pytest.mark.parametrize(("std", "floor"), [(0.5, 0.201702263), (1.0, 0.352219975), (2.0, 0.528186187)])
def test_an_exact_fake_score_of_a_ddpm_schedule_has_the_pinned_floor(std: float, floor: float):
    assert floor_of(std) == pytest.approx(floor, abs=2e-7)


def test_an_exact_fake_score_of_edm_has_the_floor_one_where_its_spread_is_sigma_data():
    weight = EdmDenoiser(nn.Identity(), 0.5).fit_weight
    assert fit_error(0.5, edm_levels().b[:, 0], weight) == pytest.approx(1.0, abs=1e-9)


def first(levels: Levels) -> Levels:
    return Levels(levels.a[:1], levels.b[:1])


FLIPS = [
    ("mean", ddpm_levels(), 59.5, 0.1),
    ("variance", ddpm_levels(), 101.4, 0.1),
    ("mean", first(ddpm_levels()), 3.5, 0.05),
    ("variance", first(ddpm_levels()), 6.1, 0.05),
]


@pytest.mark.parametrize(("force", "levels", "variance", "rounding"), FLIPS)
def test_alpha_above_one_drives_an_over_dispersed_generator_away_from_where_its_force_turns(
    force: str, levels: Levels, variance: float, rounding: float
):
    """alpha = 1.2 and tau = 1: all noise levels of training together, and the lowest of them alone."""
    assert is_restoring(force, levels, 1.2, variance - rounding)
    assert not is_restoring(force, levels, 1.2, variance + rounding)


@pytest.mark.parametrize("force", ["mean", "variance"])
def test_alpha_one_has_no_such_turn(force: str):
    assert all(is_restoring(force, ddpm_levels(), 1.0, variance) for variance in (50.0, 1e3, 1e4))


def is_restoring(force: str, levels: Levels, alpha: float, variance: float) -> bool:
    """Whether descent goes towards the override, mean -1 and variance 1, from mean 0 and ``variance``."""
    _, by_mean, by_std = gradients(levels, OVERRIDE, alpha, m=0.0, s=variance**0.5)
    return (by_mean if force == "mean" else by_std) > 0


@pytest.mark.parametrize(("std", "converges"), [(9.9, True), (10.3, False)])
def test_descent_comes_back_from_inside_the_basin_alone(std: float, converges: bool):
    levels = ddpm_levels()
    found = descend(1.2, lambda m, s: toy_loss(levels, m, s, OVERRIDE, 1.2), -1.0, std, 400)
    assert (found[1] == pytest.approx(1.0, abs=1e-6)) is converges
    assert (found[1] > 1e6) is not converges
