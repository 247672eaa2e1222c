"""The shipped teacher of prompts and its judges: whole, small, and it draws what it is asked for."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from sfd_deploy.embedded import HERE, judges_knowing, resolve
from sfd_deploy.latents import Latents
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.runtime import open_text_runtime
from sfd_deploy.training.text_teacher.coloured import load_coloured

OBJECTS = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
EACH = 4  # images of each object, in as many colours
MIB = 2**20


@pytest.fixture(scope="module")
def judges() -> dict[str, Judge]:
    return {folder.name: open_judge(folder) for folder in judges_knowing([*OBJECTS, *COLOURS])}


def test_two_judges_of_objects_and_two_of_colours_are_shipped(judges):
    known = {name: judge.class_names for name, judge in judges.items()}
    assert known == {
        "judge-colour-plain": COLOURS, "judge-colour-residual": COLOURS,
        "judge-object-plain": OBJECTS, "judge-object-residual": OBJECTS,
    }  # fmt: skip
    assert len({judge.digest for judge in judges.values()}) == 4


def test_the_object_judges_see_sneakers_and_sandals_through_patches(judges, fashion_data: Path):
    """What one step spoils is patchy; judges of clean images alone called one in six of these sneakers sandals."""
    data = load_coloured(fashion_data, "test", "object", seed=0)
    images, labels = data.patchy_batch(torch.arange(len(data)), 1.0, torch.Generator().manual_seed(0))
    shown = {name: images[labels == OBJECTS.index(name)].numpy() for name in ("sneaker", "sandal")}
    looking = [judge for name, judge in judges.items() if "object" in name]
    sandal = OBJECTS.index("sandal")
    called = {name: [judge.look(some)[0] == sandal for judge in looking] for name, some in shown.items()}
    assert np.any(called["sneaker"], axis=0).mean() <= 0.03
    assert min(np.mean(found) for found in called["sandal"]) >= 0.93


def test_the_teacher_is_small_enough_to_ship():
    assert resolve("fashion-t2i", "teacher").facts["prompt_tokens"] == 24
    files = [path for path in (HERE / "fashion-t2i" / "teacher").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * MIB


def test_the_guided_teacher_draws_the_object_and_the_colour_asked_for(judges):
    asked = [(number, (number + turn) % len(COLOURS)) for number in range(len(OBJECTS)) for turn in range(EACH)]
    texts = [f"a photo of a {COLOURS[colour]} {OBJECTS[number]}" for number, colour in asked]
    with closing(open_text_runtime(resolve("fashion-t2i", "teacher"), texts)) as teacher:
        images = teacher.draw(Latents.of_stream("select", 0, 0, len(texts)), np.arange(len(texts)))
    wanted = {"object": [number for number, _ in asked], "colour": [colour for _, colour in asked]}
    for name, judge in judges.items():
        right = np.mean(judge.look(images)[0] == wanted[name.split("-")[1]])
        assert right >= 0.8, name  # chance: 0.1 and 0.17
