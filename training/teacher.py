"""Train a class-conditional EDM teacher on labelled images (Karras et al., arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd_deploy.config import StageConfig
from sfd_deploy.embedded import resolve
from sfd_deploy.errors import ConfigError, DataError, DivergedError
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import Judge, require_same_classes
from sfd_deploy.models.denoiser import EdmDenoiser, edm_weight
from sfd_deploy.models.generator import image_shape, load_teacher, save_teacher
from sfd_deploy.models.network import Ema, NetworkConfig
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.progress import LOGGER, progress_bar
from sfd_deploy.runs import sealed_folder
from sfd_deploy.runtime.pytorch import TeacherRuntime
from sfd_deploy.training.checkpoint import Checkpoint
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.streams import stream

CHECKPOINT_EVERY = 500


class TeacherConfig(StageConfig):
    """How a teacher is trained; every default is a figure from arXiv 2206.00364 unless it says otherwise."""

    network: NetworkConfig
    class_names: tuple[str, ...] = Field(
        (), description="names in label order; empty: from the data's folders, or numbers"
    )
    init_from: str | None = Field(None, description="a teacher folder whose weights to start from")
    images: int = Field(ge=1, description="training images seen, with repetition")
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1.5e-3, gt=0, description="AdamW; measured on small networks")
    warmup_steps: int = Field(200, ge=0)
    decay_share: float = Field(0.4, ge=0, le=1, description="last part of the training with linear decay to 0")
    ema_decay: float = Field(0.9995, ge=0, lt=1)
    log_sigma_mean: float = Field(-1.2, description="mean of ln sigma")
    log_sigma_std: float = Field(1.2, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast of the network's forward pass")
    seed: int = Field(0, ge=0)


def learning_rate_at(step: int, config: TeacherConfig) -> float:
    """Linear warm-up, constant, then linear decay to 0 over the last ``decay_share`` of the steps."""
    total = total_steps(config)
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (total - step) / max(1.0, total * config.decay_share))
    return config.learning_rate * warm * left


def total_steps(config: TeacherConfig) -> int:
    """Optimiser steps of a whole training."""
    return max(1, config.images // config.batch_size)


def teacher_loss(denoiser: EdmDenoiser, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """EDM loss, one value per image (B,): the weighted squared clean-image error, mean over pixels (eq. 8)."""
    predicted = denoiser(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
    loss: Tensor = edm_weight(sigma, denoiser.sigma_data) * (predicted - images).square().flatten(1).mean(1)
    return loss


def train_teacher(config: TeacherConfig, data: LabelledImages, checkpoint_file: Path) -> EdmDenoiser:
    """Train to the end, resuming from ``checkpoint_file`` if it is there; returns the EMA denoiser.

    Raises:
        DataError: the images do not fit the network.
        DivergedError: the loss is not finite.
    """
    shape = (config.network.channels, config.network.image_size, config.network.image_size)
    if data.images.shape[1:] != shape:
        raise DataError(
            f"images are {data.images.shape[1:]}, the network wants {shape}", "mend `network` in the config"
        )
    torch.manual_seed(config.seed)
    unet = config.network.build(len(data.class_names))
    if config.init_from is not None:
        _copy_weights(resolve(config.init_from, "teacher"), unet)
    ema = Ema(unet, config.ema_decay)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, fused=True)
    checkpoint = Checkpoint(checkpoint_file, {"net": unet, "ema": ema.network}, {"adam": optimiser}, config.resolved())
    step, _ = checkpoint.restore()
    denoiser = EdmDenoiser(unet, config.sigma_data)
    total = total_steps(config)
    with progress_bar("teacher", total, step) as advance:
        while step < total:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(step, config)
            loss = _step(config, data, denoiser, step)
            if not torch.isfinite(loss):
                raise DivergedError(f"teacher loss is {loss.item()} at step {step}", "lower `learning_rate`")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.update(unet, step)
            step += 1
            advance(1, f"loss {loss.item():.4f}")
            if step % CHECKPOINT_EVERY == 0 or step == total:
                checkpoint.save(step, {})
                LOGGER.info("teacher step %d of %d loss %.4f", step, total, loss.item())
    return EdmDenoiser(ema.network, config.sigma_data)


def _copy_weights(source: Sealed, unet: torch.nn.Module) -> None:
    try:
        unet.load_state_dict(load_teacher(source).unet.state_dict())
    except RuntimeError:
        raise ConfigError(f"{source.folder}: its network is another than `network`", "copy its `network`") from None


def _step(config: TeacherConfig, data: LabelledImages, denoiser: EdmDenoiser, step: int) -> Tensor:
    draws = stream(config.seed, "teacher", step)
    rows = torch.randint(len(data), (config.batch_size,), generator=draws)
    images, labels = data.batch(rows)
    sigma = (torch.randn(len(rows), generator=draws) * config.log_sigma_std + config.log_sigma_mean).exp()
    noise = torch.randn(images.shape, generator=draws)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        return teacher_loss(denoiser, images, labels, sigma, noise).mean()


def label_agreement(denoiser: EdmDenoiser, labels: Labels, judges: Sequence[Judge], per_label: int) -> dict[str, float]:
    """Share of the teacher's own samples that each judge calls by the label asked for, by the judge's name.

    Drawn on the ``select`` stream, with the sampler's defaults.
    """
    runtime = TeacherRuntime(denoiser, SamplerConfig())
    hits = {judge.name: 0 for judge in judges}
    with progress_bar("agreement", labels.count) as advance:
        for label in range(labels.count):
            wanted = np.full(per_label, label, np.int64)
            images = runtime.draw(Latents.of_stream("select", 0, label * per_label, per_label), wanted)
            for judge in judges:
                hits[judge.name] += int((judge.look(images)[0] == label).sum())
            advance(1, labels.class_names[label])
    return {name: count / (labels.count * per_label) for name, count in hits.items()}


def seal_teacher(
    config: TeacherConfig, denoiser: EdmDenoiser, data: LabelledImages, target: Path, *, data_name: str,
    judges: Sequence[Judge] = (), per_label: int = 100,
) -> Sealed:  # fmt: skip
    """Measure a trained teacher with ``judges``, if any, and seal it as a folder that ``train`` opens.

    Raises:
        LabelError: a judge knows other classes.
    """
    labels = Labels(class_names=data.class_names)
    require_same_classes(judges, data.class_names, "the teacher")
    facts = {
        "labels": labels.resolved(),
        "sigma_data": config.sigma_data,
        "image_shape": list(image_shape(denoiser.unet)),
        "sampler": SamplerConfig().resolved(),
        "data": data_name,
        "images_seen": total_steps(config) * config.batch_size,
        "label_agreement": label_agreement(denoiser, labels, judges, per_label),
        "judge_accuracy_on_real_images": {judge.name: judge.accuracy for judge in judges},
        "samples_per_label": per_label if judges else 0,
    }
    parents = (resolve(config.init_from, "teacher").as_parent(),) if config.init_from else ()
    with sealed_folder(
        target, "teacher", parents=parents, config=config.resolved(), seed=config.seed, facts=facts
    ) as folder:
        save_teacher(denoiser, folder)
    return verify(target, "teacher")
