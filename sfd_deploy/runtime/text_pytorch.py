"""The reference back end of prompts in PyTorch, FP32: a one-step generator, and the guided teacher of many steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfd_deploy.latents import Latents
from sfd_deploy.models.text.generator import OneStepTextGenerator
from sfd_deploy.models.text.sampler import GuidedTextTeacher
from sfd_deploy.runtime.seam import Images


class _PromptedRuntime:
    """Draws with a module from latents and prompts' numbers to images."""

    name = "pytorch"

    def __init__(self, module: OneStepTextGenerator | GuidedTextTeacher, device: str, how: dict[str, Any]) -> None:
        self.module = module.to(device)
        self.device = device
        self.settings: dict[str, Any] = {"device": device, "arithmetic": "fp32", **how}
        self.latent_shape = module.image_shape
        config = module.vae.config
        _, height, width = self.latent_shape
        scale = 2 ** (len(config.block_out_channels) - 1)  # each level but the last doubles the size
        self.image_shape = (int(config.out_channels), height * scale, width * scale)

    @torch.inference_mode()
    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """Images (B, 3, H, W) of prompts ``labels`` (B,)."""
        noise = torch.from_numpy(latents.array(self.latent_shape)).to(self.device)
        images: torch.Tensor = self.module(noise, torch.from_numpy(labels).to(self.device))
        return images.cpu().numpy()

    def close(self) -> None:
        """Nothing to release."""


class TextGeneratorRuntime(_PromptedRuntime):
    """A one-step generator; a condition is a position in the texts that it was loaded with."""

    def __init__(self, generator: OneStepTextGenerator, device: str = "cpu") -> None:
        super().__init__(generator, device, {"steps": 1})


class TextTeacherRuntime(_PromptedRuntime):
    """A guided teacher; a condition is a position in the texts that it was loaded with."""

    def __init__(self, teacher: GuidedTextTeacher, device: str = "cpu") -> None:
        super().__init__(teacher, device, teacher.sampler.resolved())
