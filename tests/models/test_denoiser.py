from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sfd_deploy.errors import ModelError
from sfd_deploy.models.denoiser import (
    DiscreteDenoiser,
    EdmDenoiser,
    FlowDenoiser,
    edm_weight,
    karras_sigma,
)
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.sampler import SamplerConfig, heun
from sfd_deploy.runtime.pytorch import TeacherRuntime
from tests.models.exact import KINDS, MU, TAU, exact_clean, exact_denoiser

DISCRETE = ("epsilon", "v_prediction", "sample")
LEVELS = (0.0101, 0.137, 0.7, 2.5, 13.0, 100.0)  # none is a timestep's own


class Answer(nn.Module):
    """A network that gives one answer, and keeps what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, scaled: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.scaled, self.timestep = scaled, timestep
        return SimpleNamespace(sample=self.answer)


def images(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def label_zeros(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameterisation_of_one_denoiser_gives_its_clean_image_to_1e_12(kind):
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    noisy = images(len(sigma)) * (1 + sigma.reshape(-1, 1, 1, 1))
    clean = exact_denoiser(kind)(noisy, sigma, label_zeros(len(sigma)))
    assert clean.dtype == torch.float64
    assert (clean - exact_clean(noisy, sigma.reshape(-1, 1, 1, 1))).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_bf16_inputs_are_answered_in_float32_under_autocast(kind):
    sigma = torch.tensor([0.7, 2.5])
    noisy = images(2).float()
    with torch.autocast("cpu", torch.bfloat16):
        clean = exact_denoiser(kind)(noisy, sigma, label_zeros(2))
        low = exact_denoiser(kind)(noisy.bfloat16(), sigma, label_zeros(2))
    assert clean.dtype == low.dtype == torch.float32
    assert clean == pytest.approx(exact_clean(noisy, sigma.reshape(-1, 1, 1, 1)), abs=1e-5)


@pytest.mark.parametrize("scheduler_type", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("kind", DISCRETE)
def test_discrete_denoisers_agree_with_diffusers_own_clean_image(kind, scheduler_type):
    scheduler = scheduler_type(prediction_type=kind, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    answer = images(1)
    denoiser = DiscreteDenoiser(Answer(answer), scheduler)
    scheduler.set_timesteps(1000)
    for timestep in (0, 38, 440, 711, 999):
        alpha_bar = scheduler.alphas_cumprod[timestep]
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt().reshape(1)
        x_t = images(1, seed=timestep)
        clean = denoiser(x_t / alpha_bar.sqrt(), sigma, label_zeros(1))
        stock = scheduler.step(answer, timestep, x_t).pred_original_sample
        assert (clean - stock).abs().max() < 1e-12 * max(1.0, stock.abs().max().item())
        assert (denoiser.unet.scaled - x_t).abs().max() < 1e-12
        assert denoiser.unet.timestep.item() == timestep


def test_edm_euler_agrees_with_diffusers_own_preconditioning():
    scheduler = EDMEulerScheduler()
    answer, noisy = images(1), images(1, seed=1)
    denoiser = EdmDenoiser(Answer(answer), 0.5, timestep_scale=0.25)
    sigma = torch.tensor([2.5], dtype=torch.float64)
    clean = denoiser(noisy, sigma, label_zeros(1))
    assert (clean - scheduler.precondition_outputs(noisy, answer, 2.5)).abs().max() < 1e-12
    assert (
        denoiser.unet.scaled - scheduler.precondition_inputs(noisy, torch.tensor(2.5, dtype=torch.float64))
    ).abs().max() < 1e-12
    assert (denoiser.unet.timestep - scheduler.precondition_noise(sigma)).abs().max() < 1e-12


@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_a_consistency_models_coefficients_are_the_papers(sigma):
    """arXiv 2303.01469, appendix C, for sigma_data = 0.5 and epsilon = 0.002."""
    found = EdmDenoiser(nn.Identity(), 0.5, sigma_min=0.002).coefficients(torch.tensor(sigma, dtype=torch.float64))
    assert found.skip.item() == pytest.approx(0.5**2 / ((sigma - 0.002) ** 2 + 0.5**2), rel=1e-12)
    assert found.gain.item() == pytest.approx(0.5 * (sigma - 0.002) / math.sqrt(0.5**2 + sigma**2), rel=1e-12)


def test_flow_agrees_with_diffusers_own_step_to_the_end():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.625])
    answer, x_t = images(1).float(), images(1, seed=1).float()
    denoiser = FlowDenoiser(Answer(answer))
    clean = denoiser(x_t / (1 - 0.625), torch.tensor([0.625 / (1 - 0.625)]), label_zeros(1))
    stock = scheduler.step(answer, scheduler.timesteps[0], x_t).prev_sample
    assert clean == pytest.approx(stock, abs=1e-6)
    assert denoiser.unet.timestep.item() == pytest.approx(scheduler.timesteps[0].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_a_timesteps_own_noise_level_asks_for_exactly_that_timestep(schedule, dtype):
    denoiser = DiscreteDenoiser(nn.Identity(), DDPMScheduler(beta_schedule=schedule))
    alpha_bar = DDPMScheduler(beta_schedule=schedule).alphas_cumprod.double()
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().to(dtype)
    assert denoiser.timestep(sigma).tolist() == list(range(1000))


def test_between_timesteps_the_timestep_is_interpolated_in_log_sigma_and_held_at_the_ends():
    denoiser = exact_denoiser("epsilon")
    alpha_bar = DDPMScheduler().alphas_cumprod.double()
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    middle = (sigma[440] * sigma[441]).sqrt()
    asked = torch.stack([middle, sigma[0] / 2, sigma[-1] * 2])
    assert denoiser.timestep(asked).tolist() == pytest.approx([440.5, 0, 999], abs=1e-9)


def test_the_ddpm_schedule_has_the_papers_noise_levels():
    # sfd configs: t = 38, 440, 711 are sigma 0.137, 2.502, 13.01
    denoiser = exact_denoiser("epsilon")
    assert [denoiser.nearest_timestep(sigma) for sigma in (0.137, 2.5, 13.0)] == [38, 440, 711]
    assert [denoiser.nearest_sigma(sigma) for sigma in (0.137, 2.5, 13.0)] == pytest.approx(
        [0.137, 2.502, 13.01], rel=3e-3
    )
    assert denoiser.nearest_sigma(denoiser.nearest_sigma(2.5)) == denoiser.nearest_sigma(2.5)
    assert exact_denoiser("edm").nearest_sigma(2.5) == exact_denoiser("flow").nearest_sigma(2.5) == 2.5


@pytest.mark.parametrize("timestep", [0, 38, 440, 710, 900])
def test_the_nearest_timestep_is_the_nearest_by_ratio(timestep):
    """Between the geometric and the arithmetic mean of two noise levels, the upper is nearer by ratio alone."""
    denoiser = exact_denoiser("epsilon")
    low, high = denoiser.log_sigmas[timestep : timestep + 2].exp().tolist()
    assert denoiser.nearest_timestep((math.sqrt(low * high) + (low + high) / 2) / 2) == timestep + 1


def test_a_zero_terminal_snr_leaves_only_finite_noise_levels():
    denoiser = DiscreteDenoiser(
        nn.Identity(), DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )
    low, high = denoiser.sigma_range
    assert 0 < low < 1 < high < math.inf
    assert denoiser.timestep(torch.tensor([high])).item() == 998


def test_training_noise_levels_are_the_timesteps_38_to_711_each_as_often():
    denoiser = exact_denoiser("epsilon")
    u = (torch.arange(674 * 4, dtype=torch.float32) + 0.5) / (674 * 4)
    sigma = denoiser.training_sigma(u, 0.137, 13.0)
    assert sigma.dtype == torch.float32
    timesteps, counts = denoiser.timestep(sigma).unique(return_counts=True)
    assert timesteps.tolist() == list(range(38, 712))
    assert counts.tolist() == [4] * 674
    assert denoiser.timestep(denoiser.training_sigma(torch.tensor([0.0, 1.0]), 0.137, 13.0)).tolist() == [38, 711]


def test_training_noise_levels_of_flow_are_uniform_in_t_and_of_edm_on_the_karras_grid():
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    sigma = exact_denoiser("flow").training_sigma(u, 0.25, 4.0)
    assert (sigma / (1 + sigma)).tolist() == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
    assert exact_denoiser("edm").training_sigma(u, 0.002, 80.0).tolist() == pytest.approx(
        [(0.002 ** (1 / 7) + v * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for v in u.tolist()]
    )


def test_karras_grid_has_its_ends_and_edm_weight_its_closed_form():
    ends = karras_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.002, 80.0)
    assert ends.tolist() == pytest.approx([0.002, 80.0])
    # (sigma^2 + sd^2) / (sigma sd)^2 = 1/sd^2 + 1/sigma^2
    assert edm_weight(torch.tensor([0.25]), 0.5).item() == pytest.approx(4 + 16)


def test_the_fit_weight_turns_a_clean_image_error_into_the_loss_that_networks_are_trained_with():
    sigma = torch.tensor([0.25, 2.5], dtype=torch.float64)
    assert exact_denoiser("edm").fit_weight(sigma).tolist() == pytest.approx([4 + 16, 4 + 1 / 6.25])
    assert exact_denoiser("flow").fit_weight(sigma).tolist() == pytest.approx([25, (3.5 / 2.5) ** 2])
    for kind in DISCRETE:  # |eps_hat - eps|^2 = (a/b)^2 |x_hat - x|^2; v and sample are weighted to the same
        assert exact_denoiser(kind).fit_weight(sigma).tolist() == pytest.approx([16, 1 / 6.25])


def test_an_epsilon_generator_is_sigma_times_latents_minus_predicted_noise():
    denoiser = exact_denoiser("epsilon")
    z = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    generator = OneStepGenerator(denoiser, 2.5)
    alpha_bar = DDPMScheduler().alphas_cumprod[440].double()
    sigma, b = ((1 - alpha_bar) / alpha_bar).sqrt().float(), (1 - alpha_bar).sqrt().float()
    noise = denoiser.unet(b * z, torch.full((3,), 440.0), label_zeros(3)).sample
    assert generator.sigma_init == pytest.approx(sigma.item())
    assert generator.unclamped(z, label_zeros(3)) == pytest.approx(sigma * (z - noise), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_draws_the_teachers_distribution_whatever_it_predicts(kind):
    """The exact probability flow maps z at sigma_max to mu + (sigma_max z - mu) tau / sqrt(sigma_max^2 + tau^2)."""
    denoiser = exact_denoiser(kind)
    z = torch.tensor([0.0, 1.0, -1.5]).reshape(3, 1, 1, 1)
    config = SamplerConfig(steps=100).within(denoiser.sigma_range)
    found = heun(denoiser, z, label_zeros(3), config).flatten()
    exact = [MU + TAU * (80 * v - MU) / math.sqrt(80**2 + TAU**2) for v in (0.0, 1.0, -1.5)]
    assert found.tolist() == pytest.approx(exact, abs=1e-3)


def test_a_teacher_on_a_schedule_is_sampled_within_its_noise_levels():
    settings = TeacherRuntime(exact_denoiser("epsilon"), SamplerConfig(sigma_max=200.0)).settings
    assert (settings["sigma_min"], settings["sigma_max"]) == pytest.approx((0.0100, 157.41), rel=1e-3)
    assert TeacherRuntime(exact_denoiser("edm"), SamplerConfig()).settings["sigma_min"] == 0.002


def test_an_unknown_prediction_type_is_refused_by_name():
    with pytest.raises(ModelError, match="prediction type 'flow_prediction' is unknown"):
        DiscreteDenoiser(nn.Identity(), DDPMScheduler(prediction_type="flow_prediction"))
