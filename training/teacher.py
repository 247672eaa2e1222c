"""Train a class-conditional EDM teacher on labelled images (Karras et al., arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
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
from sfd_deploy.progress import progress_bar
from sfd_deploy.runs import sealed_folder
from sfd_deploy.runtime.pytorch import TeacherRuntime
from sfd_deploy.training.checkpoint import Checkpoint
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.estimate import largest_batch
from sfd_deploy.training.memory import MemoryLimitError, is_out_of_memory
from sfd_deploy.training.previews import MOST_PER_LABEL, QUICK_SAMPLER, device_of, draw_by_label, save_preview
from sfd_deploy.training.schedule import linear_decay
from sfd_deploy.training.steps import run_steps, say_estimate
from sfd_deploy.training.streams import stream
from sfd_deploy.training.tensorboard import Scalars

CHECKPOINT_EVERY = 500
RECORD_EVERY = 10


class TeacherMonitor(StageConfig):
    """What is written for a person to look at while a teacher is trained; changes no weight."""

    every: int = Field(500, ge=0, description="a preview grid every so many steps, and at the last; 0: never")
    previews: int = Field(8, ge=0, le=MOST_PER_LABEL, description="images per label in a preview grid; 0: none")
    tensorboard: bool = Field(True, description="write TensorBoard event files")


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
    monitor: TeacherMonitor = TeacherMonitor()


def learning_rate_at(step: int, config: TeacherConfig) -> float:
    """Linear warm-up, constant, then linear decay to 0 over the last ``decay_share`` of the steps."""
    total = total_steps(config)
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * linear_decay(step, total, config.decay_share)


def total_steps(config: TeacherConfig) -> int:
    """Optimiser steps of a whole training."""
    return max(1, config.images // config.batch_size)


def teacher_loss(denoiser: EdmDenoiser, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """EDM loss, one value per image (B,): the weighted squared clean-image error, mean over pixels (eq. 8)."""
    predicted = denoiser(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
    loss: Tensor = edm_weight(sigma, denoiser.sigma_data) * (predicted - images).square().flatten(1).mean(1)
    return loss


def train_teacher(
    config: TeacherConfig, data: LabelledImages, checkpoint_file: Path, device: str = "cpu"
) -> EdmDenoiser:
    """Train to the end, resuming from ``checkpoint_file`` if it is there; returns the EMA denoiser.

    Preview grids and TensorBoard files go beside the checkpoint.

    Raises:
        DataError: the images do not fit the network.
        DivergedError: the loss is not finite.
        MemoryLimitError: the batch does not fit, with the one that would.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    shape = (config.network.channels, config.network.image_size, config.network.image_size)
    if data.images.shape[1:] != shape:
        raise DataError(
            f"images are {data.images.shape[1:]}, the network wants {shape}", "mend `network` in the config"
        )
    training = TeacherTraining(config, data, device)
    # What is watched changes no weight: a training goes on with other previews.
    bound = {key: value for key, value in config.resolved().items() if key != "monitor"}
    networks = {"net": training.unet, "ema": training.ema.network}
    checkpoint = Checkpoint(checkpoint_file, networks, {"adam": training.optimiser}, bound)
    step, _ = checkpoint.restore()
    total = total_steps(config)
    log = Scalars(checkpoint_file.parent / "tensorboard", enabled=config.monitor.tensorboard, step=step)
    watch = _Watch(training, checkpoint_file.parent / "previews", log)
    try:
        with log:
            say_estimate("teacher", training.iterate, total - step, training.networks, [training.optimiser], device)
            run_steps("teacher", step, total, watch.iterate, lambda done: checkpoint.save(done, {}), CHECKPOINT_EVERY)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return training.averaged
    # Outside the handler: the traceback there would keep the tensors that did not fit alive.
    raise _too_large(training)


