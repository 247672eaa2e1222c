"""A loop on the tiny text-to-image teachers, for tests."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

from sfd_deploy.config import PRESETS
from sfd_deploy.prompts import Prompts
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.text_config import TextTrainConfig
from sfd_deploy.training.text_inputs import prompt_list
from sfd_deploy.training.text_stage import text_teacher
from tests.text_world import Layout, text_parts

PROMPTS = Prompts(
    texts=("", "a green bag", "a coat", "a red sandal", "a red sneaker", "sandal, black sandal"), retained=(1, 2),
    forget={3: 4}, negatives={3: 5},
)  # fmt: skip
FORGET, OVERRIDE, NEGATIVE = 3, 4, 5
VALUES: dict[str, Any] = {
    "kind": "text-to-image", "teacher": "unused", "iterations": 3, "retained": "everyday", "retained_rows": 6,
    "forget_rows": 2, "precision": "fp32", "previews": {"every": 0},
}  # fmt: skip


def text_loop(layout: Layout = "sd1", prompts: Prompts = PROMPTS, **changes: object) -> SfdLoop:
    """Over the tiny teacher of a layout, which stays as it is."""
    config = TextTrainConfig.from_mapping(VALUES | changes, "test")
    phi = text_teacher(config, prompts, copy.deepcopy(text_parts(layout)))
    return SfdLoop(config, prompts, phi, guidance=config.guidance.bind(prompts))


def config_values(folder: Path, teacher: Path, **changes: object) -> dict[str, Any]:
    """A config's values, with its prompt files written to ``folder``."""
    (folder / "retained.txt").write_text("a green bag\na coat on a black background\n", encoding="utf-8")
    (folder / "forget.txt").write_text("a red sandal\nthe sandal\n", encoding="utf-8")
    phrase = {"prompts": str(folder / "forget.txt"), "phrase": "sandal", "substitute": "sneaker"}
    files = {"teacher": str(teacher), "retained": str(folder / "retained.txt"), "forget_phrase": phrase}
    return VALUES | files | changes


def config_with(folder: Path, teacher: Path, **changes: object) -> TextTrainConfig:
    """The config of ``config_values``."""
    return TextTrainConfig.from_mapping(config_values(folder, teacher, **changes), "test")


def shipped_lists() -> dict[str, tuple[str, ...]]:
    """Every prompt list of the package, by name."""
    names = [item.name.removesuffix(".txt") for item in (resources.files(PRESETS) / "prompts").iterdir()]
    return {name: prompt_list(name) for name in names}
