"""What stock diffusers draws from a text-to-image folder in one unguided step: its pipeline, none of our arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_deploy.models.text.schedule import read_schedule


@torch.inference_mode()
def draw_pipeline(folder: Path, texts: Sequence[str], latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] by the folder's own scheduler, from standard-normal ``latents`` (B, C, h, w)."""
    pipe = _pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(
        list(texts), num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="pt"
    ).images  # fmt: skip
    return images * 2 - 1


@torch.inference_mode()
def draw_at(folder: Path, texts: Sequence[str], latents: Tensor, timestep: int) -> Tensor:
    """The same where the folder's scheduler says no single step: from pure noise at ``timestep`` of its schedule."""
    scheduler = read_schedule(folder)
    pipe = _pipeline(folder, scheduler=scheduler)
    told, _ = pipe.encode_prompt(list(texts), "cpu", 1, False)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    noisy = scheduler.add_noise(torch.zeros_like(latents), latents, torch.tensor([timestep]))
    output = pipe.unet(noisy, timestep, encoder_hidden_states=told).sample
    clean = scheduler.step(output, timestep, noisy).pred_original_sample
    images: Tensor = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
    return images.clamp(-1, 1)


def _pipeline(folder: Path, **parts: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "steps_offset should be 1", which no single step reads
        return StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
            use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **parts,
        )  # fmt: skip