class TeacherTraining:
    """Network, average and optimiser, and one step of them."""

    def __init__(self, config: TeacherConfig, data: LabelledImages, device: str) -> None:
        self.config, self.data, self.device = config, data, device
        torch.manual_seed(config.seed)
        unet = config.network.build(len(data.class_names))
        if config.init_from is not None:
            _copy_weights(resolve(config.init_from, "teacher"), unet)
        self.unet = unet.to(device)
        self.ema = Ema(self.unet, config.ema_decay)
        self.denoiser = EdmDenoiser(self.unet, config.sigma_data)
        self.averaged = EdmDenoiser(self.ema.network, config.sigma_data)
        self.optimiser = torch.optim.AdamW(self.unet.parameters(), lr=config.learning_rate, fused=True)
        self.networks: list[torch.nn.Module] = [self.unet, self.ema.network]

    def iterate(self, step: int, rows: int | None = None) -> float:
        """One optimiser step on ``rows`` images, the config's batch unless given; returns the loss.

        Raises:
            DivergedError: the loss is not finite.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(step, self.config)
        loss = self._loss(step, rows or self.config.batch_size)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f"teacher loss is {value} at step {step}", "lower `learning_rate`")
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.unet, step)
        return value

    def _loss(self, step: int, count: int) -> Tensor:
        config, draws = self.config, stream(self.config.seed, "teacher", step)
        rows = torch.randint(len(self.data), (count,), generator=draws)
        images, labels = self.data.batch(rows)
        sigma = (torch.randn(len(rows), generator=draws) * config.log_sigma_std + config.log_sigma_mean).exp()
        noise = torch.randn(images.shape, generator=draws)
        images, labels, sigma, noise = (values.to(self.device) for values in (images, labels, sigma, noise))
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=config.precision == "bf16"):
            return teacher_loss(self.denoiser, images, labels, sigma, noise).mean()


@dataclass
class _Watch:
    """Steps with what a person wants to see of them: scalars and, every so often, a preview grid of the average."""

    training: TeacherTraining
    folder: Path
    log: Scalars
    losses: list[float] = field(default_factory=list)

    def iterate(self, step: int) -> str:
        """One step; returns the bar's note."""
        training, config = self.training, self.training.config
        loss = training.iterate(step)
        self.losses.append(loss)
        done, last = step + 1, step + 1 == total_steps(config)
        if done % RECORD_EVERY == 0 or last:
            rate = learning_rate_at(step, config)
            self.log.write(done, {"teacher/loss": mean(self.losses), "teacher/learning-rate": rate})
            self.losses.clear()
        if config.monitor.previews and config.monitor.every and (last or done % config.monitor.every == 0):
            runtime = TeacherRuntime(training.averaged, QUICK_SAMPLER, training.device)
            labels = range(len(training.data.class_names))
            save_preview(draw_by_label(runtime, labels, config.monitor.previews), self.folder, done)
        return f"loss {loss:.4f}"


def _too_large(training: TeacherTraining) -> MemoryLimitError:
    batch, device = training.config.batch_size, training.device
    fits = largest_batch(lambda rows: training.iterate(0, rows), training.networks, [training.optimiser], device)
    if fits is None:
        mend = "lower `batch_size`"
    elif fits < 1:
        mend = "not even one image fits: use a smaller network"
    else:
        mend = f"about {min(fits, batch - 1)} images would fit: lower `batch_size`"
    return MemoryLimitError(f"out of memory on {device} with a batch of {batch}", f"{mend}; the checkpoint is kept")


def _copy_weights(source: Sealed, unet: torch.nn.Module) -> None:
    try:
        unet.load_state_dict(load_teacher(source).unet.state_dict())
    except RuntimeError:
        raise ConfigError(f"{source.folder}: its network is another than `network`", "copy its `network`") from None


def label_agreement(denoiser: EdmDenoiser, labels: Labels, judges: Sequence[Judge], per_label: int) -> dict[str, float]:
    """Share of the teacher's own samples that each judge calls by the label asked for, by the judge's name.

    Drawn on the ``select`` stream, with the sampler's defaults.
    """
    runtime = TeacherRuntime(denoiser, SamplerConfig(), device_of(denoiser))
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
