"""The scripts themselves, with tiny settings; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import reach
from benchmarks.measured import Sizes
from benchmarks.reach import Figures, Lap, Race
from benchmarks.sides import SIDES, Side, Task, open_task
from benchmarks.training import Speed, command, measure_speed, speed_text
from sfd_deploy.training.config import TrainConfig
from tests.conftest import TINY_LABELS, tiny_generator

TINY = TrainConfig.from_mapping(
    {"teacher": "unused", "iterations": 4, "retained_rows": 3, "forget_rows": 1, "precision": "fp32"}, "test"
)


def tiny_task() -> Task:
    return Task(TINY, TINY_LABELS, tiny_generator().denoiser, trained=True)


def test_rounds_are_interleaved_and_rates_are_of_retained_images(monkeypatch: pytest.MonkeyPatch):
    turns: list[str] = []
    now = [0.0]
    pace = {"ours": 1.0, "official": 3.0}

    def fake(name: str) -> Side:
        def iterate(_step: int) -> None:
            turns.append(name)
            now[0] += pace[name]

        return Side(iterate, tiny_generator())

    monkeypatch.setattr("benchmarks.sides.Task.side", lambda _self, name, _device: fake(name))
    speed = measure_speed(tiny_task(), "cpu", rounds=2, iterations=2, clock=lambda: now[0])
    measured = turns[8:]  # after the memory probes and the warm-up
    assert measured == ["ours"] * 2 + ["official"] * 4 + ["ours"] * 2
    assert speed.images_per_second("ours") == 3 / 1.0
    assert speed.images_per_second("official") == 3 / 3.0
    assert speed.ratios == [3.0, 3.0]


def test_both_sides_train_and_start_from_the_same_teacher():
    task = tiny_task()
    sides = {name: task.side(name, "cpu") for name in SIDES}
    starts = [torch.cat([p.flatten() for p in side.generator.parameters()]) for side in sides.values()]
    assert torch.equal(*starts)
    for side in sides.values():
        side.go(1, "cpu")
        assert side.step == 1
    ends = [torch.cat([p.flatten() for p in side.generator.parameters()]) for side in sides.values()]
    assert all(not torch.equal(start, end) for start, end in zip(starts, ends, strict=True))


def test_the_text_says_ratio_spread_and_both_batches():
    speed = Speed(3, 2, {"ours": [1.0, 1.0, 2.0], "official": [2.0, 3.0, 3.0]}, {"ours": 2**30, "official": 2**31})
    text = speed_text(tiny_task(), speed)
    assert "Ratio 2.00 (from 1.50 to 3.00 over 3 interleaved rounds" in text
    assert "3 + 1 rows" in text
    assert "3 + 3 rows" in text
    assert "2.0 GiB" in text


@pytest.mark.parametrize(("official_seconds", "code"), [(1.7, 1), (1.9, 0)])
def test_a_missed_ratio_exits_with_one(official_seconds, code, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    speed = Speed(3, 1, {"ours": [1.0, 1.0], "official": [official_seconds] * 2}, {"ours": 1, "official": 1})
    monkeypatch.setattr("benchmarks.training.open_task", lambda *_a, **_k: tiny_task())
    monkeypatch.setattr("benchmarks.training.measure_speed", lambda *_a: speed)
    page = tmp_path / "results.md"
    page.write_text("<!-- training speed cpu -->\n<!-- /training speed cpu -->\n")
    result = CliRunner().invoke(command, ["--page", str(page)], standalone_mode=False)
    assert result.exception is None
    assert result.return_value == code
    assert f"Ratio {official_seconds:.2f}" in page.read_text()
    assert "Objective: ours sid, official sid." in page.read_text()


def test_cifar10_is_timed_on_the_size_that_its_teachers_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    task = open_task("cifar10", precision="bf16")
    assert 30e6 < sum(weights.numel() for weights in task.teacher.unet.parameters()) < 60e6
    assert (task.teacher.unet.config["sample_size"], task.teacher.unet.config["in_channels"]) == (32, 3)
    assert (task.config.precision, task.config.retained_rows, task.labels.forget) == ("bf16", 128, {0: 1})


def test_the_command_changes_what_it_is_told_to_and_says_so(monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, object]] = []

    def open_with(_name: str, **changes: object) -> Task:
        asked.append(changes)
        return tiny_task()

    speed = Speed(3, 1, {"ours": [1.0], "official": [2.0]}, dict.fromkeys(SIDES, 1))
    monkeypatch.setattr("benchmarks.training.open_task", open_with)
    monkeypatch.setattr("benchmarks.training.measure_speed", lambda *_a: speed)
    said = [CliRunner().invoke(command, flags, standalone_mode=False).output
            for flags in ([], ["--compile", "--precision", "bf16"])]  # fmt: skip
    assert asked == [{}, {"compile": True, "precision": "bf16"}]
    assert ["--compile --precision bf16`" in text for text in said] == [False, True]


def test_a_config_without_its_teacher_is_timed_on_an_untrained_network_of_its_shape(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = open_task("digits")
    assert not task.trained
    assert task.teacher.unet.config["sample_size"] == 8
    assert task.labels.forget == {1: 0}
    assert "Networks untrained" in speed_text(
        task, Speed(3, 1, {"ours": [1.0], "official": [2.0]}, dict.fromkeys(SIDES, 1))
    )


@pytest.mark.parametrize(
    ("figures", "matches"),
    [
        (Figures(0.006, 0.85, 1.0), True),
        (Figures(0.002, 0.841, 1.09), True),
        (Figures(0.008, 0.85, 1.0), False),
        (Figures(0.002, 0.839, 1.0), False),
        (Figures(0.002, 0.85, 1.11), False),
        (Figures(0.0, 0.99, 0.1), True),
    ],
)
def test_a_row_is_reached_within_the_tolerances_or_better(figures, matches):
    assert figures.matches(Figures(0.002, 0.85, 1.0)) is matches


def race_of(monkeypatch: pytest.MonkeyPatch, arrives: dict[str, int], limit: int) -> Race:
    """Each side costs 1 (ours) or 2 seconds an iteration and has the target's figures from a given iteration on."""
    now, task = [0.0], tiny_task()
    made: dict[int, tuple[str, Side]] = {}

    def side(_self: Task, name: str, _device: str) -> Side:
        def iterate(_step: int) -> None:
            now[0] += {"ours": 1.0, "official": 2.0}[name]

        new = Side(iterate, tiny_generator())
        made[id(new.generator)] = (name, new)
        return new

    def figures(generator: object, *_: object) -> Figures:
        name, lap = made.get(id(generator), ("target", None))
        good = lap is None or lap.step >= arrives[name]
        return Figures(0.0, 0.9, 1.0) if good else Figures(0.5, 0.5, 9.0)

    monkeypatch.setattr("benchmarks.sides.Task.side", side)
    monkeypatch.setattr(reach, "_figures", figures)
    monkeypatch.setattr(reach, "load_generator", lambda _sealed: object())
    monkeypatch.setattr(reach.Run, "generator", lambda _self: None)
    monkeypatch.setattr(reach, "open_judge", lambda folder: folder)
    return reach.race(task, Path("run"), [Path("a")], "cpu", 2, limit, lambda _: None, clock=lambda: now[0])


