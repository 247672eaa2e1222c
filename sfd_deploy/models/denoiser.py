"""Denoisers: (noisy image, sigma, class labels) to a clean-image prediction.

Training and sampling are written once above this seam. Images are float (B, C, H, W) in [-1, 1];
sigma is the noise level of ``y = x + sigma * noise``, one value per row. A parameterisation is the
three coefficients of ``clean = skip * y + gain * network(scale * y, timestep)`` and that timestep;
with a = 1 / sqrt(1 + sigma^2), b = sigma * a, t = sigma / (1 + sigma), sd = sigma_data:

| the network predicts | scale                    | skip              | gain       | timestep                |
|----------------------|--------------------------|-------------------|------------|-------------------------|
| EDM's F              | 1 / sqrt(sigma^2 + sd^2) | sd^2 * scale^2    | sigma * sd * scale | 250 ln sigma    |
| epsilon              | a                        | 1                 | -sigma     | where the schedule has sigma |
| v = a eps - b x      | a                        | a^2               | -b         | the same                |
| the clean image      | a                        | 0                 | 1          | the same                |
| flow u = eps - x     | 1 - t                    | 1 - t             | -t         | 1000 t                  |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sfd_deploy.errors import ModelError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DModel

EDM_TIMESTEPS = 250.0  # what diffusers' CMStochasticIterativeScheduler feeds a network: 1000 * ln(sigma) / 4
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# A float32 sigma of the schedule asks for its very timestep: rounding moves it by 1e-5 of one, at most.
SNAP = 1e-3


class Coefficients(NamedTuple):
    """``clean = skip * noisy + gain * network(scale * noisy)``, each (B, 1, 1, 1)."""

    scale: Tensor
    skip: Tensor
    gain: Tensor


class Denoiser(nn.Module, ABC):
    """A stock diffusers ``UNet2DModel`` under one parameterisation."""

    sigma_range: tuple[float, float] = (0.0, math.inf)  # noise levels that the network knows
    sigma_min: float = 0.0  # at this one the clean image is what it is given, whatever the network says

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Clean-image prediction (B, C, H, W) for ``noisy`` at ``sigma`` (B,) and ``labels`` (B,) int64.

        Float32 whatever autocast does to the network; float64 where ``noisy`` is.
        """
        wide = torch.promote_types(noisy.dtype, torch.float32)
        noisy, sigma = noisy.to(wide), sigma.to(wide)
        scale, skip, gain = self.coefficients(sigma.reshape(-1, 1, 1, 1))
        output = self.unet(noisy * scale, self.timestep(sigma), class_labels=labels).sample
        clean: Tensor = skip * noisy + gain * output.to(wide)
        return clean

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The parameterisation's coefficients at ``sigma``, in its shape and dtype."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told of the noise level, (B,) float for ``sigma`` (B,)."""

    def fit_weight(self, sigma: Tensor) -> Tensor:
        """Weight (B,) on the squared clean-image error: the plain squared error of the network's own output."""
        return self.coefficients(sigma).gain.square().reciprocal()

    @abstractmethod
    def training_sigma(self, u: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        """Noise levels (B,) in [sigma_min, sigma_max] for ``u`` (B,) uniform in [0, 1)."""

    def nearest_sigma(self, sigma: float) -> float:
        """The noise level nearest to ``sigma`` that the network was trained at."""
        return sigma

    @abstractmethod
    def scheduler(self) -> SchedulerMixin:
        """The stock scheduler whose config holds this parameterisation."""

    @abstractmethod
    def one_step_scheduler(self, sigma_init: float) -> SchedulerMixin:
        """The stock scheduler whose single step, from noise at ``sigma_init``, is this denoiser, clamped."""


class EdmDenoiser(Denoiser):
    """EDM preconditioning (Karras et al., arXiv 2206.00364, table 1).

    The network sees ``timestep_scale * ln(sigma)``: 250 in diffusers' consistency models and in ours,
    0.25 in its EDM schedulers. ``sigma_min``, 0 in ours, is where a consistency model draws what it is given
    (arXiv 2303.01469, appendix C).
    """

    def __init__(
        self, unet: UNet2DModel, sigma_data: float, timestep_scale: float = EDM_TIMESTEPS, sigma_min: float = 0.0
    ) -> None:
        super().__init__(unet)
        self.sigma_data = sigma_data
        self.timestep_scale = timestep_scale
        self.sigma_min = sigma_min

    def coefficients(self, sigma: Tensor) -> Coefficients:
        norm = sigma.square() + self.sigma_data**2
        above = sigma - self.sigma_min
        skip = self.sigma_data**2 / (above.square() + self.sigma_data**2)
        return Coefficients(norm.rsqrt(), skip, above * self.sigma_data * norm.rsqrt())

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.timestep_scale * sigma.log()

    def training_sigma(self, u: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        """The Karras grid."""
        return karras_sigma(u, sigma_min, sigma_max)

    def scheduler(self) -> SchedulerMixin:
        return self.one_step_scheduler(80.0)

    def one_step_scheduler(self, sigma_init: float) -> SchedulerMixin:
        """``sigma_min`` is said to the first: diffusers' default shifts images of ours by 4e-4."""
        from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler

        if self.timestep_scale == EDM_TIMESTEPS:
            return CMStochasticIterativeScheduler(
                sigma_min=self.sigma_min, sigma_max=sigma_init, sigma_data=self.sigma_data, num_train_timesteps=40
            )
        return EDMEulerScheduler(sigma_max=sigma_init, sigma_data=self.sigma_data)


class DiscreteDenoiser(Denoiser):
    """A network on a DDPM schedule that predicts epsilon, v or the clean image.

    Between the schedule's timesteps the network is told one interpolated in ln(sigma).

    Raises:
        ModelError: another prediction type, or noise levels that do not rise.
    """

    log_sigmas: Tensor  # (T,) float64, rising

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler) -> None:
        super().__init__(unet)
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTIONS:
            raise ModelError(f"prediction type {self.prediction_type!r} is unknown", f"use {', '.join(PREDICTIONS)}")
        self.schedule = scheduler
        self.register_buffer("log_sigmas", log_sigmas_of(scheduler), persistent=False)
        self.sigma_range = (self._sigma_at(0), self._sigma_at(-1))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        a = (1 + sigma.square()).rsqrt()
        one = torch.ones_like(sigma)
        skip, gain = {
            "epsilon": (one, -sigma), "v_prediction": (a.square(), -sigma * a), "sample": (one - one, one)
        }[self.prediction_type]  # fmt: skip
        return Coefficients(a, skip, gain)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Held at the schedule's ends outside it."""
        # Compared and counted, since ONNX has no searchsorted.
        position = sigma.to(torch.float64).log()
        below = (position[:, None] >= self.log_sigmas).sum(1).clamp(1, len(self.log_sigmas) - 1) - 1
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        between = below + ((position - low) / (high - low)).clamp(0, 1)
        whole = between.round()
        return torch.where((between - whole).abs() < SNAP, whole, between).to(sigma.dtype)

    def fit_weight(self, sigma: Tensor) -> Tensor:
        """DDPM's epsilon loss, whatever is predicted: the weight is the signal-to-noise ratio."""
        return sigma.square().reciprocal()

    def training_sigma(self, u: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        """Uniform over the schedule's timesteps from the one nearest ``sigma_min`` to the one nearest ``sigma_max``."""
        first, last = self.nearest_timestep(sigma_min), self.nearest_timestep(sigma_max)
        steps = first + (u * (last - first + 1)).to(torch.int64).clamp(max=last - first)
        return self.log_sigmas.to(u.device)[steps].exp().to(u.dtype)

    def nearest_timestep(self, sigma: float) -> int:
        """The schedule's timestep whose noise level is nearest, by ratio."""
        return int((self.log_sigmas - math.log(sigma)).abs().argmin())

    def nearest_sigma(self, sigma: float) -> float:
        return self._sigma_at(self.nearest_timestep(sigma))

    def scheduler(self) -> SchedulerMixin:
        return self.schedule

    def one_step_scheduler(self, sigma_init: float) -> SchedulerMixin:
        """A DDIM scheduler: ``steps_offset`` is the timestep of its only step, which ends at the clean image."""
        from diffusers import DDIMScheduler

        named: dict[str, object] = {}
        if self.schedule.config.beta_schedule == "sigmoid":  # which DDIM does not know by name
            named = {"beta_schedule": "linear", "rescale_betas_zero_snr": False}
            named |= {"trained_betas": self.schedule.betas.tolist()}
        scheduler: DDIMScheduler = DDIMScheduler.from_config(
            self.schedule.config, steps_offset=self.nearest_timestep(sigma_init), timestep_spacing="leading",
            set_alpha_to_one=True, clip_sample=True, clip_sample_range=1.0, thresholding=False, **named,
        )  # fmt: skip
        return scheduler

    def _sigma_at(self, timestep: int) -> float:
        return math.exp(self.log_sigmas[timestep].item())


def log_sigmas_of(scheduler: DDPMScheduler | DDIMScheduler) -> Tensor:
    """Log noise levels (T,) float64 of a DDPM schedule's timesteps, rising; zero terminal SNR has none.

    Raises:
        ModelError: they do not rise, or there are fewer than two.
    """
    alpha_bar = scheduler.alphas_cumprod.to(torch.float64)
    alpha_bar = alpha_bar[alpha_bar > 0]
    log_sigmas: Tensor = (torch.log1p(-alpha_bar) - alpha_bar.log()) / 2
    if len(log_sigmas) < 2 or not (log_sigmas.diff() > 0).all():
        raise ModelError("the schedule's noise levels do not rise", "save the scheduler that it was trained with")
    return log_sigmas


class FlowDenoiser(Denoiser):
    """Flow matching on straight paths, x_t = (1 - t) x + t noise; the network predicts noise - x."""

    def __init__(self, unet: UNet2DModel, timesteps: int = 1000) -> None:
        super().__init__(unet)
        self.timesteps = timesteps

    def coefficients(self, sigma: Tensor) -> Coefficients:
        clean_share = 1 / (1 + sigma)
        return Coefficients(clean_share, clean_share, -sigma * clean_share)

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.timesteps * sigma / (1 + sigma)

    def training_sigma(self, u: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        """Uniform in t."""
        low, high = sigma_min / (1 + sigma_min), sigma_max / (1 + sigma_max)
        t = low + u * (high - low)
        return t / (1 - t)

    def scheduler(self) -> SchedulerMixin:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.timesteps)

    def one_step_scheduler(self, sigma_init: float) -> SchedulerMixin:
        """No config of it holds a start: it is handed ``sigmas=[sigma_init / (1 + sigma_init)]``."""
        return self.scheduler()


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight on the squared clean-image error, (B,) for sigma (B,)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise level at position ``u`` in [0, 1] of the Karras grid; 0 is ``sigma_min`` (arXiv 2206.00364, eq. 5)."""
    low, high = math.pow(sigma_min, 1 / rho), math.pow(sigma_max, 1 / rho)
    return (low + u * (high - low)).pow(rho)
