"""The reference back end: teacher and generator in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError
from sfd_deploy.latents import Latents
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator, image_shape
from sfd_deploy.models.sampler import SamplerConfig, heun
from sfd_deploy.runtime.seam import Images


class GeneratorRuntime:
    """A one-step generator, FP32."""

    name = "pytorch"

    def __init__(self, generator: OneStepGenerator, device: str = "cpu") -> None:
        self.generator = generator.to(device)
        self.device = device
        self.settings: dict[str, Any] = {"device": device, "arithmetic": "fp32", "steps": 1}
        self.image_shape = generator.image_shape

    @torch.inference_mode()
    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        noise = torch.from_numpy(latents.array(self.image_shape)).to(self.device)
        images: torch.Tensor = self.generator(noise, torch.from_numpy(labels).to(self.device))
        return images.cpu().numpy()

    def close(self) -> None:
        """Nothing to release."""


class TeacherRuntime:
    """A multi-step teacher, FP32, by the Heun sampler."""

    name = "pytorch"

    def __init__(self, denoiser: Denoiser, sampler: SamplerConfig, device: str = "cpu") -> None:
        self.denoiser = denoiser.to(device)
        self.sampler = sampler.within(denoiser.sigma_range)
        self.device = device
        self.settings: dict[str, Any] = {"device": device, "arithmetic": "fp32", **self.sampler.resolved()}
        self.image_shape = image_shape(denoiser.unet)

    @torch.inference_mode()
    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        noise = torch.from_numpy(latents.array(self.image_shape)).to(self.device)
        images = heun(self.denoiser, noise, torch.from_numpy(labels).to(self.device), self.sampler)
        return images.cpu().numpy()

    def close(self) -> None:
        """Nothing to release."""


def torch_device(name: str) -> str:
    """``auto`` to cuda where there is one, else cpu.

    Raises:
        BackendError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise BackendError("device cuda: no CUDA GPU is visible to PyTorch", "use --device cpu or --device auto")
    return name
