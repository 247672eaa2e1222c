"""The SFD objective against a closed form: Gaussian classes, where every denoiser is known exactly.

Classes are N(mu, tau^2): forget (3, 0.5), override (-1, 1), retained (0.5, 2); the generator draws
x = m + s z. The loss is quadratic in (z, eps), so the four points z, eps = +-1 give its exact expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sfd_deploy.training.losses import diff_instruct_loss, fake_score_loss, gap_energy, score_gap_loss, sid_loss

MU, TAU = (3.0, -1.0, 0.5), (0.5, 1.0, 2.0)
FORGET, OVERRIDE, RETAINED = 0, 1, 2
Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Levels:
    """Noise levels x_t = a x + b eps, each (T, 1)."""

    a: Tensor
    b: Tensor


def ddpm_levels(step: int = 1) -> Levels:
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[38:712:step, None]
    return Levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def edm_levels() -> Levels:
    sigma = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)[:, None]
    return Levels(torch.ones_like(sigma), sigma)


Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
EPS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def denoise(levels: Levels, x_t: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """E[x | x_t] for x ~ N(mean, std^2)."""
    gain = levels.a * std**2 / (levels.a**2 * std**2 + levels.b**2)
    return mean + gain * (x_t - levels.a * mean)


def toy_loss(
    levels: Levels, m: Tensor, s: Tensor, target: int, alpha: float, loss: Loss = score_gap_loss,
    psi: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """Expected loss of a generator (m, s) towards class ``target``; ``psi`` is exact unless given."""
    x = (m + s * Z).expand(len(levels.a), 4)
    x_t = levels.a * x + levels.b * EPS
    x_phi = denoise(levels, x_t, MU[target], TAU[target])
    mean, std = psi or (m.detach(), s.detach())
    x_psi = denoise(levels, x_t, mean, std)
    rows = [part.reshape(-1, 1) for part in (x, x_phi, x_psi)]
    return loss(rows[0], rows[1], rows[2], alpha).mean()


def gradients(*arguments: object, m: float = 3.0, s: float = 0.5, **named: object) -> tuple[float, float, float]:
    mean = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    value = toy_loss(arguments[0], mean, std, *arguments[1:], **named)  # type: ignore[arg-type]
    gm, gs = torch.autograd.grad(value, (mean, std))
    return value.item(), gm.item(), gs.item()


def fisher(levels: Levels, m: float, s: float, mu: float, tau: float) -> float:
    """F in closed form."""
    u, v = levels.a**2 * tau**2 + levels.b**2, levels.a**2 * s**2 + levels.b**2
    mean_part = (levels.b**2 / u) ** 2 * (mu - m) ** 2
    spread_part = (levels.a * levels.b**2 * (tau**2 - s**2) / (u * v)) ** 2 * v
    return (mean_part + spread_part).mean().item()


PINNED = [
    ("ddpm", 0.5, 4.242162838, 2.107834777, -0.088665200),
    ("ddpm", 1.0, 0.0, 2.390429817, -0.106681640),
    ("ddpm", 1.2, -1.696865135, 2.503467834, -0.113888215),
    ("edm", 0.5, 3.062960806, 1.519031142, -0.085032350),
    ("edm", 1.0, 0.0, 1.784615385, -0.103668639),
    ("edm", 1.2, -1.225184323, 1.890849082, -0.111123155),
]


@pytest.mark.parametrize(("name", "alpha", "value", "gm", "gs"), PINNED)
def test_unscaled_loss_and_gradients_equal_the_pinned_oracle(name, alpha, value, gm, gs):
    levels = {"ddpm": ddpm_levels(), "edm": edm_levels()}[name]
    assert gradients(levels, OVERRIDE, alpha) == pytest.approx((value, gm, gs), abs=2e-9)


STALE = [
    (0.5, -2.913907718, 2.639825976, -0.141864320),
    (1.0, -8.173030047, 3.030519655, -0.170690623),
    (1.2, -10.276678979, 3.186797126, -0.182221145),
]


@pytest.mark.parametrize(("alpha", "value", "gm", "gs"), STALE)
def test_a_stale_fake_score_gives_the_pinned_gradients(alpha, value, gm, gs):
    found = gradients(ddpm_levels(), OVERRIDE, alpha, m=0.0, s=0.8, psi=(3.0, 0.5))
    assert found == pytest.approx((value, gm, gs), abs=2e-8)


SCALED = [
    (0.5, 0.822031252, 0.724716128, -0.213714498),
    (1.0, -0.310839457, 1.019169181, -0.299046703),
    (1.2, -0.763987741, 1.136950402, -0.333179584),
]


@pytest.mark.parametrize(("alpha", "value", "gm", "gs"), SCALED)
def test_sid_loss_with_per_sample_omega_equals_the_pinned_oracle(alpha, value, gm, gs):
    assert gradients(edm_levels(), OVERRIDE, alpha, loss=sid_loss) == pytest.approx((value, gm, gs), abs=2e-9)


def test_half_alpha_is_exactly_half_the_gradient_of_the_fisher_divergence():
    levels, h = ddpm_levels(), 1e-5
    _, gm, gs = gradients(levels, OVERRIDE, 0.5, m=1.3, s=0.7)
    by_mean = (fisher(levels, 1.3 + h, 0.7, -1, 1) - fisher(levels, 1.3 - h, 0.7, -1, 1)) / (2 * h)
    by_std = (fisher(levels, 1.3, 0.7 + h, -1, 1) - fisher(levels, 1.3, 0.7 - h, -1, 1)) / (2 * h)
    assert (gm, gs) == pytest.approx((by_mean / 2, by_std / 2), rel=1e-7)


def test_gap_energy_estimates_the_fisher_divergence():
    levels = ddpm_levels()
    x_t = levels.a * (3.0 + 0.5 * Z) + levels.b * EPS
    energy = gap_energy(denoise(levels, x_t, -1.0, 1.0).reshape(-1, 1), denoise(levels, x_t, 3.0, 0.5).reshape(-1, 1))
    assert energy.mean().item() == pytest.approx(8.484325677, abs=1e-8)


def descend(
    alpha: float, gradient: Callable[[Tensor, Tensor], Tensor], m: float, s: float, updates: int
) -> tuple[float, float]:
    """Plain gradient descent on (m, ln s), step 0.5."""
    mean, log_s = torch.tensor(m, dtype=torch.float64), torch.tensor(math.log(s), dtype=torch.float64)
    for _ in range(updates):
        mean.requires_grad_(True)
        log_s.requires_grad_(True)
        gm, gl = torch.autograd.grad(gradient(mean, log_s.exp()), (mean, log_s))
        mean, log_s = (mean - 0.5 * gm).detach(), (log_s - 0.5 * gl).detach()
        if not (abs(mean) < 1e6 and abs(log_s) < 50):
            break
    return mean.item(), log_s.exp().item()


COARSE = ddpm_levels(step=23)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize(("target", "m", "s"), [(OVERRIDE, 3.0, 0.5), (OVERRIDE, -0.4, 0.407), (RETAINED, -0.3, 0.602)])
def test_descent_ends_at_the_target_class(alpha, target, m, s):
    found = descend(alpha, lambda mean, std: toy_loss(COARSE, mean, std, target, alpha), m, s, 101)
    assert found == pytest.approx((MU[target], TAU[target]), abs=1e-3)


@pytest.mark.parametrize(("alpha", "mean"), [(0.5, -0.856), (1.0, -0.908), (1.2, -0.923)])
def test_larger_alpha_forgets_faster(alpha, mean):
    found = descend(alpha, lambda m, s: toy_loss(COARSE, m, s, OVERRIDE, alpha), 3.0, 0.5, 11)
    assert found[0] == pytest.approx(mean, abs=1e-3)


def variant(phi: int, psi: int | None, detach: str = "", sign: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A wrong loss: phi asked for class ``phi``, psi for ``psi`` (None: exact), parts of the path detached."""

    def loss(m: Tensor, s: Tensor) -> Tensor:
        x = (m + s * Z).expand(len(COARSE.a), 4)
        x_t = COARSE.a * (x.detach() if detach == "x_t" else x) + COARSE.b * EPS
        x = x.detach() if detach == "x" else x
        exact = (m.detach(), s.detach())
        own = exact if psi is None else (MU[psi], TAU[psi])
        phi_law = exact if phi < 0 else (MU[phi], TAU[phi])
        rows = [part.reshape(-1, 1) for part in (x, denoise(COARSE, x_t, *phi_law), denoise(COARSE, x_t, *own))]
        return sign * score_gap_loss(rows[0], rows[1], rows[2], 1.2).mean()

    return loss


