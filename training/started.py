"""What a training was started with, kept in its work folder so that it goes on from anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd_deploy.config import StageConfig
from sfd_deploy.runs import write_json

FILE = "started.json"


@dataclass(frozen=True)
class Started:
    """A training's config, and the folder from which the relative paths in it lead."""

    config: Any
    folder: Path
    source: str

    def here(self) -> Path:
        """That folder; the current one where it is gone, as when all of it was moved."""
        return self.folder if self.folder.is_dir() else Path.cwd()


def note_start(work: Path, config: StageConfig) -> None:
    """Keep ``config`` and the current folder."""
    write_json(work / FILE, {"config": config.resolved(), "folder": str(Path.cwd())})


def find_start(work: Path) -> Started | None:
    """What was kept in ``work``; None: nothing, or nothing readable."""
    file = work / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Started(values["config"], Path(values["folder"]), str(file))
    except (OSError, ValueError, KeyError, TypeError):
        return None
