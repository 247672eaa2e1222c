"""How a text-to-image teacher draws: DDIM on its own schedule, guided away from the empty prompt, then decoded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import ConfigError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import image_shape
from sfd_deploy.models.sampler import guided
from sfd_deploy.models.text.folder import load_parts
from sfd_deploy.models.text.generator import decode
from sfd_deploy.models.text.network import load_text_denoiser

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class TextSampler(StageConfig):
    """Steps and guidance; the defaults are those of stock ``StableDiffusionPipeline``."""

    guidance: float = Field(7.5, ge=1, description="scale of classifier-free guidance; 1: none")
    steps: int = Field(50, ge=1, description="DDIM steps")

    @classmethod
    def of(cls, teacher: Sealed, changes: Mapping[str, Any] | None = None) -> TextSampler:
        """What a teacher's manifest says, else the defaults; ``changes`` go before both.

        Raises:
            ConfigError: values out of range.
        """
        recorded = {"guidance": teacher.facts.get("guidance"), "steps": teacher.facts.get("sampler_steps")}
        said = {key: value for key, value in recorded.items() if value is not None}
        return cls.from_mapping(said | dict(changes or {}), str(teacher.folder))

    @property
    def network_evaluations(self) -> int:
        """Evaluations an image: with guidance two a step, in one doubled batch."""
        return self.steps if self.guidance == 1 else 2 * self.steps


class GuidedTextTeacher(nn.Module):
    """Standard-normal latents (B, C, h, w) and prompts' numbers (B,) to images (B, 3, H, W) in [-1, 1].

    ``denoiser``'s last condition is the empty prompt, which every other is guided away from.

    Raises:
        ConfigError: more steps than the schedule has.
    """

    def __init__(self, denoiser: Denoiser, vae: AutoencoderKL, sampler: TextSampler) -> None:
        super().__init__()
        self.denoiser, self.vae, self.sampler = denoiser, vae, sampler
        self.schedule: Any = copy.deepcopy(denoiser.scheduler())
        if sampler.steps > (most := self.schedule.config.num_train_timesteps):
            raise ConfigError(f"{sampler.steps} steps, the teacher's schedule has {most}", "take fewer")
        self.schedule.set_timesteps(sampler.steps)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        return image_shape(self.denoiser.unet)

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Images (B, 3, H, W); ``class_labels`` are the prompts' numbers."""
        away = torch.full_like(class_labels, len(self.denoiser.unet.table) - 1)
        noisy = latents * self.schedule.init_noise_sigma
        for timestep in self.schedule.timesteps:
            level = timestep.to(latents.device).expand(len(latents))
            output = guided(self._network, noisy, level, class_labels, away, self.sampler.guidance)
            noisy = self.schedule.step(output, timestep, noisy).prev_sample
        return decode(self.vae, noisy)

    def _network(self, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = self.denoiser.unet(noisy, timestep, class_labels=labels).sample
        return output


def load_guided_teacher(sealed: Sealed, texts: Sequence[str], sampler: TextSampler) -> GuidedTextTeacher:
    """The teacher of a verified pipeline folder, ready to draw; a condition is a position in ``texts``.

    Raises:
        ModelError: a part that cannot be used, or that does not predict what its scheduler says.
        PromptError: a text is too long.
        ConfigError: more steps than the schedule has.
    """
    parts = load_parts(sealed)
    denoiser = load_text_denoiser(parts, (*texts, ""))
    return GuidedTextTeacher(denoiser, parts.vae, sampler).eval()