def test_negative_control_flipped_sign_runs_away_from_the_override():
    assert descend(1.2, variant(OVERRIDE, None, sign=-1.0), 3.0, 0.5, 400)[0] > 5


def test_negative_control_teacher_asked_for_the_forget_label_stays_there():
    assert descend(1.2, variant(FORGET, None), 3.0, 0.5, 400) == pytest.approx((3.0, 0.5), abs=1e-3)


def test_negative_control_swapped_labels_end_elsewhere():
    mean, std = descend(1.2, variant(-1, OVERRIDE), 3.0, 0.5, 400)
    assert abs(mean + 1) > 5
    assert std < 0.5


def test_negative_control_fake_score_asked_for_the_override_label_diverges():
    mean, std = descend(1.2, variant(OVERRIDE, OVERRIDE), 3.0, 0.5, 400)
    assert abs(mean + 1) > 1 or abs(std - 1) > 0.5


def test_negative_control_gradient_through_the_noised_image_only_diverges():
    mean, std = descend(1.2, variant(OVERRIDE, None, detach="x"), 3.0, 0.5, 400)
    assert not (abs(mean + 1) < 1 and abs(std - 1) < 0.5)


def test_gradient_through_the_image_only_has_the_diff_instruct_value_not_the_pinned_one():
    m = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.5, dtype=torch.float64)
    gm = torch.autograd.grad(variant(OVERRIDE, None, detach="x_t")(m, s), m)[0].item()
    u = COARSE.a**2 + COARSE.b**2
    assert gm == pytest.approx((4 * (COARSE.b**2 / u).mean()).item(), rel=1e-9)
    assert abs(gm - gradients(COARSE, OVERRIDE, 1.2)[1]) > 0.05


