from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sfd_deploy.cli import main as cli
from sfd_deploy.cli.main import COMMANDS, exit_code_of
from sfd_deploy.runs import Run
from tests.conftest import seal_tiny_run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: sfd-deploy {command}" in " ".join(text.split())
    assert "--json" in text


def test_the_group_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert exit_code_of(["--version"]) == 0


def test_bad_usage_exits_two(capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["trian"]) == 2
    assert exit_code_of(["train"]) == 2
    assert exit_code_of(["train", "--config"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def plant(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def doctor() -> None:
        raise error

    monkeypatch.setattr("sfd_deploy.cli.doctor.doctor", doctor)


def test_our_own_bug_exits_seventy_with_the_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SFD_DEPLOY_LOG", str(tmp_path / "crash.log"))
    plant(monkeypatch, RuntimeError("planted"))
    assert exit_code_of(["doctor"]) == 70
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert str(tmp_path / "crash.log") in error
    assert "RuntimeError: planted" in (tmp_path / "crash.log").read_text()


def test_a_log_that_cannot_be_written_does_not_hide_the_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("SFD_DEPLOY_LOG", str(tmp_path))
    plant(monkeypatch, RuntimeError("planted"))
    assert exit_code_of(["doctor"]) == 70
    assert "planted" in caplog.text


def failed_import() -> ImportError:
    """What a package raises that Ctrl-C stops at import."""
    error = ImportError("initialization failed")
    error.__context__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort(), failed_import()])
def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, error: BaseException):
    plant(monkeypatch, error)
    assert exit_code_of(["doctor"]) == 130


def test_run_exits_with_the_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["sfd-deploy", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.run()
    assert caught.value.code == 0


def test_info_prints_the_lineage_with_digests(tiny_run: Run, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["info", str(tiny_run.folder)]) == 0
    assert tiny_run.generator().digest[:12] in capsys.readouterr().out
    assert exit_code_of(["info", str(tiny_run.folder), "--json"]) == 0
    folders = json.loads(capsys.readouterr().out)["folders"]
    assert [(row["folder"], row["digest"]) for row in folders] == [("generator", tiny_run.generator().digest)]


def test_info_refuses_a_changed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = seal_tiny_run(tmp_path / "run")
    file = run.folder / "generator" / "model_index.json"
    file.write_text(file.read_text() + " ")
    assert exit_code_of(["info", str(run.folder)]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_sample_draws_a_grid_and_is_repeatable(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    for name in ("a.png", "b.png"):
        arguments = ["sample", str(tiny_run.folder), "--label", "star", "--label", "0", "--count", "3"]
        assert exit_code_of([*arguments, "-o", str(tmp_path / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("}\n{")[0].rstrip("}\n") + "}")["labels"] == [2, 0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 17 - 1, 2 * 17 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "stra"], "did you mean star"),
        (["--artefact", "onnx-cpu-int8"], "no such artefact"),
        (["--output", "/proc/nowhere/x.png"], "cannot be written"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_sample_refuses_bad_input_in_one_line(tiny_run: Run, capsys: pytest.CaptureFixture[str], arguments, message):
    assert exit_code_of(["sample", str(tiny_run.folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_doctor_says_what_works_and_the_mend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SFD_DEPLOY_TRITON", "/nowhere")
    assert exit_code_of(["doctor", "--json"]) == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["back_ends"]}
    assert found["pytorch"]["works"]
    assert found["onnxruntime"]["works"]
    assert not found["tritonserver"]["works"]
    assert "--install-triton" in found["tritonserver"]["mend"]
    assert exit_code_of(["doctor"]) == 0
    assert "sfd-deploy[gpu]" in capsys.readouterr().out.replace("\n", "") or found["tensorrt"]["works"]


def test_a_command_imports_diffusers_without_a_word():
    """In a process of its own: what is said at import is said once."""
    pytest.importorskip("optimum")
    program = "from sfd_deploy.cli.main import exit_code_of; exit_code_of(['--version']); import diffusers.utils"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
