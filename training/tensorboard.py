"""TensorBoard event files of a training, resumable: a step is in them once, however often the training was killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from sfd_deploy.errors import BackendError, RunError


class Scalars:
    """Writes scalars below ``folder``; does nothing if not ``enabled``.

    Args:
        folder: TensorBoard's log folder; each start of a training adds one file.
        enabled: false on all processes of a distributed training but the first.
        step: the checkpoint's. What a killed run wrote after it is hidden from readers, since those
            steps are run again.

    Raises:
        BackendError: tensorboard is not installed.
        RunError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, enabled: bool, step: int = 0) -> None:
        self._writer = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BackendError(
                "tensorboard is not installed",
                "`pip install tensorboard`, or write `monitor: {tensorboard: false}`",
            ) from None
        try:
            self._writer = SummaryWriter(folder, purge_step=step + 1)
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror})", "choose a writable run folder") from None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write ``figures`` at ``step``; on disk when this returns, so that a checkpoint is never ahead of them."""
        if self._writer is None:
            return
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
