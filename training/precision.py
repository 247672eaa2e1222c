"""The precision that networks are computed in while they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch

from sfd_deploy.config import StageConfig

Precision = Literal["auto", "fp32", "bf16"]
AUTO = "bf16 on a GPU that computes in it and on a CPU with AMX, else fp32"

Config = TypeVar("Config", bound=StageConfig)


def computes_in_bf16(device: str) -> bool:
    """Whether ``device`` is the faster for bfloat16: a GPU that multiplies it, a CPU with AMX.

    Our U-Nets, forwards and backwards, took 1.4 to 1.6 times FP32's time on a CPU with AVX512-BF16 alone, and on one
    without even that more than 10 times.
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    find = getattr(torch.cpu, "get_capabilities", dict)  # younger than the oldest torch that will do
    capabilities: Mapping[str, Any] = find()
    return bool(capabilities.get("amx_bf16"))


def precision_on(device: str, precision: Precision) -> Literal["fp32", "bf16"]:
    """``auto`` as what ``device`` makes of it; another as it is."""
    if precision != "auto":
        return precision
    return "bf16" if computes_in_bf16(device) else "fp32"


def autocast(device: str, precision: Precision) -> torch.autocast:
    """The context that a forward pass of ``precision`` runs in."""
    enabled = precision_on(device, precision) == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def settled(config: Config, device: str) -> Config:
    """``config`` with every ``auto`` precision in it, nested ones too, replaced by what ``device`` makes of it.

    Checkpoints and manifests so say what was computed in.
    """
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, StageConfig):
            values[name] = settled(value, device)
        elif name == "precision":
            values[name] = precision_on(device, value)
    return config.model_copy(update=values)
