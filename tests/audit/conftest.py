from __future__ import annotations

import pytest

from tests.audit.text_toy import TextWorld, make_world
from tests.audit.toy import World, seal_judge, seal_teacher


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sealed toy teacher and two trained, sealed toy judges."""
    folder = tmp_path_factory.mktemp("toy")
    judges = (seal_judge(folder / "plain", "plain", 1), seal_judge(folder / "residual", "residual", 2))
    return World(seal_teacher(folder / "painter"), judges, (folder / "plain", folder / "residual"))


@pytest.fixture(scope="session")
def text_world(tmp_path_factory: pytest.TempPathFactory) -> TextWorld:
    """A sealed toy teacher of prompts, two judges of objects and two of colours."""
    return make_world(tmp_path_factory.mktemp("text-toy"))
