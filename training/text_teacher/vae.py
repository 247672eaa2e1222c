"""Train an image autoencoder on coloured objects: a stock ``AutoencoderKL`` (Rombach et al., arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfd_deploy.runtime.seam import Images
from sfd_deploy.training.frame import MonitorConfig, Training, train_to_end
from sfd_deploy.training.made import bound_to
from sfd_deploy.training.streams import stream
from sfd_deploy.training.text_teacher.coloured import SIDE, Wardrobe
from sfd_deploy.training.text_teacher.config import VaeConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CHECKPOINT_EVERY = 500
PREVIEW_ROWS = 4
MEASURED_IMAGES = 2048  # the latents' spread to three digits
MEASURED_AT_ONCE = 256


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """A randomly initialised autoencoder without attention, channels-last."""
    from diffusers import AutoencoderKL

    levels = config.levels
    vae: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(levels.block_channels),
        up_block_types=("UpDecoderBlock2D",) * len(levels.block_channels),
        block_out_channels=levels.block_channels,
        layers_per_block=levels.layers_per_block,
        norm_num_groups=levels.norm_groups,
        latent_channels=config.latent_channels,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    return vae.to(memory_format=torch.channels_last)


def vae_loss(images: Tensor, decoded: Tensor, mean: Tensor, log_variance: Tensor, config: VaeConfig) -> Tensor:
    """Squared and absolute error, means over pixels, and the KL from N(0, 1), a mean over latents: one number."""
    error = decoded - images
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
    return error.square().mean() + config.absolute_weight * error.abs().mean() + config.kl_weight * kl


def posterior(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, C, h, w) of the latents of ``images``, float32 whatever autocast does."""
    found = vae.encode(images).latent_dist
    return found.mean.float(), found.logvar.float()


def sampled(mean: Tensor, log_variance: Tensor, draws: torch.Generator) -> Tensor:
    """Latents from a posterior; the chance is drawn on the CPU, the same for every device."""
    return mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=draws).to(mean.device)


class VaeTraining(Training):
    """An autoencoder on objects coloured afresh for every batch."""

    def __init__(self, config: VaeConfig, data: Wardrobe, seed: int, device: str) -> None:
        self.config, self.data, self.seed = config, data, seed
        torch.manual_seed(seed)
        self.vae = build_vae(config)
        super().__init__("vae", config, self.vae, device)

    def loss(self, step: int, count: int) -> Tensor:
        """Mean loss of random objects."""
        draws = stream(self.seed, "vae", step)
        images = self.data.draw(count, draws).images.to(self.device)
        mean, log_variance = posterior(self.vae, images)
        decoded = self.vae.decode(sampled(mean, log_variance, draws)).sample
        return vae_loss(images, decoded.float(), mean, log_variance, self.config)

    def preview(self, per_row: int) -> Images:
        """Rows of painted objects, each above the row that the average makes of it."""
        images = self.data.draw(PREVIEW_ROWS * per_row, stream(self.seed, "vae-preview", 0)).images
        drawn = reconstructed(self.ema.network, images.to(self.device)).cpu()
        rows = [part.unflatten(0, (PREVIEW_ROWS, per_row)) for part in (images, drawn)]
        pairs: Images = torch.stack(rows, dim=1).flatten(0, 1).numpy()
        return pairs


@torch.inference_mode()
def reconstructed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """``images`` encoded, to the latents' mean, and decoded."""
    decoded: Tensor = vae.decode(posterior(vae, images)[0]).sample
    return decoded.clamp(-1, 1)


@dataclass(frozen=True)
class TrainedVae:
    """An autoencoder whose config holds its ``scaling_factor``, and its mean squared error on training images."""

    vae: AutoencoderKL
    squared_error: float


def train_vae(
    config: VaeConfig, data: Wardrobe, checkpoint_file: Path, monitor: MonitorConfig, seed: int, device: str = "cpu"
) -> TrainedVae:
    """Train to the end, resuming from ``checkpoint_file``; the average, scaled so that latents have spread 1.

    Raises:
        DivergedError, MemoryLimitError, ConfigError, ManifestError, KeyboardInterrupt: see ``train_to_end``.
    """
    training = VaeTraining(config, data, seed, device)
    bound = bound_to(config, data.grey) | {"seed": seed}
    train_to_end(training, checkpoint_file, bound, monitor, CHECKPOINT_EVERY)
    return _measured(training.ema.network, data, seed, device)


@torch.inference_mode()
def _measured(vae: AutoencoderKL, data: Wardrobe, seed: int, device: str) -> TrainedVae:
    latents, errors = [], []
    for part in data.draw(MEASURED_IMAGES, stream(seed, "vae-measured", 0)).images.split(MEASURED_AT_ONCE):
        images = part.to(device)
        latents.append(posterior(vae, images)[0])
        errors.append((reconstructed(vae, images) - images).square().mean())
    vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())
    return TrainedVae(vae, torch.stack(errors).mean().item())
