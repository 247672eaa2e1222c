"""The teacher's multi-step sampler: deterministic Heun on the Karras grid (arXiv 2206.00364, algorithm 1).

Beside it classifier-free guidance, which samplers and training share.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sfd_deploy.config import StageConfig
from sfd_deploy.models.denoiser import karras_sigma

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # noisy, noise level, conditions → prediction


class SamplerConfig(StageConfig):
    """Steps and noise range of the Heun sampler."""

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def network_evaluations(self) -> int:
        """Evaluations per image: two a step, one in the last."""
        return 2 * self.steps - 1

    def within(self, sigma_range: tuple[float, float]) -> SamplerConfig:
        """These steps over the part of the noise range that a denoiser knows."""
        low, high = sigma_range
        return self.model_copy(update={"sigma_min": max(self.sigma_min, low), "sigma_max": min(self.sigma_max, high)})


@torch.no_grad()
def heun(denoise: Predict, latents: Tensor, labels: Tensor, config: SamplerConfig) -> Tensor:
    """Images (B, C, H, W), clamped to [-1, 1], from standard-normal ``latents`` of that shape."""
    grid = karras_sigma(torch.linspace(1, 0, config.steps, dtype=torch.float64), config.sigma_min, config.sigma_max)
    sigmas = [*grid.tolist(), 0.0]
    noisy: Tensor = latents * sigmas[0]
    for now, then in pairwise(sigmas):
        slope: Tensor = (noisy - denoise(noisy, _level(now, labels), labels)) / now
        euler: Tensor = noisy + (then - now) * slope
        if then == 0:
            return euler.clamp(-1, 1)
        corrected = (euler - denoise(euler, _level(then, labels), labels)) / then
        noisy = noisy + (then - now) * (slope + corrected) / 2
    raise AssertionError("the grid ends at 0")


def guided(predict: Predict, noisy: Tensor, level: Tensor, asked: Tensor, away: Tensor, scale: float) -> Tensor:
    """x_u + scale * (x_c - x_u) in one doubled batch (B, C, H, W); at scale 1 one plain call.

    The same whether a clean image, epsilon or v is predicted: each is linear in the network's output.
    """
    if scale == 1:
        return predict(noisy, level, asked)
    both = predict(torch.cat([noisy, noisy]), torch.cat([level, level]), torch.cat([away, asked]))
    x_u, x_c = both.chunk(2)
    return x_u + scale * (x_c - x_u)


def _level(sigma: float, labels: Tensor) -> Tensor:
    return torch.full(labels.shape, sigma, dtype=torch.float32, device=labels.device)
