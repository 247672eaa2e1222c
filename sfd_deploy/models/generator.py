"""Teachers and one-step generators as folders: plain diffusers, no custom code.

A generator is a denoiser called once on pure noise at a fixed level: ``x = D(sigma_init * z; sigma_init, c)``
(SiD, arXiv 2404.04057), which is what diffusers' ``ConsistencyModelPipeline`` computes in one step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfd_deploy.errors import ManifestError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import EdmDenoiser

if TYPE_CHECKING:
    from diffusers import CMStochasticIterativeScheduler, UNet2DModel


class OneStepGenerator(nn.Module):
    """Standard-normal latents (B, C, H, W) and labels (B,) to images in [-1, 1], the whole step.

    This module is what is exported: noise scale, preconditioning, network, clamp.
    """

    def __init__(self, denoiser: EdmDenoiser, sigma_init: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigma_init = sigma_init

    def unclamped(self, latents: Tensor, labels: Tensor) -> Tensor:
        """The step without the final clamp, as training sees it."""
        sigma = latents.new_full((latents.shape[0],), self.sigma_init)
        clean: Tensor = self.denoiser(latents * self.sigma_init, sigma, labels)
        return clean

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1]."""
        return self.unclamped(latents, class_labels).clamp(-1, 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return image_shape(self.denoiser.unet)


def image_shape(unet: UNet2DModel) -> tuple[int, int, int]:
    """(C, H, W) of a network's images."""
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return (unet.config["in_channels"], height, width)


def save_generator(generator: OneStepGenerator, folder: Path) -> None:
    """Write ``generator`` as a ``ConsistencyModelPipeline`` folder."""
    from diffusers import ConsistencyModelPipeline

    ConsistencyModelPipeline(
        unet=_contiguous(generator.denoiser.unet),
        scheduler=one_step_scheduler(generator.sigma_init, generator.denoiser.sigma_data),
    ).save_pretrained(folder, safe_serialization=True)


def one_step_scheduler(sigma_init: float, sigma_data: float) -> CMStochasticIterativeScheduler:
    """The scheduler whose single step is the generator. ``sigma_min=0``: diffusers' default shifts images by 4e-4."""
    from diffusers import CMStochasticIterativeScheduler

    return CMStochasticIterativeScheduler(
        sigma_min=0.0, sigma_max=sigma_init, sigma_data=sigma_data, num_train_timesteps=40, clip_denoised=True
    )


def load_generator(sealed: Sealed) -> OneStepGenerator:
    """The generator of a verified folder, ready for inference."""
    return OneStepGenerator(_load_denoiser(sealed), float(sealed.facts["sigma_init"])).eval()


def save_teacher(denoiser: EdmDenoiser, folder: Path) -> None:
    """Write a teacher's network below ``folder/unet``; its sigma_data and class names go into the manifest's facts."""
    _contiguous(denoiser.unet).save_pretrained(folder / "unet", safe_serialization=True)


def load_teacher(sealed: Sealed) -> EdmDenoiser:
    """The denoiser of a verified teacher folder."""
    return _load_denoiser(sealed).eval()


def labels_of(sealed: Sealed) -> Labels:
    """Class names and the forget map that a teacher, generator or artefact records.

    Raises:
        ManifestError, ConfigError: they are missing or malformed.
    """
    if "labels" not in sealed.facts:
        raise ManifestError(f"{sealed.folder}: its manifest records no labels", "make it again with its stage")
    return Labels.from_mapping(sealed.facts["labels"], str(sealed.folder))


def _load_denoiser(sealed: Sealed) -> EdmDenoiser:
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(sealed.folder / "unet", use_safetensors=True, local_files_only=True)
    unet = unet.to(memory_format=torch.channels_last).requires_grad_(False)
    return EdmDenoiser(unet, float(sealed.facts["sigma_data"]))


def _contiguous(unet: UNet2DModel) -> UNet2DModel:
    # safetensors stores row-major tensors only; training keeps them channels-last.
    return unet.to(memory_format=torch.contiguous_format)
