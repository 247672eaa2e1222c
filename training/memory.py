"""Out of memory: one line with the batch that would fit, in place of an allocator's traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sfd_deploy.errors import SfdError
from sfd_deploy.training import estimate
from sfd_deploy.training.loop import SfdLoop

# What PyTorch's CPU allocator says; on a GPU it raises a class of its own.
CPU_ALLOCATOR = "can't allocate memory"


class MemoryLimitError(SfdError):
    """A batch that does not fit into memory."""


@contextmanager
def saying_no_room(device: str) -> Iterator[None]:
    """Turn an allocator's error into one line, where no batch is at fault yet.

    Raises:
        MemoryLimitError: naming the device.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory on {device} before the first step: three networks and their optimisers do not fit"
        raise MemoryLimitError(what, "free memory, spread the training with FSDP2, or use a smaller network") from None


@contextmanager
def saying_what_fits(loop: SfdLoop) -> Iterator[None]:
    """Turn an allocator's error into one line with the largest batch that would fit.

    Raises:
        MemoryLimitError: naming batch and mend.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    # Outside the handler: the traceback there would keep the tensors that did not fit alive.
    raise _too_large(loop)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def _too_large(loop: SfdLoop) -> MemoryLimitError:
    config, workers = loop.config, loop.workers
    rows = -(-config.rows(loop.labels) // (workers.count * config.accumulate))
    what = f"out of memory on {workers.device} with {rows} rows at once"
    if config.share_generated:  # `accumulate` is refused beside it
        return MemoryLimitError(what, "leave `share_generated` out or lower the rows, and train into a new folder")
    fits = None if workers.count > 1 else largest_batch(loop)
    if fits is None:
        return MemoryLimitError(what, f"set `accumulate` to {2 * config.accumulate} or more; the checkpoint is kept")
    if fits < 1 or rows == 1:
        return MemoryLimitError(what, "not even one row fits; free memory or use a smaller network")
    fits = min(fits, rows - 1)  # more than did not fit is a misjudgement
    parts = -(-config.rows(loop.labels) // fits)
    return MemoryLimitError(
        what,
        f"about {fits} rows would fit: set `accumulate` to {parts}, which changes no result; the checkpoint is kept",
    )


def largest_batch(loop: SfdLoop) -> int | None:
    """About how many rows fit, from the memory of two small batches; None where that cannot be told."""
    whole = loop.config
    forget = 1 if loop.labels.forget else 0

    def iterate(rows: int) -> object:
        loop.config = whole.model_copy(update={"retained_rows": rows - forget, "forget_rows": 1, "accumulate": 1})
        return loop.iterate(0)

    try:
        return estimate.largest_batch(
            iterate, [loop.generator, loop.fake_score, loop.ema.network], [loop.generator_adam, loop.fake_score_adam],
            str(loop.workers.device),
        )  # fmt: skip
    finally:
        loop.config = whole
