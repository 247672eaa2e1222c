"""How a text-to-image teacher is trained: its parts, each with its pace."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig, read_values
from sfd_deploy.models.network import LevelsConfig
from sfd_deploy.training.frame import MonitorConfig, PaceConfig
from sfd_deploy.training.teacher import TeacherConfig
from sfd_deploy.training.text_teacher.coloured import SIDE


class TextEncoderConfig(StageConfig):
    """Shape of a ``transformers.CLIPTextModel``."""

    width: int = Field(ge=1, description="of a token's vector; the U-Net's cross attention reads it")
    layers: int = Field(ge=1, description="transformer layers")
    heads: int = Field(ge=1, description="attention heads; divide the width")
    hidden: int = Field(ge=1, description="width of the layers between")

    @model_validator(mode="after")
    def heads_must_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")
        return self


class PromptedUnetConfig(LevelsConfig):
    """Shape of a ``diffusers.UNet2DConditionModel``."""

    attention_levels: tuple[int, ...] = Field((0,), description="levels (0 = full resolution) with cross attention")
    heads: int = Field(4, ge=1, description="attention heads on every level that has attention")

    @model_validator(mode="after")
    def heads_must_fit(self) -> Self:
        for level in self.attention_levels:
            if not 0 <= level < len(self.block_channels):
                raise ValueError(f"attention level {level}, but the network has {len(self.block_channels)} levels")
        # The middle block, on the last level, always attends.
        for level in sorted({*self.attention_levels, len(self.block_channels) - 1}):
            if self.block_channels[level] % self.heads:
                raise ValueError(f"{self.heads} heads do not divide {self.block_channels[level]} channels")
        return self


class VaeConfig(PaceConfig):
    """An image autoencoder and how it is trained: squared error + absolute error + a little KL, as means."""

    levels: LevelsConfig
    latent_channels: int = Field(4, ge=1, description="channels of the latents; Stable Diffusion's number")
    absolute_weight: float = Field(1.0, ge=0, description="of the absolute error beside the squared")
    kl_weight: float = Field(1e-4, ge=0, description="of the KL divergence from a standard normal, mean a latent")


class TextTeacherConfig(PaceConfig):
    """A tokenizer, an autoencoder, and a text encoder with its U-Net, whose pace the outer keys are."""

    kind: Literal["text-to-image"] = Field(description="without it, the config is of class labels")
    prompt_tokens: int = Field(24, ge=3, description="a prompt's length in tokens, start and end included")
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    unet: PromptedUnetConfig
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of prompts replaced by the empty one")
    guidance: float = Field(3.0, ge=1, description="of the previews and of what judges measure")
    sampler_steps: int = Field(20, ge=1, description="DDIM steps of the previews and of what judges measure")
    weights: Literal["fp32", "fp16"] = Field("fp32", description="what the folder's weights are saved in")
    seed: int = Field(0, ge=0, description="of weights, captions, images, noise levels and noise")
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def halvings_must_fit(self) -> Self:
        halvings = len(self.vae.levels.block_channels) + len(self.unet.block_channels) - 2
        if SIDE % 2**halvings:
            raise ValueError(f"{SIDE} pixels cannot be halved {halvings} times, as `vae` and `unet` together do")
        return self

    @property
    def latent_side(self) -> int:
        """Height and width of the latents: halved between the autoencoder's levels."""
        return int(SIDE // 2 ** (len(self.vae.levels.block_channels) - 1))


def load_teacher_config(name_or_file: str) -> TeacherConfig | TextTeacherConfig:
    """A teacher's config: one that has a ``kind`` is of text, another of class labels.

    Raises:
        ConfigError: naming the key, or no such preset or file.
    """
    values, source = read_values(name_or_file, "teacher")
    model = TextTeacherConfig if isinstance(values, dict) and "kind" in values else TeacherConfig
    return model.from_mapping(values, source)
