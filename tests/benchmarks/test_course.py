"""Figures along one training: when it is looked at, at what, and that looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.course import changes_from, course, row, teachers_figures
from benchmarks.measured import measure
from benchmarks.sides import Task
from sfd_deploy.errors import ConfigError
from sfd_deploy.models.generator import load_teacher
from sfd_deploy.runtime.pytorch import GeneratorRuntime
from sfd_deploy.training.loop import SfdLoop
from tests.benchmarks.conftest import TINY_SIZES, calls_to, tiny_workshop


def test_looks_come_as_asked_and_at_the_end_and_are_of_the_very_average_that_an_unwatched_training_ends_with(
    tmp_path: Path,
):
    shop = tiny_workshop(tmp_path)
    sealed = shop.teacher(0)
    config = shop.config_of(0, sealed, {"iterations": 3})
    looks = list(course(Task(config, shop.labels, load_teacher(sealed), True), shop.judges, 2, TINY_SIZES))
    loop = SfdLoop(config, shop.labels, load_teacher(sealed))
    for step in range(3):
        loop.iterate(step)
    forgotten, retained = sorted(shop.labels.forget), shop.labels.retained
    runtime = GeneratorRuntime(loop.averaged())
    wanted = measure(runtime, forgotten, retained, shop.judges, TINY_SIZES, 0.0, "select")
    assert [look.step for look in looks] == [2, 3]
    assert looks[0].seconds < looks[1].seconds
    assert looks[1].found.model_copy(update={"seconds": 0.0}) == wanted
    assert looks[0].found.frechet != wanted.frechet


def test_ratios_are_to_the_teacher_on_the_same_latents(tmp_path: Path):
    shop = tiny_workshop(tmp_path)
    task = Task(shop.train_config, shop.labels, load_teacher(shop.teacher(0)), True)
    teacher = teachers_figures(task, shop.judges, TINY_SIZES)
    (look,) = course(task, shop.judges, 2, TINY_SIZES)
    assert row(look, look.found)[-2:] == ["1.00", "1.00"]
    assert row(look, teacher)[-1] == f"{look.found.frechet / teacher.frechet:.2f}"


def test_training_and_looks_are_on_the_device_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The GPU is planted: what is asked of it is done on the CPU."""
    asked = {name: calls_to(monkeypatch, f"benchmarks.course.{name}", place)
             for name, place in [("ours", 3), ("GeneratorRuntime", 1), ("TeacherRuntime", 2)]}  # fmt: skip
    waits: list[None] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waits.append(None))
    shop = tiny_workshop(tmp_path)
    task = Task(shop.train_config, shop.labels, load_teacher(shop.teacher(0)), True)
    teachers_figures(task, shop.judges, TINY_SIZES, device="cuda")
    looks = list(course(task, shop.judges, 1, TINY_SIZES, device="cuda"))
    assert asked == {"ours": ["cuda"], "GeneratorRuntime": ["cuda"] * len(looks), "TeacherRuntime": ["cuda"]}
    assert len(waits) == len(looks) == 2


def test_changes_are_read_as_yaml_and_anything_else_is_refused():
    assert changes_from(["objective=sid", "seed=3"]) == {"objective": "sid", "seed": 3}
    with pytest.raises(ConfigError, match="not key=value"):
        changes_from(["seed"])
