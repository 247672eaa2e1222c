from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks import curves, page
from benchmarks.rows import command
from sfd_deploy.errors import RunError

PLAIN = [{"step": 10, "gap_retained": 0.1}, {"step": 20, "gap_retained": 0.01}]
FORGETFUL = [{**row, "gap_forget": 2 * row["gap_retained"]} for row in PLAIN]


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(folder: Path, **records: list[dict[str, float]]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of the picture of some trainings."""
    files = {name: write(folder / f"{name}.jsonl", rows) for name, rows in records.items()}
    curves.draw(files, folder / "curves.png")
    with Image.open(folder / "curves.png") as picture:
        return np.asarray(picture)


def test_a_training_that_forgets_nothing_has_one_curve_and_a_row_without_a_gap_no_point(tmp_path: Path):
    rows = [*FORGETFUL, {"step": 30, "fake_score_loss": 1.0}]
    assert curves.points_of(write(tmp_path / "plain", PLAIN)) == {"gap_retained": [(10, 0.1), (20, 0.01)]}
    assert curves.points_of(write(tmp_path / "both", rows)) == {
        "gap_retained": [(10, 0.1), (20, 0.01)], "gap_forget": [(10, 0.2), (20, 0.02)],
    }  # fmt: skip


def test_the_picture_is_of_the_record(tmp_path: Path):
    first, again = (drawn(tmp_path, sfd=FORGETFUL) for _ in range(2))
    assert np.array_equal(first, again)
    other = [FORGETFUL[0], {**FORGETFUL[1], "gap_forget": 0.05}]
    assert not np.array_equal(first, drawn(tmp_path, sfd=other))
    assert not np.array_equal(first, drawn(tmp_path, sfd=PLAIN))
    assert not np.array_equal(first, drawn(tmp_path, sfd=FORGETFUL, distilled=PLAIN))
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".png", ".jsonl", ".jsonl"]  # nothing half written


def test_a_decade_is_as_high_anywhere(tmp_path: Path):
    """On a logarithmic axis 0.1 lies half-way between 1 and 0.01."""
    line = drawn(tmp_path, sfd=[{"step": step, "gap_retained": 10.0**-step} for step in range(3)])
    blue = np.argwhere((line[..., 2] > 150) & (line[..., 0] < 60))  # C0, legend included
    curve = blue[blue[:, 1] < line.shape[1] * 0.6]  # the legend is on the right, where the curve is low
    top, left = curve[curve[:, 1].argmin()]
    slopes = [(row - top) / (column - left) for row, column in curve if column > left + 100]
    assert np.ptp(slopes) < 0.05


def test_no_trainings_are_an_empty_picture(tmp_path: Path):
    assert drawn(tmp_path).size


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    with pytest.raises(RunError, match="cannot be written"):
        curves.draw({}, tmp_path / "none" / "curves.png")


def test_a_missing_matplotlib_is_one_line_before_any_training(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setenv("SFD_DEPLOY_DATA", str(tmp_path))  # no images there: nothing is trained by mistake
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["rows", "--data", "fashion-mnist-32", "-o", str(out), "--curves", "curves.png"])
    with pytest.raises(SystemExit) as stopped:
        page.run(command)
    assert stopped.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not out.exists()