def test_diff_instruct_moves_each_image_by_minus_the_score_gap_over_omega_and_sends_nothing_through_the_scores():
    draws = torch.Generator().manual_seed(1)
    x, x_phi, x_psi = torch.randn(3, 4, 2, 3, 3, generator=draws, dtype=torch.float64).requires_grad_().unbind()
    loss = diff_instruct_loss(x, x_phi, x_psi)
    by_image, *by_scores = torch.autograd.grad(loss.sum(), (x, x_phi, x_psi), allow_unused=True)
    omega = (x_phi - x).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(by_image, -(x_phi - x_psi) / omega)
    assert by_scores == [None, None]
    torch.testing.assert_close(loss, sid_loss(x, x_phi, x_psi, alpha=1.0))  # whose value it is, one per image


def test_diff_instruct_ends_at_the_target_class():
    def loss(m: Tensor, s: Tensor) -> Tensor:
        return toy_loss(COARSE, m, s, OVERRIDE, 0.0, loss=lambda x, phi, psi, _: diff_instruct_loss(x, phi, psi))

    assert descend(0.0, loss, 3.0, 0.5, 400) == pytest.approx((-1.0, 1.0), abs=0.02)


@pytest.mark.parametrize(("is_linear", "loss"), [(True, diff_instruct_loss), (False, sid_loss)])
def test_errors_of_the_fake_score_that_cancel_leave_no_trace_in_diff_instruct_but_do_in_sid(is_linear, loss):
    """psi's gain on x_t is 0.8, or 0.3 more and less by turns."""

    def pull(offset: float) -> Tensor:
        x = (0.3 + 0.5 * Z).requires_grad_()
        x_t = x + EPS
        x_psi = 0.8 * x_t + offset * x_t
        (found,) = torch.autograd.grad(loss(x[:, None], (0.5 * x_t)[:, None], x_psi[:, None]).sum(), x)
        return found

    averaged = (pull(0.3) + pull(-0.3)) / 2
    assert torch.allclose(averaged, pull(0.0), rtol=0, atol=1e-12) is is_linear


