"""A tiny network under every parameterisation: random weights, for mechanics."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler

from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser, EdmDenoiser, FlowDenoiser
from sfd_deploy.models.folder import write_denoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.network import NetworkConfig


def tiny_denoiser(kind: str, classes: int = 3, schedule: str = "linear") -> Denoiser:
    """16x16, one channel; ``kind`` as in tests/models/exact.py."""
    torch.manual_seed(0)
    unet = NetworkConfig(image_size=16, channels=1, block_channels=(8, 16), norm_groups=4).build(classes)
    unet.eval().requires_grad_(False)
    if kind == "flow":
        return FlowDenoiser(unet)
    if kind in {"edm", "edm-euler"}:
        return EdmDenoiser(unet, 0.5, 250.0 if kind == "edm" else 0.25)
    return DiscreteDenoiser(unet, DDPMScheduler(prediction_type=kind, beta_schedule=schedule))


def tiny_generator_of(kind: str, schedule: str = "linear") -> OneStepGenerator:
    """A generator of ``tiny_denoiser`` at sigma 2.5."""
    return OneStepGenerator(tiny_denoiser(kind, schedule=schedule), 2.5).eval()


def foreign_folder(folder: Path, kind: str = "epsilon", classes: int = 3) -> Path:
    """What somebody else saved with stock diffusers: ``unet/`` and ``scheduler/``, no manifest."""
    denoiser = tiny_denoiser(kind, classes)
    write_denoiser(denoiser, folder, denoiser.scheduler())
    return folder
