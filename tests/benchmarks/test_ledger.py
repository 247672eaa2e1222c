from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.ledger import Ledger, metered, seconds_in
from sfd_deploy.config import StageConfig
from sfd_deploy.errors import ConfigError, ManifestError


class Figure(StageConfig):
    value: float


def test_a_result_is_made_once_and_found_by_the_next_process(tmp_path: Path):
    made: list[int] = []

    def make() -> Figure:
        made.append(1)
        return Figure(value=0.25)

    for _ in range(2):
        assert Ledger(tmp_path, {"n": 1}).result("sfd-0", Figure, make).value == 0.25
    assert len(made) == 1


def test_a_making_that_is_killed_leaves_no_result(tmp_path: Path):
    def die() -> Figure:
        raise KeyboardInterrupt

    ledger = Ledger(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        ledger.result("sfd-0", Figure, die)
    assert ledger.find("sfd-0", Figure) is None


def test_results_of_other_settings_are_refused_naming_the_key(tmp_path: Path):
    Ledger(tmp_path, {"samples": 10, "seed": 0})
    with pytest.raises(ConfigError, match=r"\(samples differ\)|settings \(samples\)"):
        Ledger(tmp_path, {"samples": 20, "seed": 0})


@pytest.mark.parametrize("text", ["{", "[1]", json.dumps({"other": 1})])
def test_a_damaged_result_is_one_line_naming_the_file(tmp_path: Path, text):
    ledger = Ledger(tmp_path, {})
    (tmp_path / "sfd-0.json").write_text(text)
    with pytest.raises(ManifestError, match=r"sfd-0\.json"):
        ledger.find("sfd-0", Figure)


def test_seconds_add_up_over_interrupted_calls(tmp_path: Path):
    file, now = tmp_path / "sfd.seconds.json", iter([10.0, 13.0, 100.0, 104.0])
    with pytest.raises(KeyboardInterrupt), metered(file, lambda: next(now)):
        raise KeyboardInterrupt
    assert seconds_in(file) == 3.0
    with metered(file, lambda: next(now)):
        pass
    assert seconds_in(file) == 7.0


def test_a_table_replaces_what_its_markers_hold_and_nothing_else(tmp_path: Path):
    file = tmp_path / "results.md"
    file.write_text("# A\n<!-- rows -->\nold\n<!-- /rows -->\nend\n")
    page.fill(file, "rows", "new")
    page.fill(file, "rows", "newer")
    assert file.read_text() == "# A\n<!-- rows -->\n\nnewer\n\n<!-- /rows -->\nend\n"


def test_a_page_without_the_markers_is_refused(tmp_path: Path):
    (tmp_path / "results.md").write_text("# A\n")
    with pytest.raises(ConfigError, match="no <!-- rows -->"):
        page.fill(tmp_path / "results.md", "rows", "new")


def test_a_mean_says_its_sample_standard_deviation_and_one_value_none():
    assert page.mean_sd([0.1, 0.2, 0.3], 1, 100) == "20.0 ± 10.0"
    assert page.mean_sd([0.123], 2) == "0.12"
