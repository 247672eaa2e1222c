"""Ctrl-C between steps: the first one is remembered, so that the loop can save and stop; a second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed.

    A KeyboardInterrupt inside a step would leave weights moved and their average not: the loop asks
    after each step, saves, and raises KeyboardInterrupt itself. Outside the main thread nothing changes.
    """
    asked = False

    def remember(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
