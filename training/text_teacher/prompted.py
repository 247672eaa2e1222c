"""Train a text encoder and a U-Net together on captioned latents: epsilon prediction on Stable Diffusion's schedule."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfd_deploy.runtime.seam import Images
from sfd_deploy.training.frame import Training, train_to_end
from sfd_deploy.training.made import WATCHED, bound_to
from sfd_deploy.training.streams import stream
from sfd_deploy.training.text_teacher.captions import BACKGROUNDS, COLOURS, OBJECTS, TEMPLATES, caption
from sfd_deploy.training.text_teacher.coloured import Painted, Wardrobe
from sfd_deploy.training.text_teacher.config import TextTeacherConfig
from sfd_deploy.training.text_teacher.pipeline import build_pipeline, draw_prompts, stable_diffusion_schedule
from sfd_deploy.training.text_teacher.vae import posterior, sampled

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

CHECKPOINT_EVERY = 500
# How the result is drawn and saved changes no weight either.
FREE = WATCHED | {"weights", "guidance", "sampler_steps"}


class PromptedNetwork(nn.Module):
    """Text encoder and U-Net as one network, for one optimiser and one average."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The predicted noise (B, C, h, w) in ``noisy`` at ``timesteps`` (B,) for ``tokens`` (B, L)."""
        vectors = self.text_encoder(tokens).last_hidden_state
        predicted: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=vectors).sample
        return predicted


def build_network(config: TextTeacherConfig, tokenizer: CLIPTokenizer) -> PromptedNetwork:
    """A randomly initialised stock ``CLIPTextModel`` and ``UNet2DConditionModel`` that fit ``tokenizer``."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text, unet = config.text_encoder, config.unet
    kinds = ["CrossAttnDownBlock2D" if level in unet.attention_levels else "DownBlock2D"
             for level in range(len(unet.block_channels))]  # fmt: skip
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=text.width, intermediate_size=text.hidden,
        num_hidden_layers=text.layers, num_attention_heads=text.heads, projection_dim=text.width,
        max_position_embeddings=config.prompt_tokens, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    network = UNet2DConditionModel(
        sample_size=config.latent_side, in_channels=config.vae.latent_channels,
        out_channels=config.vae.latent_channels, block_out_channels=unet.block_channels,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        layers_per_block=unet.layers_per_block, cross_attention_dim=text.width, norm_num_groups=unet.norm_groups,
        attention_head_dim=unet.heads,  # diffusers' name for the number of heads in this class
    )  # fmt: skip
    return PromptedNetwork(encoder, network.to(memory_format=torch.channels_last))


class CaptionTokens:
    """The tokens of every training caption, and of the empty prompt, encoded once.

    A caption is found by its numbers: template, object, colour, background.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        texts = [caption(*words).text for words in product(TEMPLATES, OBJECTS, COLOURS, BACKGROUNDS)]
        encoded = tokenizer(["", *texts], padding="max_length", return_tensors="pt").input_ids
        self.empty: Tensor = encoded[0]
        self.table: Tensor = encoded[1:].unflatten(0, (len(TEMPLATES), len(OBJECTS), len(COLOURS), len(BACKGROUNDS)))

    def draw(self, painted: Painted, dropout: float, draws: torch.Generator) -> Tensor:
        """Tokens (B, L) of a random caption of each image, or, with probability ``dropout``, of the empty prompt."""
        count = len(painted.objects)
        templates = torch.randint(len(TEMPLATES), (count,), generator=draws)
        dropped = torch.rand(count, generator=draws) < dropout
        chosen = self.table[templates, painted.objects, painted.colours, painted.backgrounds]
        return torch.where(dropped[:, None], self.empty, chosen)


class PromptedTraining(Training):
    """A text encoder and its U-Net on latents of objects coloured, and captioned, afresh for every batch."""

    def __init__(
        self, config: TextTeacherConfig, data: Wardrobe, tokenizer: CLIPTokenizer, vae: AutoencoderKL, device: str
    ) -> None:
        self.config, self.data, self.tokenizer, self.vae = config, data, tokenizer, vae
        self.captions, self.schedule = CaptionTokens(tokenizer), stable_diffusion_schedule()
        torch.manual_seed(config.seed)
        self.prompted = build_network(config, tokenizer)
        super().__init__("text-teacher", config, self.prompted, device)

    def loss(self, step: int, count: int) -> Tensor:
        """Mean squared error of the noise in random captioned latents at random timesteps."""
        draws = stream(self.config.seed, "text-teacher", step)
        painted = self.data.draw(count, draws)
        tokens = self.captions.draw(painted, self.config.prompt_dropout, draws).to(self.device)
        with torch.no_grad():
            mean, log_variance = posterior(self.vae, painted.images.to(self.device))
        latents = sampled(mean, log_variance, draws) * self.vae.config.scaling_factor
        timesteps = torch.randint(len(self.schedule.betas), (count,), generator=draws).to(self.device)
        noise = torch.randn(latents.shape, generator=draws).to(self.device)
        predicted = self.prompted(self.schedule.add_noise(latents, noise, timesteps), timesteps, tokens)
        error: Tensor = predicted.float() - noise
        return error.square().mean()

    def pipeline(self) -> StableDiffusionPipeline:
        """The average with the other parts."""
        average = self.ema.network
        return build_pipeline(self.tokenizer, self.vae, average.text_encoder, average.unet)

    def preview(self, per_row: int) -> Images:
        """A row an object, its colours and backgrounds in turn."""
        worn = [(colour, background) for background in BACKGROUNDS for colour in COLOURS]
        texts = [caption(TEMPLATES[3], name, *worn[place % len(worn)]).text
                 for name in OBJECTS for place in range(per_row)]  # fmt: skip
        images = draw_prompts(self.pipeline(), texts, self.config.guidance, self.config.sampler_steps)
        return images.reshape(len(OBJECTS), per_row, *images.shape[1:])


def train_prompted(
    config: TextTeacherConfig, data: Wardrobe, tokenizer: CLIPTokenizer, vae: AutoencoderKL, checkpoint_file: Path,
    device: str = "cpu",
) -> StableDiffusionPipeline:  # fmt: skip
    """Train to the end, resuming from ``checkpoint_file``; the average with the other parts.

    Raises:
        DivergedError, MemoryLimitError, ConfigError, ManifestError, KeyboardInterrupt: see ``train_to_end``.
    """
    training = PromptedTraining(config, data, tokenizer, vae, device)
    train_to_end(training, checkpoint_file, bound_to(config, data.grey, FREE), config.monitor, CHECKPOINT_EVERY)
    return training.pipeline()
