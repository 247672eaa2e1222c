"""The frame of a training by steps: an estimate first, a bar with its pace, checkpoints, Ctrl-C that saves.

For teachers and judges; score forgetting distillation, over several processes, has ``course``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from sfd_deploy.errors import DivergedError
from sfd_deploy.progress import LOGGER, progress_bar, stderr_console
from sfd_deploy.training.estimate import estimate
from sfd_deploy.training.interrupt import interrupt_between_steps

# A training of so few steps is over before an estimate of it would be.
WORTH_ESTIMATING = 20


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


def finite(loss: Tensor, task: str, step: int) -> float:
    """A loss as a number.

    Raises:
        DivergedError: it is none.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(f"{task} loss is {value} at step {step}", "lower `learning_rate`")
    return value


def require_finite_weights(task: str, networks: Iterable[nn.Module]) -> None:
    """Refuse to go on with networks that the last step spoilt, which no loss has seen.

    Raises:
        DivergedError: a weight or statistic that is not finite.
    """
    if not all(value.isfinite().all() for network in networks for value in network.state_dict().values()):
        raise DivergedError(f"{task}: weights are not finite after the last step", "lower `learning_rate`")


def run_steps(
    task: str, step: int, total: int, iterate: Callable[[int], str], save: Callable[[int], None], save_every: int
) -> None:
    """Call ``iterate(step)`` from ``step`` to ``total``; it returns a note for the bar.

    ``save(steps done)`` every ``save_every`` steps, at the end and on Ctrl-C.

    Raises:
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
                save(step)
                LOGGER.info("%s step %d of %d %s", task, step, total, note)
            if stop and step < total:
                stderr_console().print(f"{task}: saved step {step} of {total}", highlight=False)
                raise KeyboardInterrupt
