"""Networks that are exact: the closed-form denoiser of N(mu, tau^2), written in each parameterisation.

The formulas are the textbook ones in a and b, not the coefficients under test.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser, EdmDenoiser, FlowDenoiser

MU, TAU = 0.2, 0.3
KINDS = ("edm", "edm-euler", "epsilon", "v_prediction", "sample", "flow")


def exact_clean(noisy: Tensor, sigma: Tensor) -> Tensor:
    """E[x | y] for x ~ N(mu, tau^2) per pixel and y = x + sigma * noise."""
    return MU + TAU**2 / (TAU**2 + sigma**2) * (noisy - MU)


class ExactNetwork(nn.Module):
    """What a perfectly trained network of one kind would answer to (scaled input, timestep)."""

    def __init__(self, kind: str, scheduler: DDPMScheduler | None = None) -> None:
        super().__init__()
        self.kind, self.config = kind, {"sample_size": 2, "in_channels": 1}
        if scheduler is not None:
            alpha_bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
            self.log_sigmas = np.log((1 - alpha_bar) / alpha_bar) / 2

    def forward(self, scaled: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        assert class_labels.shape == (len(scaled),)
        answer = {"edm": self._edm, "edm-euler": self._edm, "flow": self._flow}.get(self.kind, self._discrete)
        return SimpleNamespace(sample=answer(scaled, timestep))

    def _edm(self, scaled: Tensor, timestep: Tensor) -> Tensor:
        sigma = (timestep / (250 if self.kind == "edm" else 0.25)).exp().reshape(-1, 1, 1, 1)
        noisy = scaled * (sigma**2 + 0.25).sqrt()
        skipped = 0.25 / (sigma**2 + 0.25) * noisy
        return (exact_clean(noisy, sigma) - skipped) * (sigma**2 + 0.25).sqrt() / (0.5 * sigma)

    def _flow(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep / 1000).reshape(-1, 1, 1, 1)
        return (x_t - exact_clean(x_t / (1 - t), t / (1 - t))) / t

    def _discrete(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        places = np.arange(len(self.log_sigmas))
        sigma = torch.from_numpy(np.exp(np.interp(timestep.numpy(), places, self.log_sigmas))).to(x_t.dtype)
        sigma = sigma.reshape(-1, 1, 1, 1)
        a, b = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        clean = exact_clean(x_t / a, sigma)
        noise = (x_t - a * clean) / b
        return {"epsilon": noise, "v_prediction": a * noise - b * clean, "sample": clean}[self.kind]


def exact_denoiser(kind: str, scheduler: DDPMScheduler | DDIMScheduler | None = None) -> Denoiser:
    """The denoiser of one kind around its exact network; a DDPM schedule unless another is given."""
    if kind in {"epsilon", "v_prediction", "sample"}:
        scheduler = scheduler or DDPMScheduler(prediction_type=kind)
        return DiscreteDenoiser(ExactNetwork(kind, scheduler), scheduler)
    network = ExactNetwork(kind)
    if kind == "flow":
        return FlowDenoiser(network)
    return EdmDenoiser(network, 0.5, 250.0 if kind == "edm" else 0.25)
