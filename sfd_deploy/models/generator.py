"""Teachers and one-step generators as folders: plain diffusers, no custom code.

A generator is a denoiser called once on pure noise at a fixed level: ``x = D(sigma_init * z; sigma_init, c)``
(SiD, arXiv 2404.04057), which stock diffusers computes in one step of the scheduler in its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfd_deploy.errors import LabelError, ManifestError, ModelError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.folder import contiguous, reason_of, write_denoiser
from sfd_deploy.models.parameterisation import read_denoiser

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class OneStepGenerator(nn.Module):
    """Standard-normal latents (B, C, H, W) and labels (B,) to images in [-1, 1], the whole step.

    This module is what is exported: noise scale, preconditioning, network, clamp. ``sigma_init`` is
    the noise level nearest to the one given that the network was trained at.
    """

    def __init__(self, denoiser: Denoiser, sigma_init: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigma_init = denoiser.nearest_sigma(sigma_init)

    def unclamped(self, latents: Tensor, labels: Tensor) -> Tensor:
        """The step without the final clamp, as training sees it."""
        sigma = latents.new_full((latents.shape[0],), self.sigma_init)
        clean: Tensor = self.denoiser(latents * self.sigma_init, sigma, labels)
        return clean

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1]."""
        return self.unclamped(latents, class_labels).clamp(-1, 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return image_shape(self.denoiser.unet)


def image_shape(unet: UNet2DModel) -> tuple[int, int, int]:
    """(C, H, W) of a network's images."""
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return (unet.config["in_channels"], height, width)


def save_generator(generator: OneStepGenerator, folder: Path) -> None:
    """Write ``generator`` as stock diffusers: a ``ConsistencyModelPipeline`` where that computes the same step.

    That is EDM with diffusers' consistency timesteps. Others are ``unet/`` and ``scheduler/`` alone; ``card`` has
    the loops that draw with them.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = generator.denoiser.one_step_scheduler(generator.sigma_init)
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        ConsistencyModelPipeline(unet=contiguous(generator.denoiser.unet), scheduler=scheduler).save_pretrained(
            folder, safe_serialization=True
        )
    else:
        write_denoiser(generator.denoiser, folder, scheduler)


def load_generator(sealed: Sealed) -> OneStepGenerator:
    """The generator of a verified folder, ready for inference.

    Raises:
        ModelError: a layout or parameterisation that cannot be used.
    """
    return OneStepGenerator(_denoiser_of(sealed), float(sealed.facts["sigma_init"])).eval()


def save_teacher(denoiser: Denoiser, folder: Path) -> None:
    """Write a teacher as ``unet/`` and ``scheduler/``; its class names go into the manifest's facts."""
    write_denoiser(denoiser, folder, denoiser.scheduler())


def load_teacher(sealed: Sealed) -> Denoiser:
    """The denoiser of a verified teacher folder, one label a class.

    Raises:
        ModelError: a layout or parameterisation that cannot be used; weights or images that are not finite.
        LabelError: the network knows another number of labels than the folder records.
    """
    denoiser = _denoiser_of(sealed)
    keep_labels(denoiser.unet, labels_of(sealed).count, sealed.folder)
    require_finite(denoiser, sealed.folder)
    return denoiser.eval()


@torch.no_grad()
def require_finite(denoiser: Denoiser, where: Path) -> None:
    """Refuse a teacher with a weight, or a first image, that is NaN or infinite, or that draws none.

    Raises:
        ModelError: naming it.
    """
    require_finite_weights(denoiser.unet, where)
    sigma = denoiser.nearest_sigma(1.0)
    shape = image_shape(denoiser.unet)
    try:
        clean = denoiser.eval()(torch.zeros(1, *shape), torch.tensor([sigma]), torch.zeros(1, dtype=torch.int64))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{where}: its network draws no image of {' x '.join(map(str, shape))} ({reason_of(error)})",
            "mend its config.json: each level of a UNet halves the size",
        ) from None
    if not clean.isfinite().all():
        raise ModelError(f"{where}: non-finite network: its prediction at sigma {sigma:.3g} is not a number",
                         "save its weights again, in float32")  # fmt: skip


def require_finite_weights(network: nn.Module, where: Path) -> None:
    """Refuse a network with a weight that is NaN or infinite.

    Raises:
        ModelError: naming it.
    """
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise ModelError(f"{where}: non-finite network: {name} holds NaN or infinity", "save its weights again")


def keep_labels(unet: UNet2DModel, classes: int, where: Path) -> None:
    """Drop the null label of guided training, the one row behind the classes: nothing may draw by it.

    Raises:
        LabelError: the network's labels are neither the classes nor those and one more.
    """
    rows = unet.config["num_class_embeds"]
    if rows == classes:
        return
    if rows != classes + 1:
        raise LabelError(f"{where}: the network knows {rows} labels, {classes} classes are named", f"name {rows}")
    table = unet.class_embedding.weight[:classes].clone()
    unet.class_embedding = nn.Embedding.from_pretrained(table, freeze=True)
    unet.register_to_config(num_class_embeds=classes)


def labels_of(sealed: Sealed) -> Labels:
    """Class names and the forget map that a teacher, generator or artefact records.

    Raises:
        ManifestError, ConfigError: they are missing or malformed.
        ModelError: it draws from prompts.
    """
    _require_labels(sealed)
    if "labels" not in sealed.facts:
        raise ManifestError(f"{sealed.folder}: its manifest records no labels", "make it again with its stage")
    return Labels.from_mapping(sealed.facts["labels"], str(sealed.folder))


def _require_labels(sealed: Sealed) -> None:
    if (sealed.folder / "text_encoder").is_dir():
        raise ModelError(
            f"{sealed.folder}: draws from prompts, and this takes class labels", "give a model of class labels"
        )


def _denoiser_of(sealed: Sealed) -> Denoiser:
    _require_labels(sealed)
    # Teachers sealed by 0.1 have no scheduler/: EDM, with sigma_data among the facts.
    sigma_data = sealed.facts.get("sigma_data")
    return read_denoiser(sealed.folder, None if sigma_data is None else float(sigma_data))
