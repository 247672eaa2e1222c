"""Event files as TensorBoard's own reader sees them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sfd_deploy.errors import BackendError, RunError
from sfd_deploy.training.tensorboard import Scalars


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_killed_and_resumed_training_shows_each_step_once(tmp_path: Path):
    killed = Scalars(tmp_path, enabled=True)
    for step in range(1, 8):  # the checkpoint is of step 4; 5 to 7 are lost with the process
        killed.write(step, {"gap/retained": float(step), "watch/spread": 0.5})
    with Scalars(tmp_path, enabled=True, step=4) as resumed:
        for step in range(5, 9):
            resumed.write(step, {"gap/retained": 10.0 + step})
    found = read(tmp_path)
    assert found["gap/retained"] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 15), (6, 16), (7, 17), (8, 18)]
    assert found["watch/spread"] == [(step, 0.5) for step in range(1, 5)]


def test_what_was_written_is_on_disk_before_the_process_dies(tmp_path: Path):
    dying = Scalars(tmp_path, enabled=True)
    dying.write(3, {"gap/retained": 0.25})
    assert read(tmp_path) == {"gap/retained": [(3, 0.25)]}


def test_disabled_writes_nothing_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Scalars(tmp_path / "none", enabled=False) as scalars:
        scalars.write(1, {"gap/retained": 1.0})
    assert not (tmp_path / "none").exists()


def test_a_missing_package_and_an_unwritable_place_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Scalars(tmp_path / "file" / "log", enabled=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendError, match="tensorboard is not installed"):
        Scalars(tmp_path / "log", enabled=True)
