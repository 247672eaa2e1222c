"""Which stock diffusers network, as a config; and the exponential moving average of one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sfd_deploy.config import StageConfig
from sfd_deploy.models.folder import MOST_CHANNELS

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class LevelsConfig(StageConfig):
    """Channels of a network with halvings between its levels."""

    block_channels: tuple[int, ...] = Field(min_length=1, description="channels per resolution level")
    layers_per_block: int = Field(1, ge=1, description="residual layers per level")
    norm_groups: int = Field(8, ge=1, description="groups of every GroupNorm; divides each entry of block_channels")

    @model_validator(mode="after")
    def groups_must_fit(self) -> Self:
        for channels in self.block_channels:
            if channels < 1:
                raise ValueError("channels must be positive")
            if channels % self.norm_groups:
                raise ValueError(f"norm_groups {self.norm_groups} do not divide {channels} channels")
        return self


class NetworkConfig(LevelsConfig):
    """Shape of a class-conditional ``diffusers.UNet2DModel``."""

    image_size: int = Field(ge=8, description="height and width in pixels")
    channels: int = Field(ge=1, le=MOST_CHANNELS, description="image channels")
    attention_levels: tuple[int, ...] = Field((), description="levels (0 = full resolution) with self-attention")
    middle_attention: bool = Field(False, description="self-attention in the middle block")
    head_channels: int = Field(32, ge=1, description="channels per attention head")
    time_scale_shift: bool = Field(
        False, description="condition by scale and shift of each GroupNorm, not a bias alone"
    )

    @model_validator(mode="after")
    def levels_must_fit(self) -> Self:
        halvings = len(self.block_channels) - 1
        if self.image_size % 2**halvings:
            raise ValueError(f"image_size {self.image_size} cannot be halved {halvings} times: use fewer levels")
        return self

    @model_validator(mode="after")
    def heads_must_fit(self) -> Self:
        levels = {*self.attention_levels, *([len(self.block_channels) - 1] if self.middle_attention else [])}
        for level in sorted(levels):
            if not 0 <= level < len(self.block_channels):
                raise ValueError(f"attention level {level}, but the network has {len(self.block_channels)} levels")
            if self.block_channels[level] % self.head_channels:
                raise ValueError(
                    f"head_channels {self.head_channels} do not divide {self.block_channels[level]} channels"
                )
        return self

    def build(self, num_classes: int) -> UNet2DModel:
        """A randomly initialised network for ``num_classes`` labels, in channels-last memory format."""
        from diffusers import UNet2DModel

        kinds = ["AttnDownBlock2D" if i in self.attention_levels else "DownBlock2D"
                 for i in range(len(self.block_channels))]  # fmt: skip
        ups = [kind.replace("Down", "Up") for kind in reversed(kinds)]
        unet = UNet2DModel(
            sample_size=self.image_size,
            in_channels=self.channels,
            out_channels=self.channels,
            block_out_channels=self.block_channels,
            layers_per_block=self.layers_per_block,
            down_block_types=tuple(kinds),
            up_block_types=tuple(ups),
            add_attention=self.middle_attention,
            attention_head_dim=self.head_channels,
            resnet_time_scale_shift="scale_shift" if self.time_scale_shift else "default",
            norm_num_groups=self.norm_groups,
            num_class_embeds=num_classes,
        )
        return unet.to(memory_format=torch.channels_last)


class Ema:
    """Exponential moving average of a network's parameters, with the ramp min(decay, (1 + k) / (10 + k)) or none."""

    def __init__(self, network: nn.Module, decay: float, ramp: bool = True) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """Move towards ``source`` after optimiser step number ``step`` (from 0)."""
        weight = 1 - (min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay)
        ours: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(source.parameters())
        torch._foreach_lerp_(ours, theirs, weight)
