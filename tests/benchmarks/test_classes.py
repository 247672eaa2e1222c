from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.classes import Classes, Task, command, override_for, tasks_for, text
from benchmarks.ledger import Ledger
from benchmarks.workshop import Workshop
from sfd_deploy.manifest import verify
from tests.benchmarks.conftest import TINY_SIZES, tiny_workshop

# Share of real images of the row's class that either judge calls the column's.
MATRIX = np.array([
    [0.90, 0.00, 0.10, 0.02],
    [0.00, 0.99, 0.00, 0.01],
    [0.08, 0.01, 0.95, 0.00],
    [0.00, 0.00, 0.03, 0.97],
])  # fmt: skip


def test_the_override_is_the_class_that_is_mistaken_for_the_forget_label_least():
    assert override_for(2, (), MATRIX) == 1  # 0.10, 0.00, 0.03 in column 2
    assert override_for(2, (1,), MATRIX) == 3  # label 1 is forgotten too


def test_of_equals_the_one_that_forget_images_are_called_least_wins_then_the_first():
    assert override_for(0, (), MATRIX) == 1  # 1 and 3 tie at 0.00 in column 0; 0 is called 1 never, 3 in 2 %
    assert override_for(1, (), MATRIX) == 0  # 0 and 3 tie at 0.00 in column 1; 1 is called 0 never, 3 in 1 %
    assert override_for(1, (), np.eye(4)) == 0


def test_every_class_is_forgotten_alone_then_two_three_and_one_after_another():
    tasks = tasks_for(np.eye(10))
    assert [sorted(task.forget) for task in tasks] == [[label] for label in range(10)] + [[0, 1], [0, 1, 2], [1]]
    assert [sorted(task.all_forgotten) for task in tasks[-3:]] == [[0, 1], [0, 1, 2], [0, 1]]
    for task in tasks:
        assert not set(task.all_forgotten) & set(task.all_forgotten.values())


def test_a_first_run_that_was_made_alone_already_is_not_made_again():
    tasks = tasks_for(MATRIX)  # alone, 0 goes to 1, which the second run forgets: it cannot stand for 0
    assert tasks[0].forget == {0: 1}
    assert tasks[-1].after == Task("first-of-two", {0: 3})
    away = MATRIX.copy()
    away[1, 0] = 0.5
    assert tasks_for(away)[-1].after == tasks_for(away)[0]


def test_runs_one_after_another_keep_what_was_forgotten_and_make_table_and_picture(tmp_path: Path):
    classes = Classes(tiny_workshop(tmp_path), Ledger(tmp_path / "results", {}), TINY_SIZES)
    first = Task("class-0", {0: 3})
    second = Task("one-after-the-other", {1: 3}, after=first)
    table = text(classes, [first, second], "here")
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + 1 + 2
    sealed = verify(tmp_path / "seed-0" / "one-after-the-other" / "generator", "generator")
    assert sealed.facts["labels"]["forget"] == {"0": 3, "1": 3}
    assert classes.measured(second).retained.keys() == set(range(2, 10))
    assert classes.picture([first, second]).size == ((10 * 10 - 2) * 2, (2 * 10 - 2) * 2)
    assert classes.work([first, second]).iterations == 0


def test_one_command_makes_the_table_the_picture_and_its_place_in_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Workshop, "of_preset", lambda _name, home, _images, device: tiny_workshop(home, device=device))
    monkeypatch.setattr("benchmarks.classes.tasks_for", lambda _matrix: [Task("class-0", {0: 3})])
    monkeypatch.setattr("benchmarks.classes.SIZES", TINY_SIZES)
    page, picture = tmp_path / "results.md", tmp_path / "classes.png"
    page.write_text("<!-- classes digits -->\n<!-- /classes digits -->\n")
    arguments = ["--data", "digits", "-o", str(tmp_path), "--page", str(page), "--picture", str(picture)]
    done = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert done.exception is None
    assert done.return_value == 0
    assert "| 0 → 3 | " in page.read_text()
    assert "`python -m benchmarks.classes --data digits`; " in page.read_text()
    with Image.open(picture) as drawn:
        assert drawn.size == ((10 * 10 - 2) * 2, 8 * 2)
