"""Figures of a step on the closed-form toy: Gaussian classes, generator x = m + s z aimed at N(-1, 1).

The expectation over z and eps is exact on the four points z, eps = +-1. Pinned figures come from a
derivation of the Fisher divergence F by hand, not from this code.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sfd_deploy.training.gaps import BUCKETS, gap_figures, gradient_figures

Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
EPS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
EDM_F, DDPM_F = 6.125921613, 8.484325677  # generator at (3, 0.5), exact psi


def edm_levels() -> tuple[Tensor, Tensor]:
    sigma = torch.tensor([[0.25], [1.0], [4.0]], dtype=torch.float64)
    return torch.ones_like(sigma), sigma


def ddpm_levels() -> tuple[Tensor, Tensor]:
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[38:712, None]
    return kept.sqrt(), (1 - kept).sqrt()


def toy(levels: tuple[Tensor, Tensor], m: float, s: float, psi: tuple[float, float]) -> tuple[Tensor, ...]:
    """sigma (B,), x, x_phi, x_psi (B, 1, 1, 1)."""
    a, b = levels
    x = (m + s * Z).expand(len(a), 4)
    x_t = a * x + b * EPS

    def denoised(mean: float, std: float) -> Tensor:
        return mean + a * std**2 / (a**2 * std**2 + b**2) * (x_t - a * mean)

    sigma = (b / a).expand(len(a), 4).flatten()
    return sigma, *(rows.reshape(-1, 1, 1, 1) for rows in (x, denoised(-1.0, 1.0), denoised(*psi)))


def asked(sigma: Tensor, label: int) -> Tensor:
    return torch.full((len(sigma),), label)


@pytest.mark.parametrize(("levels", "fisher"), [(edm_levels(), EDM_F), (ddpm_levels(), DDPM_F)])
def test_at_an_exact_fake_score_the_gap_is_the_fisher_divergence_and_the_staleness_zero(levels, fisher):
    sigma, *rows = toy(levels, 3.0, 0.5, psi=(3.0, 0.5))
    found = gap_figures(asked(sigma, 0), asked(sigma, 0) == 0, sigma, *rows)
    assert found["gap/forget-0"] == pytest.approx(fisher, abs=1e-9)
    assert found["staleness/forget-0"] == pytest.approx(0, abs=1e-12)
    assert not any("retained" in name for name in found)


def test_a_stale_fake_score_shows_as_the_difference_of_the_two_estimates():
    """Pinned L at alpha = 1/2 and 1, generator (0, 0.8), psi N(3, 1/4): L1 = 2 (L_half - L_one), staleness L_one."""
    sigma, *rows = toy(ddpm_levels(), 0.0, 0.8, psi=(3.0, 0.5))
    found = gap_figures(asked(sigma, 0), asked(sigma, 0) == 0, sigma, *rows)
    assert found["gap/forget-0"] == pytest.approx(2 * (-2.913907718 + 8.173030047), abs=1e-8)
    assert found["staleness/forget-0"] == pytest.approx(-8.173030047, abs=1e-9)


def fisher_at(sigma: float) -> float:
    """F of (3, 1/2) against (-1, 1) at one noise level, a = 1."""
    u, v = 1 + sigma**2, 0.25 + sigma**2
    return (sigma**2 / u) ** 2 * 16 + (sigma**2 * 0.75 / (u * v)) ** 2 * v


def test_each_sigma_bucket_holds_the_divergence_of_its_own_noise_levels():
    sigma, *rows = toy(edm_levels(), 3.0, 0.5, psi=(3.0, 0.5))
    found = gap_figures(asked(sigma, 5), asked(sigma, 5) < 0, sigma, *rows)
    buckets = {name: value for name, value in found.items() if "sigma" in name}
    expected = {"sigma-0-0.25": 0.25, "sigma-0.5-1": 1.0, "sigma-2-4": 4.0}
    assert buckets == pytest.approx({f"gap/retained/{name}": fisher_at(at) for name, at in expected.items()})
    assert set(expected) < set(BUCKETS)
    assert found["gap/label-5"] == found["gap/retained"] == pytest.approx(EDM_F)


def test_parts_do_not_mix_and_every_noise_level_has_one_bucket():
    sigma, *rows = toy(edm_levels(), 3.0, 0.5, psi=(3.0, 0.5))
    twice = [torch.cat([part, part]) for part in rows]
    twice[1][len(sigma) :] = twice[2][len(sigma) :]  # label 4: the teacher agrees
    labels = torch.cat([asked(sigma, 0), asked(sigma, 4)])
    found = gap_figures(labels, labels == 0, torch.cat([sigma, sigma]), *twice)
    assert found["gap/forget-0"] == pytest.approx(EDM_F)
    assert (found["gap/retained"], found["gap/label-4"]) == (0, 0)
    assert not any("forget-2" in name or name == "gap/label-0" for name in found)
    assert BUCKETS[0] == "sigma-0-0.25"
    assert BUCKETS[-1] == "sigma-8-inf"


def test_spread_is_the_standard_deviation_within_a_label_and_outside_the_share_beyond_one():
    draws = np.random.default_rng(0)
    images = np.concatenate([draws.normal(mean, std, (4, 1, 6, 6)) for mean, std in ((5, 1), (-5, 2), (0, 3), (9, 9))])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6])
    x = torch.from_numpy(images)
    found = gap_figures(labels, labels == 2, torch.ones(16), x, x, x)
    by_label = [images[labels.numpy() == label].var(0, ddof=1).mean() for label in (0, 1, 2)]
    # Labels 3 to 6 are drawn once: no spread to see.
    assert found["spread/retained"] == pytest.approx(math.sqrt(np.mean(by_label[:2])))
    assert found["spread/forget-2"] == pytest.approx(math.sqrt(by_label[2]))
    assert found["outside/forget-2"] == pytest.approx((np.abs(images[8:12]) > 1).mean())


def test_where_labels_are_many_there_are_two_parts_and_the_spread_is_still_within_a_label():
    draws = np.random.default_rng(0)
    images = np.concatenate([draws.normal(mean, std, (4, 1, 6, 6)) for mean, std in ((5, 1), (-5, 2), (0, 3), (9, 4))])
    labels = torch.tensor([0, 1, 2, 3]).repeat_interleave(4)
    x = torch.from_numpy(images)
    found = gap_figures(labels, labels >= 2, torch.ones(16), x, x, x, by_label=False, bounded=False)
    variance = [images[labels.numpy() == label].var(0, ddof=1).mean() for label in range(4)]
    assert found["spread/retained"] == pytest.approx(math.sqrt(np.mean(variance[:2])))
    assert found["spread/forget"] == pytest.approx(math.sqrt(np.mean(variance[2:])))
    kinds = {"gap", "staleness", "spread"}  # what is not bounded, latents, has no outside
    parts = {f"{kind}/{part}" for kind in kinds for part in ("retained", "forget")}
    assert found.keys() == parts | {f"gap/{part}/sigma-0.5-1" for part in ("retained", "forget")}


def test_figures_take_the_batch_to_the_host_once(monkeypatch: pytest.MonkeyPatch):
    copies = []
    original = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or original(tensor))
    for name in ("item", "tolist", "numpy"):
        one = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor, one=one, name=name: copies.append(name) or one(tensor))
    sigma, *rows = toy(edm_levels(), 3.0, 0.5, psi=(3.0, 0.5))
    gap_figures(asked(sigma, 0), asked(sigma, 0) == 0, sigma, *rows)
    assert copies == [(8, len(sigma)), "numpy"]


def test_gradient_figures_are_those_of_all_tensors_before_the_clip():
    gradients = [torch.tensor([[0.5, -3.0], [1.0, 0.0]]), torch.tensor([2.0, -1.5, 0.1, 0.2])]
    found = gradient_figures("generator", gradients, clip_value=1.0)
    assert found == {"gradient/generator/maximum": 3.0, "gradient/generator/clipped-share": 3 / 8}
    with pytest.raises(ValueError, match="fake-score has no gradients"):
        gradient_figures("fake-score", [], 1.0)
