"""What a training on data belongs to: its config and its very images. Checkpoints and sealed folders are held to it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from sfd_deploy.config import StageConfig, differing
from sfd_deploy.errors import RunError
from sfd_deploy.manifest import MANIFEST, Kind, read_manifest
from sfd_deploy.runs import require_room
from sfd_deploy.training.data import LabelledImages

WATCHED = frozenset({"monitor"})


def bound_to(config: StageConfig, data: LabelledImages, free: Collection[str] = WATCHED) -> dict[str, Any]:
    """What a training may only go on with: its config, less the keys that change no weight, and its data."""
    return {key: value for key, value in config.resolved().items() if key not in free} | {"data": data.digest}


def require_unmade(
    target: Path, kind: Kind, config: StageConfig, data: LabelledImages, free: Collection[str] = WATCHED
) -> None:
    """Refuse, before long work, to replace anything but an earlier folder of this very config and data.

    Raises:
        RunError: naming what differs.
    """
    require_room(target, kind)
    if not (target / MANIFEST).is_file():
        return
    made = read_manifest(target)
    earlier = {key: value for key, value in made.config.items() if key not in free}
    if changed := differing(earlier | {"data": made.facts.get("data_digest")}, bound_to(config, data, free)):
        raise RunError(
            f"{target}: holds a {kind} of another config or data ({changed} differ)",
            "choose another --output, or remove it",
        )
