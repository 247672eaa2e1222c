"""Preview grids of a text-to-image training: a row a prompt, forget prompts first, the same latents every time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from sfd_deploy.config import StageConfig
from sfd_deploy.latents import Latents
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.generator import OneStepTextGenerator
from sfd_deploy.prompts import Prompts
from sfd_deploy.runtime.pytorch import GeneratorRuntime
from sfd_deploy.runtime.seam import draw_all
from sfd_deploy.training.previews import device_of, save_preview

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DRAWN_AT_ONCE = 4  # decoding is what needs memory
LEGEND = "prompts.txt"


class PreviewConfig(StageConfig):
    """Which pictures a training shows of itself. Changes no weight."""

    every: int = Field(50, ge=0, description="draw every so many iterations, and at the last; 0: never")
    prompts: int = Field(4, ge=1, description="forget prompts, and as many retained ones, a row each")
    images: int = Field(8, ge=1, description="images a prompt")


class TextPreviews:
    """Draws with the averaged generator and measures nothing: it takes no part in what is exported."""

    def __init__(self, config: PreviewConfig, prompts: Prompts, vae: AutoencoderKL, folder: Path) -> None:
        self.config, self.texts, self.vae, self.folder = config, prompts.texts, vae, folder
        self.asked = (*tuple(prompts.forget)[: config.prompts], *prompts.retained[: config.prompts])

    def due(self, step: int, last: bool = False) -> bool:
        """Whether ``step`` is one to look at."""
        return self.config.every > 0 and (last or step % self.config.every == 0)

    def look(self, step: int, generator: OneStepGenerator) -> None:
        """Write a grid, and which prompts its rows are."""
        drawing = OneStepTextGenerator(generator.denoiser, generator.sigma_init, self.vae)
        runtime = GeneratorRuntime(drawing.eval(), device_of(generator))
        latents = Latents.of_stream("select", 0, 0, len(self.asked) * self.config.images)
        asked = np.repeat(np.array(self.asked, np.int64), self.config.images)
        images = draw_all(runtime, latents, asked, DRAWN_AT_ONCE)
        save_preview(images.reshape(len(self.asked), self.config.images, *images.shape[1:]), self.folder, step)
        rows = "".join(f"{self.texts[prompt]}\n" for prompt in self.asked)
        (self.folder / LEGEND).write_text(rows, encoding="utf-8")
