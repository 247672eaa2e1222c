"""Guidance: who is guided away from what, in how many calls, and that a guided fake score is a fitted denoiser."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sfd_deploy.models.denoiser import Coefficients, Denoiser, DiscreteDenoiser
from sfd_deploy.models.network import NetworkConfig
from sfd_deploy.prompts import Prompts
from sfd_deploy.training.config import LoopConfig
from sfd_deploy.training.guidance import UNGUIDED, Guidance, guided
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.losses import fake_score_loss
from sfd_deploy.training.rows import Rows, draw_rows
from sfd_deploy.training.streams import stream

EMPTY, RETAINED, SUBJECT, FORGOTTEN, NEGATIVE = range(5)
# The subject is retained too: the same prompt on a retained row has no negative prompt.
PROMPTS = Prompts(
    texts=("", "a shoe", "a bag", "a red bag", "red, crimson"), retained=(RETAINED, SUBJECT),
    forget={FORGOTTEN: SUBJECT}, negatives={FORGOTTEN: NEGATIVE},
)  # fmt: skip
AWAY = tuple(PROMPTS.negatives.get(prompt, EMPTY) for prompt in range(PROMPTS.count))
MEANS, STD, SIGMA_INIT = (0.0, 1.0, -1.0, 1.5, 0.0), 0.5, 2.5
LEVELS = (SIGMA_INIT, 0.5, 1.0, 4.0)  # the generator's one level, then those of training


class AffineDenoiser(Denoiser):
    """``a + b * noisy`` with its own a and b at each of four noise levels and each condition; no network.

    It starts as the exact denoiser of N(MEANS[condition], STD^2) for every value of an image of 32.
    """

    sigma_range = (0.5, 4.0)

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.unet.config = {"sample_size": 4, "in_channels": 2}
        levels, means = torch.tensor(LEVELS, dtype=torch.float64), torch.tensor(MEANS, dtype=torch.float64)
        gain = STD**2 / (STD**2 + levels**2)
        self.register_buffer("levels", levels)
        self.a = nn.Parameter((1 - gain)[:, None] * means)
        self.b = nn.Parameter(gain[:, None].repeat(1, len(MEANS)))

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        level = (sigma[:, None] - self.levels).abs().argmin(1)
        a, b = (values[level, labels].reshape(-1, 1, 1, 1) for values in (self.a, self.b))
        return a + b * noisy

    def fit_weight(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal()

    def training_sigma(self, u: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        return self.levels[1:][(u * 3).long()]

    def coefficients(self, sigma: Tensor) -> Coefficients:
        raise NotImplementedError

    timestep = scheduler = one_step_scheduler = coefficients  # type: ignore[assignment]


def toy_loop(guidance: Guidance, **changes: object) -> SfdLoop:
    values = {"teacher": "unused", "iterations": 1000, "retained_rows": 32, "forget_rows": 32, "forget_weight": 1.0,
              "alpha": 1.0, "precision": "fp32", "fake_score_rate": 4e-2, "generator_rate": 8e-3,
              "decay_share": 0.7} | changes  # fmt: skip
    return SfdLoop(LoopConfig.from_mapping(values, "test"), PROMPTS, AffineDenoiser(), guidance=guidance)


def law_of(loop: SfdLoop, condition: int) -> tuple[float, float]:
    """Mean and standard deviation of what the generator draws, read off its weights."""
    net = loop.generator.denoiser
    return net.a[0, condition].item(), abs(net.b[0, condition].item()) * SIGMA_INIT


def train(guidance: Guidance) -> SfdLoop:
    loop = toy_loop(guidance)
    for step in range(loop.config.iterations):
        loop.iterate(step)
    return loop


def test_with_one_scale_for_psi_the_generator_becomes_the_guided_teacher():
    """Guided by kappa, a teacher of equal spreads is the denoiser of N(mu_u + kappa (mu_c - mu_u), tau^2)."""
    kappa = 2.0
    loop = train(Guidance(kappa, kappa, kappa, dropout=0.2))
    for condition, asked in ((RETAINED, RETAINED), (SUBJECT, SUBJECT), (FORGOTTEN, SUBJECT)):
        assert law_of(loop, condition) == pytest.approx((kappa * MEANS[asked], STD), abs=0.06)
    # Nothing trains the generator without a prompt: it stays the teacher's single step.
    assert law_of(loop, EMPTY) == pytest.approx((0, STD**2 * SIGMA_INIT / (STD**2 + SIGMA_INIT**2)), abs=1e-9)


def test_negative_control_psi_fitted_unguided_and_asked_guided_misses_the_guided_teacher():
    loop = train(Guidance(1.0, 2.0, 2.0, dropout=0.2))
    assert abs(law_of(loop, RETAINED)[0] - 2.0) > 0.5


Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
EPS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("kappa", [1.0, 1.5, 4.5])
def test_the_guided_fake_score_fitted_at_its_own_scale_is_the_exact_denoiser_of_what_is_drawn(kappa: float):
    """A quadratic loss, so four points are its expectation and one Newton step its minimum; float64."""
    sigma, laws = 1.3, {EMPTY: (0.4, 0.3), FORGOTTEN: (3.0, 0.5)}  # what the generator draws: mean, standard deviation
    asked = torch.tensor([EMPTY] * 4 + [FORGOTTEN] * 4)
    x = torch.cat([mean + std * Z for mean, std in laws.values()]).reshape(-1, 1, 1, 1)
    noisy = x + sigma * torch.cat([EPS, EPS]).reshape(-1, 1, 1, 1)
    rows = Rows(asked, torch.where(asked == FORGOTTEN, SUBJECT, asked), *[torch.zeros(8)] * 4)
    levels = torch.full((8,), sigma, dtype=torch.float64)
    guidance = Guidance(kappa, kappa, kappa, dropout=0.1)

    def psi(weights: Tensor, *, fitting: bool) -> Tensor:
        a, b = weights.reshape(2, 5)
        shape = (-1, 1, 1, 1)
        predict = lambda y, _, c: a[c].reshape(shape) + b[c].reshape(shape) * y
        return guidance.ask_fake_score(predict, noisy, levels, rows, fitting=fitting)

    def loss(weights: Tensor) -> Tensor:
        return fake_score_loss(x, psi(weights, fitting=True), levels.square().reciprocal()).sum()

    start = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(loss(start), start)[0]
    curvature = torch.autograd.functional.hessian(loss, start)
    fitted = -torch.linalg.pinv(curvature, hermitian=True) @ slope
    exact = [mean + std**2 / (std**2 + sigma**2) * (noisy[4 * i : 4 * i + 4] - mean)
             for i, (mean, std) in enumerate(laws.values())]  # fmt: skip
    assert torch.allclose(psi(fitted, fitting=False), torch.cat(exact), atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guiding_clean_predictions_is_guiding_the_networks_output(prediction_type: str):
    torch.manual_seed(0)
    unet = NetworkConfig(image_size=8, channels=1, block_channels=(8,), norm_groups=4).build(3).eval().double()
    denoiser = DiscreteDenoiser(unet, DDPMScheduler(prediction_type=prediction_type)).double()
    sigma = denoiser.training_sigma(torch.tensor([0.2, 0.9], dtype=torch.float64), 0.137, 13.0)
    noisy, asked = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    a = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
    b = sigma.reshape(-1, 1, 1, 1) * a
    with torch.no_grad():
        found = guided(denoiser, noisy, sigma, asked, torch.zeros_like(asked), 4.5)
        x_t, t = a * noisy, denoiser.timestep(sigma)
        out_u, out_c = (unet(x_t, t, class_labels=labels).sample for labels in (torch.zeros_like(asked), asked))
        out = out_u + 4.5 * (out_c - out_u)
    expected = (x_t - b * out) / a if prediction_type == "epsilon" else a * x_t - b * out
    assert torch.allclose(found, expected, atol=1e-10)


def watch_calls(loop: SfdLoop) -> dict[str, list[list[int]]]:
    """The conditions that each network was asked for, a list per call."""
    calls: dict[str, list[list[int]]] = defaultdict(list)
    networks = {"phi": loop.teacher, "psi": loop.fake_score, "theta": loop.generator.denoiser}
    for name, network in networks.items():
        network.register_forward_hook(lambda _m, given, _o, name=name: calls[name].append(given[2].tolist()))
    return calls


def test_guided_networks_are_called_once_on_both_halves_and_unguided_ones_plainly():
    loop = toy_loop(Guidance(1.5, 1.0, 4.5), retained_rows=3, forget_rows=2)
    calls = watch_calls(loop)
    loop.iterate(0)
    assert [len(asked) for asked in calls["psi"]] == [10, 5]  # kappa_1 1.5 in psi's step, kappa_2 1 in theta's
    assert [len(asked) for asked in calls["phi"]] == [10]
    assert [len(asked) for asked in calls["theta"]] == [5, 5]
    assert calls["phi"][0][:5] == [EMPTY] * 5


def test_prompts_are_dropped_in_psis_step_alone_before_the_generator_draws():
    loop = toy_loop(Guidance(3.0, 3.0, 3.0, dropout=0.5), retained_rows=4, forget_rows=4)
    calls = watch_calls(loop)
    for step in range(8):
        loop.iterate(step)
    drawn_for_psi, drawn_for_theta = calls["theta"][::2], calls["theta"][1::2]
    assert [asked[8:] for asked in calls["psi"][::2]] == drawn_for_psi  # psi is asked for what was drawn
    assert all(EMPTY in asked for asked in drawn_for_psi)
    assert not any(EMPTY in asked for asked in drawn_for_theta)
    assert not any(EMPTY in asked[8:] for asked in calls["phi"])


def test_a_tenth_of_the_prompts_is_dropped_retained_and_forget_alike():
    config = LoopConfig.from_mapping({"teacher": "t", "iterations": 1, "retained_rows": 5000, "forget_rows": 5000}, "t")
    rows = draw_rows(config, PROMPTS, (1,), "fake-score", 0)
    dropped = Guidance(2.0, 2.0, 2.0, dropout=0.1).drop(rows, stream(0, "dropout", 0))
    for part in (slice(0, 5000), slice(5000, 10000)):
        share = (dropped.labels[part] == EMPTY).double().mean().item()
        assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / 5000))
    assert torch.equal(dropped.labels == EMPTY, dropped.targets == EMPTY)
    for kept in ("weights", "latents", "position", "noise"):
        assert getattr(dropped, kept) is getattr(rows, kept)


def test_without_dropout_the_rows_are_the_very_same():
    rows = Rows(*[torch.zeros(2, dtype=torch.int64)] * 6)
    assert UNGUIDED.drop(rows, torch.Generator()) is rows


@pytest.mark.parametrize("fake_score_away", [False, True])
def test_forget_rows_are_guided_away_from_the_negative_prompt_and_retained_rows_from_the_empty_one(
    fake_score_away: bool,
):
    loop = toy_loop(Guidance(3.0, 3.0, 3.0, 0.0, EMPTY, AWAY, fake_score_away), retained_rows=6, forget_rows=2)
    calls = watch_calls(loop)
    (_,), (theta,) = loop.iterate(0)
    assert SUBJECT in theta.rows.labels[:6].tolist()  # a retained row asks the override prompt too
    retained = theta.rows.labels[:6].tolist()
    assert calls["phi"] == [[EMPTY] * 6 + [NEGATIVE] * 2 + retained + [SUBJECT] * 2]
    away = [NEGATIVE if fake_score_away else EMPTY] * 2
    assert calls["psi"][1] == [EMPTY] * 6 + away + retained + [FORGOTTEN] * 2


def test_a_dropped_forget_row_is_guided_away_from_the_empty_prompt():
    """Else psi("") would not be what is fitted to G("")."""
    guidance = Guidance(3.0, 3.0, 3.0, 1.0, EMPTY, AWAY, True)
    loop = toy_loop(guidance, retained_rows=2, forget_rows=2)
    calls = watch_calls(loop)
    loop.fake_score_step(0)
    assert calls["psi"] == [[EMPTY] * 8]
