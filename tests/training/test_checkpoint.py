"""The checkpoint's file: at every moment it is a whole one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from sfd_deploy.training.checkpoint import Checkpoint


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder / "c.safetensors", {"network": nn.Linear(2, 2)}, {}, {"seed": 0})


def test_a_kill_while_a_checkpoint_is_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint(tmp_path).save(1, {"record": "first"})

    def write_half_and_die(_tensors: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sfd_deploy.training.checkpoint.save_file", write_half_and_die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint(tmp_path).save(2, {"record": "second"})
    assert checkpoint(tmp_path).restore() == (1, {"record": "first"})
    checkpoint(tmp_path).save(2, {"record": "second"})
    assert checkpoint(tmp_path).restore() == (2, {"record": "second"})


def test_a_checkpoints_bytes_are_on_the_disk_before_it_takes_the_earlier_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a power cut may leave a file of zeros under the name, and no earlier one."""
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(("replace", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint(tmp_path).save(1, {})
    file = (tmp_path / "c.safetensors").stat().st_ino
    assert done == [("fsync", file), ("replace", file)]
