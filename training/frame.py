"""The frame of a training that one optimiser does: step, average, resume, estimate, scalars, previews, memory.

What is trained, and on what, is a child of ``Training``. Score forgetting distillation, of two networks
over several processes, has ``loop`` and ``course``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd_deploy.config import StageConfig
from sfd_deploy.models.network import Ema
from sfd_deploy.runtime.seam import Images
from sfd_deploy.training.checkpoint import Checkpoint
from sfd_deploy.training.distributed import require_alone
from sfd_deploy.training.estimate import largest_batch
from sfd_deploy.training.memory import MemoryLimitError, is_out_of_memory
from sfd_deploy.training.precision import AUTO, Precision, autocast
from sfd_deploy.training.previews import MOST_PER_LABEL, save_preview
from sfd_deploy.training.schedule import linear_decay
from sfd_deploy.training.steps import Skips, run_steps, say_estimate
from sfd_deploy.training.tensorboard import Scalars

RECORD_EVERY = 10


class MonitorConfig(StageConfig):
    """What is written for a person to look at while a network is trained; changes no weight."""

    every: int = Field(500, ge=0, description="a preview grid every so many steps, and at the last; 0: never")
    previews: int = Field(8, ge=0, le=MOST_PER_LABEL, description="images per label in a preview grid; 0: none")
    tensorboard: bool = Field(True, description="write TensorBoard event files")


class PaceConfig(StageConfig):
    """How far, how fast and how precisely one optimiser goes."""

    images: int = Field(ge=1, description="training images seen, with repetition")
    batch_size: int = Field(64, ge=1, description="images a step; ours, for short trainings")
    learning_rate: float = Field(1.5e-3, gt=0, description="AdamW's, weight decay 0.01; measured on small networks")
    warmup_steps: int = Field(200, ge=0, description="first steps, in which the learning rate rises linearly; ours")
    decay_share: float = Field(0.4, ge=0, le=1, description="last part of the training with linear decay to 0")
    ema_decay: float = Field(0.9995, ge=0, lt=1, description="of the averaged weights, which are kept, per step; ours")
    precision: Precision = Field("auto", description=f"autocast of the network's forward pass; auto: {AUTO}")


def learning_rate_at(step: int, config: PaceConfig) -> float:
    """Linear warm-up, constant, then linear decay to 0 over the last ``decay_share`` of the steps."""
    total = total_steps(config)
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * linear_decay(step, total, config.decay_share)


def total_steps(config: PaceConfig) -> int:
    """Optimiser steps of a whole training."""
    return max(1, config.images // config.batch_size)


class Training(ABC):
    """A network, its average and its optimiser, and one step of them.

    Args:
        task: what errors, the bar and the scalars call it.
        pace: of the optimiser.
        network: all that is trained.
        device: where.
    """

    def __init__(self, task: str, pace: PaceConfig, network: nn.Module, device: str) -> None:
        self.task, self.pace, self.device = task, pace, device
        self.network = network.to(device)
        self.ema = Ema(self.network, pace.ema_decay)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=pace.learning_rate, fused=True)
        self.networks: list[nn.Module] = [self.network, self.ema.network]
        self.skips = Skips(task, self.network)

    @abstractmethod
    def loss(self, step: int, count: int) -> Tensor:
        """Mean loss of ``count`` images; all chance comes from the step's own stream."""

    @abstractmethod
    def preview(self, per_row: int) -> Images:
        """Images (rows, per_row, C, H, W) in [-1, 1] that the average draws, from the same latents every time."""

    def iterate(self, step: int, rows: int | None = None) -> float:
        """One optimiser step on ``rows`` images, the config's batch unless given; returns the loss.

        Raises:
            DivergedError: losses or gradients stayed non-finite.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(step, self.pace)
        with autocast(self.device, self.pace.precision):
            loss = self.loss(step, rows or self.pace.batch_size)
        loss.backward()
        value = loss.item()
        if not self.skips.must(step, value):
            self.optimiser.step()
            self.ema.update(self.network, step)
        self.optimiser.zero_grad(set_to_none=True)
        return value


def train_to_end(
    training: Training, checkpoint_file: Path, bound: dict[str, Any], monitor: MonitorConfig, save_every: int
) -> None:
    """Train to the end, resuming from ``checkpoint_file`` if it is there; the result is ``training.ema``.

    ``bound`` is the config that a resumed training must share. Preview grids and TensorBoard files go
    beside the checkpoint.

    Raises:
        ConfigError, ManifestError: the checkpoint is of another config, or damaged; several processes.
        DivergedError: losses or gradients stayed non-finite, or a weight is; the last checkpoint stays.
        MemoryLimitError: the batch does not fit, with the one that would.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    require_alone(training.task)
    networks = {"net": training.network, "ema": training.ema.network}
    checkpoint = Checkpoint(checkpoint_file, networks, {"adam": training.optimiser}, bound)
    step, notes = checkpoint.restore()
    task, total = training.task, total_steps(training.pace)
    log = Scalars(checkpoint_file.parent / "tensorboard", enabled=monitor.tensorboard, step=step)
    watch = _Watch(training, monitor, checkpoint_file.parent / "previews", log)
    optimisers: list[torch.optim.Optimizer] = [training.optimiser]
    try:
        with log:
            say_estimate(task, training.iterate, total - step, training.networks, optimisers, training.device)
            training.skips.restore(notes)  # the probes' own skips are not the training's

            def save(done: int) -> None:
                checkpoint.save(done, training.skips.notes())

            run_steps(task, step, total, watch.iterate, save, save_every, training.networks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        training.skips.tell(total)
        return
    # Outside the handler: the traceback there would keep the tensors that did not fit alive.
    raise _too_large(training)


@dataclass
class _Watch:
    """Steps with what a person wants to see of them: scalars and, every so often, a preview grid of the average."""

    training: Training
    monitor: MonitorConfig
    folder: Path
    log: Scalars
    losses: list[float] = field(default_factory=list)

    def iterate(self, step: int) -> str:
        """One step; returns the bar's note."""
        training, monitor = self.training, self.monitor
        loss = training.iterate(step)
        self.losses.append(loss)
        done, last = step + 1, step + 1 == total_steps(training.pace)
        if done % RECORD_EVERY == 0 or last:
            rate = learning_rate_at(step, training.pace)
            task = training.task
            self.log.write(done, {f"{task}/loss": mean(self.losses), f"{task}/learning-rate": rate})
            self.losses.clear()
        if monitor.previews and monitor.every and (last or done % monitor.every == 0):
            save_preview(training.preview(monitor.previews), self.folder, done)
        return f"loss {loss:.4f}"


def _too_large(training: Training) -> MemoryLimitError:
    batch, device = training.pace.batch_size, training.device
    fits = largest_batch(lambda rows: training.iterate(0, rows), training.networks, [training.optimiser], device)
    if fits is None:
        mend = "lower `batch_size`"
    elif fits < 1:
        mend = "not even one image fits: use a smaller network"
    else:
        mend = f"about {min(fits, batch - 1)} images would fit: lower `batch_size`"
    return MemoryLimitError(
        f"out of memory on {device} with a batch of {batch}",
        f"{mend}, and train into a new folder: a checkpoint keeps to its config",
    )
