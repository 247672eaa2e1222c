"""Denoisers: (noisy image, sigma, class labels) to a clean-image prediction.

Training and sampling are written once above this seam. Images are float (B, C, H, W) in [-1, 1];
sigma is the noise level of ``y = x + sigma * noise``, one value per row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class EdmDenoiser(nn.Module):
    """A stock diffusers ``UNet2DModel`` under EDM preconditioning (Karras et al., arXiv 2206.00364, table 1).

    The network sees timestep ``250 * ln(sigma)``, which is what diffusers'
    ``CMStochasticIterativeScheduler`` feeds it, so a generator loads there unchanged.
    """

    def __init__(self, unet: UNet2DModel, sigma_data: float) -> None:
        super().__init__()
        self.unet = unet
        self.sigma_data = sigma_data

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Clean-image prediction (B, C, H, W) float32 for ``noisy`` at ``sigma`` (B,) and ``labels`` (B,) int64."""
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        norm = sigma.square() + self.sigma_data**2
        output = self.unet(noisy * norm.rsqrt(), timestep(sigma.flatten()), class_labels=labels).sample
        skip = self.sigma_data**2 / norm
        scale = sigma * self.sigma_data * norm.rsqrt()
        clean: Tensor = skip * noisy + scale * output.to(torch.float32)
        return clean


def timestep(sigma: Tensor) -> Tensor:
    """The timestep the network sees: EDM's ``c_noise = ln(sigma) / 4`` times diffusers' 1000."""
    return 250.0 * sigma.log()


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight on the squared clean-image error, (B,) for sigma (B,)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise level at position ``u`` in [0, 1] of the Karras grid; 0 is ``sigma_min`` (arXiv 2206.00364, eq. 5)."""
    low, high = math.pow(sigma_min, 1 / rho), math.pow(sigma_max, 1 / rho)
    return (low + u * (high - low)).pow(rho)
