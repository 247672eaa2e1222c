"""Progress for people on stderr, and a log file beside the work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sfd_deploy.errors import RunError

LOGGER = logging.getLogger("sfd_deploy")


def stderr_console() -> Console:
    """A console on stderr: stdout is for results; NO_COLOR and non-terminals are honoured by rich."""
    return Console(stderr=True)


@contextmanager
def progress_bar(task: str, total: int, completed: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar with count, elapsed and remaining time; yields ``advance(steps, note)``."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    console = stderr_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        handle = bar.add_task(task, total=total, completed=completed, note="")
        yield lambda steps, note: bar.update(handle, advance=steps, note=note)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append the package's log records to ``path`` while the block runs.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})", "choose a writable run folder") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
