"""A teacher's parts as stock diffusers' ``StableDiffusionPipeline``, and what it draws."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sfd_deploy.latents import Latents
from sfd_deploy.runtime.seam import Images

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

DRAWN_AT_ONCE = 64


def stable_diffusion_schedule() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x: sqrt(beta) linear in the timestep; latents are never clipped."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def build_pipeline(
    tokenizer: CLIPTokenizer, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts together; they are shared, not copied."""
    from diffusers import StableDiffusionPipeline

    pipeline: StableDiffusionPipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=stable_diffusion_schedule(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def copy_pipeline(pipeline: StableDiffusionPipeline, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The same pipeline with copies of its networks in ``dtype``, laid out row-major as safetensors wants them."""
    vae, text_encoder, unet = (
        copy.deepcopy(network).to(dtype=dtype, memory_format=torch.contiguous_format)
        for network in (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    )
    return build_pipeline(pipeline.tokenizer, vae, text_encoder, unet)


@torch.inference_mode()
def draw_prompts(
    pipeline: StableDiffusionPipeline, texts: Sequence[str], guidance: float, steps: int, first: int = 0
) -> Images:
    """An image (N, 3, H, W) in [-1, 1] of each text: DDIM, from latents ``first``, … of the ``select`` stream."""
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    latents = torch.from_numpy(Latents.of_stream("select", 0, first, len(texts)).array((channels, size, size)))
    drawn = []
    for start in range(0, len(texts), DRAWN_AT_ONCE):
        rows = slice(start, start + DRAWN_AT_ONCE)
        images = pipeline(
            list(texts[rows]), latents=latents[rows], guidance_scale=guidance, num_inference_steps=steps,
            output_type="pt",
        ).images  # fmt: skip
        drawn.append(images.float().cpu().numpy() * 2 - 1)  # the pipeline's are in [0, 1]
    return np.concatenate(drawn)
