"""What stock diffusers draws from a folder in one step: its own loader, scheduler and arithmetic, none of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfd_deploy.errors import ModelError
from sfd_deploy.models.folder import find_layout, read_json

if TYPE_CHECKING:
    from diffusers import UNet2DModel

Step = Callable[[Any, "UNet2DModel", Tensor, Tensor, float], Tensor]


@torch.inference_mode()
def draw_stock(folder: Path, latents: Tensor, labels: Tensor, sigma_init: float) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from standard-normal ``latents`` and ``labels`` (B,).

    Raises:
        ModelError: a scheduler without a single step.
    """
    import diffusers

    layout = find_layout(folder)
    if layout.scheduler is None:
        raise ModelError(f"{folder}: no scheduler", "save one into scheduler/")
    config = read_json(layout.scheduler)
    name = str(config.get("_class_name"))
    if name not in STEPS:
        raise ModelError(f"{folder}: scheduler {name} has no single step", f"use one of {', '.join(STEPS)}")
    # A network's own clipping and shifting are for many steps: the one step ends in a plain clamp.
    settings, step = STEPS[name]
    scheduler = getattr(diffusers, name).from_config(config, **settings(sigma_init))
    unet = diffusers.UNet2DModel.from_pretrained(layout.network, use_safetensors=True, local_files_only=True).eval()
    return step(scheduler, unet, latents, labels, sigma_init).clamp(-1, 1)


def _from_noise(scheduler: Any, unet: UNet2DModel, latents: Tensor, labels: Tensor, sigma_init: float) -> Tensor:
    scheduler.set_timesteps(1)
    return _last_step(scheduler, unet, latents * scheduler.init_noise_sigma, labels)


def _from_sigma_max(scheduler: Any, unet: UNet2DModel, latents: Tensor, labels: Tensor, sigma_init: float) -> Tensor:
    scheduler.set_timesteps(1)
    return _last_step(scheduler, unet, latents * scheduler.sigmas[0], labels)


def _last_step(scheduler: Any, unet: UNet2DModel, noisy: Tensor, labels: Tensor) -> Tensor:
    timestep = scheduler.timesteps[0]
    output = unet(scheduler.scale_model_input(noisy, timestep), timestep, class_labels=labels).sample
    clean: Tensor = scheduler.step(output, timestep, noisy).prev_sample
    return clean


def _from_schedule(scheduler: Any, unet: UNet2DModel, latents: Tensor, labels: Tensor, sigma_init: float) -> Tensor:
    alpha_bar = scheduler.alphas_cumprod.double()
    timestep = int((((1 - alpha_bar) / alpha_bar).sqrt().log() - torch.tensor(sigma_init).log()).abs().argmin())
    scheduler.set_timesteps(len(alpha_bar))
    noisy = scheduler.add_noise(torch.zeros_like(latents), latents, torch.tensor([timestep]))
    output = unet(noisy, timestep, class_labels=labels).sample
    clean: Tensor = scheduler.step(
        output, timestep, noisy, generator=torch.Generator().manual_seed(0)
    ).pred_original_sample  # fmt: skip
    return clean


def _from_flow(scheduler: Any, unet: UNet2DModel, latents: Tensor, labels: Tensor, sigma_init: float) -> Tensor:
    time = sigma_init / (1 + sigma_init)
    scheduler.set_timesteps(sigmas=[time])
    output = unet(latents * time, scheduler.timesteps[0], class_labels=labels).sample
    clean: Tensor = scheduler.step(output, scheduler.timesteps[0], latents * time).prev_sample
    return clean


STEPS: dict[str, tuple[Callable[[float], dict[str, Any]], Step]] = {
    "CMStochasticIterativeScheduler": (lambda sigma: {}, _from_noise),
    "DDPMScheduler": (lambda sigma: {"clip_sample": False, "thresholding": False}, _from_schedule),
    "DDIMScheduler": (lambda sigma: {"clip_sample": False, "thresholding": False}, _from_schedule),
    "EDMEulerScheduler": (lambda sigma: {"sigma_max": sigma}, _from_sigma_max),
    "FlowMatchEulerDiscreteScheduler": (lambda sigma: {"shift": 1.0, "use_dynamic_shifting": False}, _from_flow),
}