@pytest.mark.parametrize(("variance", "is_restoring"), [(0.25, True), (9.9, True), (100.0, True), (103.0, False)])
def test_alpha_above_one_has_a_basin(variance, is_restoring):
    """alpha = 1.2, tau = 1: the force on an over-dispersed generator's variance turns wrong at s^2 = 101.4."""
    std = variance**0.5
    _, _, slope = gradients(ddpm_levels(), OVERRIDE, 1.2, m=-1.0, s=std)
    assert (slope * (variance - 1) > 0) is is_restoring


SHARED = [
    ((0.01, 0.5, 0.5), (1.403804, 1.462843, 1.488225)),
    ((1.0, 0.5, 0.5), (1.186731, 1.223485, 1.239017)),
    ((0.01, 0.0, 1.0), (1.985820, 1.989070, 1.990374)),
]


@pytest.mark.parametrize(("weights", "expected"), SHARED)
def test_row_weights_set_the_compromise_of_a_shared_scale(weights, expected):
    levels = ddpm_levels()
    for alpha, scale in zip((0.5, 1.0, 1.2), expected, strict=True):
        s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        means = [torch.tensor(m, dtype=torch.float64) for m in (-1.0, -1.0, 0.5)]
        targets = (OVERRIDE, OVERRIDE, RETAINED)
        total = sum(w * toy_loss(levels, m, s, t, alpha) for w, m, t in zip(weights, means, targets, strict=True))
        slope = torch.autograd.grad(total, s)[0].item()
        beside = torch.tensor(scale * 1.01, dtype=torch.float64, requires_grad=True)
        total = sum(w * toy_loss(levels, m, beside, t, alpha) for w, m, t in zip(weights, means, targets, strict=True))
        assert abs(slope) < 1e-3 * abs(torch.autograd.grad(total, beside)[0].item())


def test_fake_score_loss_is_one_per_value_at_its_floor_when_spread_equals_sigma_data():
    levels = edm_levels()
    x = (3.0 + 0.5 * Z).expand(3, 4)
    x_psi = denoise(levels, x + levels.b * EPS, 3.0, 0.5)
    sigma = levels.b.expand(3, 4).reshape(-1)
    loss = fake_score_loss(x.reshape(-1, 1), x_psi.reshape(-1, 1), (sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    assert loss.mean().item() == pytest.approx(1.0, abs=1e-9)


def test_fake_score_loss_does_not_pull_the_generator():
    x = torch.zeros(2, 3, requires_grad=True)
    x_psi = torch.ones(2, 3, requires_grad=True)
    fake_score_loss(x, x_psi, torch.ones(2)).sum().backward()
    assert x.grad is None
    assert x_psi.grad is not None


def test_where_teacher_and_fake_score_agree_the_gradient_is_exactly_zero():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prediction = (0.3 * x).detach()
    sid_loss(x, prediction, prediction.clone()).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_omega_is_floored_where_the_teacher_already_agrees():
    x = torch.zeros(1, 4)
    assert sid_loss(x, x, x + 1, alpha=1.0).item() == pytest.approx(-4 / 1e-5)
