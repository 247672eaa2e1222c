"""Results that outlive a kill: one JSON file each, written whole or not at all, bound to their settings."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import ConfigError, ManifestError
from sfd_deploy.runs import write_json

Result = TypeVar("Result", bound=StageConfig)
SETTINGS = "settings.json"
NOTE_EVERY_SECONDS = 5.0


class Ledger:
    """The results of one table below ``folder``.

    Raises:
        ConfigError: ``folder`` holds results of other ``settings``; names what differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(settings))
        file = folder / SETTINGS
        if not file.exists():
            write_json(file, wanted)
        found = _read(file)
        if changed := sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)):
            raise ConfigError(
                f"{folder}: holds results of other settings ({', '.join(changed)})", "choose another --output folder"
            )

    def find(self, name: str, kind: type[Result]) -> Result | None:
        """The result kept under ``name``, None if there is none.

        Raises:
            ManifestError: the file is not a result of this version.
        """
        file = self._file(name)
        if not file.exists():
            return None
        try:
            return kind.model_validate(_read(file))
        except ValidationError:
            raise ManifestError(f"{file}: not a result of this version", "delete it and run again") from None

    def result(self, name: str, kind: type[Result], make: Callable[[], Result]) -> Result:
        """The result kept under ``name``, made and kept now if there is none."""
        found = self.find(name, kind)
        if found is None:
            found = make()
            write_json(self._file(name), found.resolved())
        return found

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        raise ManifestError(f"{file}: unreadable", "delete it and run again") from None
    if not isinstance(found, dict):
        raise ManifestError(f"{file}: not a JSON object", "delete it and run again")
    return found


@contextmanager
def metered(file: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Add the block's seconds to the count in ``file``, noted while it runs: a kill loses a few seconds of it.

    Work that a resumed training repeats since its last checkpoint counts twice: it was spent twice.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    before, began = seconds_in(file), clock()
    done = threading.Event()

    def note() -> None:
        write_json(file, {"seconds": before + clock() - began})

    def keep_noting() -> None:
        while not done.wait(NOTE_EVERY_SECONDS):
            note()

    thread = threading.Thread(target=keep_noting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        note()


def seconds_in(file: Path) -> float:
    """The count in ``file``; 0 if there is none."""
    return float(_read(file)["seconds"]) if file.exists() else 0.0
