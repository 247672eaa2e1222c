"""One-step text-to-image generators: latents and a prompt to images, as stock diffusers draws them.

The folder is a plain ``StableDiffusionPipeline``. Its scheduler's schedule ends where the generator starts, so
that a single Euler step is the generator's: ``x = D(sigma_init * z; sigma_init, prompt)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.folder import contiguous
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.folder import TextParts, load_parts
from sfd_deploy.models.text.network import text_denoiser
from sfd_deploy.models.text.schedule import one_step_scheduler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class OneStepTextGenerator(OneStepGenerator):
    """Standard-normal latents (B, C, h, w) and prompts' numbers (B,) to images (B, 3, H, W) in [-1, 1].

    One unguided step, then the VAE's decoder. ``unclamped`` is the step in latent space, as training sees it;
    ``image_shape`` is the latents'.
    """

    def __init__(self, denoiser: Denoiser, sigma_init: float, vae: AutoencoderKL) -> None:
        super().__init__(denoiser, sigma_init)
        self.vae = vae

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; ``class_labels`` are the prompts' numbers."""
        return decode(self.vae, self.unclamped(latents, class_labels))


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of the U-Net's latents (B, C, h, w)."""
    images: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return images.clamp(-1, 1)


def save_text_generator(generator: OneStepGenerator, parts: TextParts, folder: Path) -> None:
    """Write ``generator`` with the teacher's other ``parts`` as a stock ``StableDiffusionPipeline``.

    ``DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=1.0)`` draws its images.
    """
    _save_pipeline(parts, generator.denoiser, folder, one_step_scheduler(generator.denoiser, generator.sigma_init))


def save_text_teacher(denoiser: Denoiser, parts: TextParts, folder: Path) -> None:
    """Write a teacher or fake score as a stock pipeline: ``denoiser``'s U-Net with the other ``parts``."""
    _save_pipeline(parts, denoiser, folder, denoiser.scheduler())


def _save_pipeline(parts: TextParts, denoiser: Denoiser, folder: Path, scheduler: Any) -> None:
    from diffusers import StableDiffusionPipeline

    prompted = contiguous(denoiser.unet)
    StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=prompted.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip


def load_text_generator(sealed: Sealed, texts: Sequence[str]) -> OneStepTextGenerator:
    """The generator of a verified folder, ready for inference; a condition is a position in ``texts``.

    Raises:
        ModelError: a part that cannot be used, or a scheduler that does not say where the one step starts.
        PromptError: a text is too long.
    """
    parts = load_parts(sealed)
    denoiser = text_denoiser(parts, texts)
    return OneStepTextGenerator(denoiser, denoiser.sigma_range[1], parts.vae).eval()
