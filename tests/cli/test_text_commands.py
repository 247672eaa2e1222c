"""``sample`` and ``bench`` of text-to-image runs, as their users meet them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.latents import Latents
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.runtime import open_text_runtime
from tests.export.text_runs import exported_text_run
from tests.text_world import text_pipeline

ARTEFACT = "onnx-cpu-fp32"


@pytest.fixture(scope="module")
def text_run() -> Run:
    return exported_text_run("sd2")[0]


def test_prompts_are_drawn_a_row_each_in_the_order_given(
    text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = ("the red man", "a [blue] bag")
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    output = tmp_path / "grid.png"
    arguments = ["sample", str(text_run.folder), *asked, "-n", "3", "--seed", "5", "-o", str(output)]
    assert exit_code_of([*arguments, "--artefact", ARTEFACT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == list(prompts)
    runtime = open_text_runtime(text_run.artefact(ARTEFACT), prompts, "cpu")
    images = runtime.draw(Latents.of_stream("sample", 5, 0, 6), np.array([0, 0, 0, 1, 1, 1]))
    with Image.open(output) as picture:
        sheet = np.asarray(picture).astype(int)
    assert sheet.shape == (2 * 17 - 1, 3 * 17 - 1, 3)
    tiles = [sheet[17 * row : 17 * row + 16, 17 * column : 17 * column + 16] for row in (0, 1) for column in range(3)]
    assert np.abs(np.stack(tiles).transpose(0, 3, 1, 2) - (images + 1) * 127.5).max() <= 1
    assert exit_code_of(arguments) == 0
    assert "3 images a row; rows: the red man, a [blue] bag" in capsys.readouterr().out


def test_without_a_prompt_the_generator_draws_what_it_forgot_and_what_it_kept(
    text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "grid.png"
    assert exit_code_of(["sample", str(text_run.folder), "--count", "1", "-o", str(output), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["prompts"] == ["a red sandal", "the grey sandal", "a green bag", "a coat on a black background"]
    with Image.open(output) as picture:
        assert picture.size == (16, 4 * 17 - 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--label", "3"], "draws from prompts, and has no labels"),
        (["--prompt", "red " * 20], "has 22 tokens, start and end included; the text encoder reads 16"),
        (["--prompt", "red " * 20, "--artefact", ARTEFACT], "has 22 tokens"),
        (["--prompt", "caf\udce9"], "is not UTF-8 text (character 3)"),
    ],
)
def test_what_a_text_run_cannot_be_asked_is_one_line(
    text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
):
    output = tmp_path / "grid.png"
    assert exit_code_of(["sample", str(text_run.folder), *arguments, "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 2  # what, and the mend
    assert not output.exists()


def test_a_run_of_class_labels_takes_no_prompt(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "grid.png"
    assert exit_code_of(["sample", str(tiny_run.folder), "--prompt", "a red bag", "-o", str(output)]) == 2
    assert "draws class labels, and takes no prompt" in capsys.readouterr().err


def test_bench_times_the_generator_each_artefact_and_each_of_its_parts(
    text_run: Run, capsys: pytest.CaptureFixture[str]
):
    assert exit_code_of(["bench", str(text_run.folder), "--batch-size", "2", "--rounds", "3", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    parts = {f"{ARTEFACT} {part}" for part in ("text_encoder", "unet", "vae_decoder")}
    assert rows.keys() == {"generator", ARTEFACT} | parts
    assert {row["batch"] for row in rows.values()} == {2}
    assert all(row["times_teacher"] is None for row in rows.values())  # it records no teacher
    assert rows["generator"]["times_generator"] == 1.0


def with_a_teacher(run: Run, folder: Path) -> Run:
    """``run``'s generator again, in a run that records a teacher."""
    teacher, generator = text_pipeline(folder / "teacher", "sd2"), run.generator()
    facts = {**generator.facts, "teacher": str(teacher)}
    with sealed_folder(folder / "run" / "generator", "generator", facts=facts) as target:
        shutil.copytree(generator.folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return Run(folder / "run")


def test_bench_times_the_teacher_that_the_run_records(
    text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = with_a_teacher(text_run, tmp_path)
    assert exit_code_of(["bench", str(run.folder), "--batch-size", "1", "--rounds", "3", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows.keys() == {"teacher", "generator"}
    assert rows["generator"]["times_teacher"] > 0
    assert rows["teacher"]["times_teacher"] == 1.0