def test_each_side_stops_where_it_arrives_and_the_ratio_is_of_their_seconds(monkeypatch: pytest.MonkeyPatch):
    found = race_of(monkeypatch, {"ours": 4, "official": 5}, limit=20)
    assert {name: (lap.side.step, lap.seconds) for name, lap in found.laps.items()} == {
        "ours": (4, 4.0), "official": (6, 12.0),
    }  # fmt: skip
    assert found.ratio == 3.0
    assert not found.missed(1.6)
    assert found.missed(3.1)
    assert "takes 3.00 times our time" in reach.text(found, 1.6)


def test_a_side_that_never_arrives_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch):
    slow_official = race_of(monkeypatch, {"ours": 2, "official": 99}, limit=5)
    assert slow_official.laps["official"].side.step == 5
    assert "at least 5.00 times our time" in reach.text(slow_official, 1.6)
    assert not slow_official.missed(1.6)
    assert race_of(monkeypatch, {"ours": 99, "official": 2}, limit=5).missed(0.0)


def test_looks_are_drawn_on_the_select_stream(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def measure(*arguments: object) -> object:
        asked.append(str(arguments[-1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(reach, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        reach._figures(tiny_generator(), TINY_LABELS, [], "cpu")
    assert asked == ["select"]
    assert Sizes.model_validate(json.loads(reach.LOOK.model_dump_json())) == reach.LOOK


def test_a_lap_begins_with_nothing_trained():
    assert Lap(Side(lambda _: None, tiny_generator())).seconds == 0.0
