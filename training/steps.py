"""The frame of a training by steps: an estimate first, a bar with its pace, checkpoints, Ctrl-C that saves.

For teachers and judges; score forgetting distillation, over several processes, has ``course``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfd_deploy.errors import DivergedError
from sfd_deploy.progress import LOGGER, progress_bar, stderr_console
from sfd_deploy.training.estimate import estimate
from sfd_deploy.training.interrupt import interrupt_between_steps

# A training of so few steps is over before an estimate of it would be.
WORTH_ESTIMATING = 20
MAX_SKIPS_IN_A_ROW = 5
LOWER_RATE = "lower `learning_rate`, and train into a new folder: a checkpoint keeps to its config"
LOWER_SFD_RATES = (
    "lower generator_rate and fake_score_rate, or alpha, and train into a new folder: a checkpoint keeps to its config"
)


def say_estimate(
    task: str, step: Callable[[int], object], left: int, networks: Sequence[nn.Module],
    optimisers: Sequence[Optimizer], device: str, aloud: bool = True,
) -> None:  # fmt: skip
    """Say on stderr and in the log how long ``left`` steps take and how much memory; changes nothing else.

    Of several processes each must measure, and one, ``aloud``, says it.
    """
    if left < WORTH_ESTIMATING:
        return
    found = estimate(step, left, networks=networks, optimisers=optimisers, device=device)
    if not aloud:
        return
    LOGGER.info("%s: %s", task, found)
    stderr_console().print(f"{task}: {found}", highlight=False)


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether every value is a number."""
    return bool(torch.stack(torch._foreach_norm(gradients, math.inf)).max().isfinite())


class Skips:
    """Steps of one optimiser that are left out because their loss or a gradient is no number, and how many they were.

    Args:
        task: what errors call the training.
        network: what is trained.
    """

    def __init__(self, task: str, network: nn.Module) -> None:
        self.task, self.network = task, network
        self.total = self.in_a_row = 0

    def must(self, step: int, loss: float) -> bool:
        """Whether to leave ``step`` out, whose gradients are in the network.

        Raises:
            DivergedError: it is one too many in a row.
        """
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        if math.isfinite(loss) and all_finite(gradients):
            self.in_a_row = 0
            return False
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        LOGGER.warning("%s step %d skipped: non-finite loss or gradient (%d so far)", self.task, step, self.total)
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise DivergedError(
                f"{self.task} diverged: {self.in_a_row} non-finite steps in a row at step {step}", LOWER_RATE
            )
        return True

    def tell(self, total: int) -> None:
        """Say at the end how many of ``total`` steps were left out, if any.

        Raises:
            DivergedError: they were most, as in a training too short for so many in a row.
        """
        skipped = f"{self.total} of {total} steps skipped: non-finite loss or gradient"
        if 2 * self.total > total:
            raise DivergedError(f"{self.task} diverged: {skipped}", LOWER_RATE)
        if self.total:
            stderr_console().print(f"{self.task}: {skipped}", highlight=False)

    def notes(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Count on from a checkpoint's."""
        self.total, self.in_a_row = notes.get("skipped", 0), notes.get("skipped_in_a_row", 0)


def require_finite_weights(task: str, networks: Iterable[nn.Module], step: int) -> None:
    """Refuse networks that an update spoilt, which no loss has seen.

    Raises:
        DivergedError: a weight or statistic that is not finite.
    """
    if not all(value.isfinite().all() for network in networks for value in network.state_dict().values()):
        raise DivergedError(f"{task}: weights are not finite after {step} steps", LOWER_RATE)


def run_steps(
    task: str, step: int, total: int, iterate: Callable[[int], str], save: Callable[[int], None], save_every: int,
    networks: Sequence[nn.Module],
) -> None:  # fmt: skip
    """Call ``iterate(step)`` from ``step`` to ``total``; it returns a note for the bar.

    ``save(steps done)`` every ``save_every`` steps, at the end and on Ctrl-C, never with ``networks`` that are spoilt.

    Raises:
        DivergedError: a weight is not finite when it is to be saved; the last checkpoint stays.
        KeyboardInterrupt: Ctrl-C; what was done is saved.
    """
    first, began = step, time.monotonic()
    with progress_bar(task, total, step) as advance, interrupt_between_steps() as asked:
        while step < total:
            note = iterate(step)
            step += 1
            advance(1, f"{note}, {(step - first) / (time.monotonic() - began):.2f} it/s")
            stop = asked()
            if stop or step == total or step % save_every == 0:
                require_finite_weights(task, networks, step)
                save(step)
                LOGGER.info("%s step %d of %d %s", task, step, total, note)
            if stop and step < total:
                stderr_console().print(f"{task}: saved step {step} of {total}", highlight=False)
                raise KeyboardInterrupt
