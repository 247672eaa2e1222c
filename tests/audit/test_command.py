from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfd_deploy.cli.main import exit_code_of
from tests.audit.toy import Opener, World, forgetful, leaking, rough, seal_artefact, seal_run, stored

SMALL = "name: small\nforget_samples: 500\noverride_samples: 500\nretained_samples: 80\nreference_samples: 80\n"
ROW = {
    "name", "runtime", "precision", "bytes", "forget", "override_error", "override_share", "retained_accuracy",
    "spread", "prompt_spread", "frechet", "psnr_db", "images_per_second", "speedup_over_teacher", "verdict",
}  # fmt: skip


@pytest.fixture
def command(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch):
    """``sfd-deploy audit`` in an empty folder, with painters behind the seam and the toy judges named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    judges = [item for folder in world.judge_folders for item in ("--judge", str(folder))]

    def audit(*arguments: str, **painters) -> int:
        monkeypatch.setattr("sfd_deploy.audit.stage.open_runtime", Opener(**painters))
        return exit_code_of(["audit", *arguments, "--policy", "small.yaml", *judges])

    return audit


@pytest.fixture
def run(tmp_path: Path, world: World):
    return seal_run(tmp_path / "runs" / "demo", world.teacher, ["onnx-cpu-fp32", "onnx-cpu-int8"])


def test_the_latest_run_is_audited_by_default_and_success_is_zero(command, run, capsys):
    assert command(generator=forgetful, onnx_cpu_fp32=forgetful, onnx_cpu_int8=rough) == 0
    printed = capsys.readouterr().out
    assert "onnx-cpu-int8" in printed
    assert "report.html" in printed


def test_a_planted_leak_behind_the_unchanged_command_exits_one(command, run, capsys):
    assert command(generator=forgetful, onnx_cpu_fp32=leaking(0.05), onnx_cpu_int8=rough) == 1
    assert "onnx-cpu-fp32: rising: the forget rate is at least" in capsys.readouterr().out


def test_json_is_one_document_with_the_promised_keys(command, run, capsys):
    seal_artefact(run, "trt-rtx-int8", b"plan")
    assert command("--json", generator=forgetful, onnx_cpu_fp32=forgetful, onnx_cpu_int8=stored) == 1
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"exit_code", "policy_digest", "artefacts"}
    assert document["exit_code"] == 1
    rows = {row["name"]: row for row in document["artefacts"]}
    assert all(set(row) == ROW for row in rows.values())
    assert rows["onnx-cpu-fp32"]["forget"] == {"hits": 0, "n": 500, "upper_99": pytest.approx(1 - 0.01 ** (1 / 500))}
    assert rows["onnx-cpu-fp32"]["override_error"] == {"hits": 0, "n": 500}
    assert rows["onnx-cpu-fp32"]["bytes"] == len(b"onnx-cpu-fp32")
    assert rows["onnx-cpu-int8"]["spread"] == 0.0
    assert rows["generator"]["runtime"] == "pytorch"
    assert rows["generator"]["psnr_db"] is None
    assert rows["trt-rtx-int8"]["verdict"] == "not-runnable-here"
    assert rows["trt-rtx-int8"]["forget"] is None


@pytest.mark.parametrize("form", ["name", "folder", "run and name"])
def test_one_artefact_is_audited_by_name_or_by_folder(command, run, capsys, form):
    arguments = {"name": ["onnx-cpu-int8"], "folder": [str(run.folder / "artefacts" / "onnx-cpu-int8")],
                 "run and name": ["demo", "onnx-cpu-int8"]}[form]  # fmt: skip
    assert command(*arguments, "--json", generator=forgetful, onnx_cpu_int8=rough) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["artefacts"]] == ["onnx-cpu-int8"]


def test_a_named_artefact_that_cannot_run_here_exits_three(command, run):
    seal_artefact(run, "trt-rtx-int8", b"plan")
    assert command(generator=forgetful, onnx_cpu_fp32=forgetful, onnx_cpu_int8=rough) == 0
    assert command("trt-rtx-int8", generator=forgetful) == 3
    assert command("trt-rtx-int8", "onnx-cpu-int8", generator=forgetful, onnx_cpu_int8=rough) == 3


def test_a_teacher_folder_is_asked_about_the_latest_runs_label_and_fails(command, run, world, tmp_path):
    assert command(str(world.teacher.folder)) == 1
    assert (tmp_path / "runs" / "audit-of-painter" / "audit" / "report.html").is_file()
    assert not (run.folder / "audit").exists()


def test_a_teacher_folder_without_a_run_needs_to_be_told_the_label(command, world, capsys):
    assert command(str(world.teacher.folder)) == 2
    assert "--forget" in capsys.readouterr().err
    assert command(str(world.teacher.folder), "--forget", "rising=falling") == 1


def test_a_generator_folder_of_no_run_is_audited_alone(command, run, tmp_path):
    loose = tmp_path / "copied"
    (run.folder / "generator").rename(loose)
    assert command(str(loose), generator=forgetful) == 0
    assert (tmp_path / "runs" / "audit-of-generator" / "audit").is_dir()


def test_a_flipped_byte_is_refused_and_the_message_names_the_file(command, run, capsys):
    (run.folder / "artefacts" / "onnx-cpu-int8" / "model.onnx").write_bytes(b"onnx-cpu-int9")
    assert command(str(run.folder / "artefacts" / "onnx-cpu-int8"), generator=forgetful) == 2
    assert "model.onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["onnx-cpu-int9"], "onnx-cpu-int9"),
        (["--forget", "rising"], "LABEL=OVERRIDE"),
        (["--forget", "rising=slanted"], "slanted"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--judge", "nowhere"], "nowhere"),
        (["--policy", "defualt"], "did you mean default"),
        (["small.yaml"], "small.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_two(command, run, capsys, arguments, named):
    before = sorted(run.folder.iterdir())
    if arguments[0] == "--policy":
        assert exit_code_of(["audit", *arguments]) == 2
    else:
        assert command(*arguments, generator=forgetful, onnx_cpu_fp32=forgetful, onnx_cpu_int8=rough) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert sorted(run.folder.iterdir()) == before


def test_two_runs_and_a_loose_folder_beside_others_are_refused(command, run, world, tmp_path, capsys):
    other = seal_run(tmp_path / "runs" / "other", world.teacher)
    assert command(str(run.folder), str(other.folder)) == 2
    assert "one run at a time" in capsys.readouterr().err
    assert command("demo", str(world.teacher.folder)) == 2
    assert "audited alone" in capsys.readouterr().err


def test_a_judge_is_not_a_subject(command, run, world, capsys):
    assert command(str(world.judge_folders[0])) == 2
    assert "draws nothing" in capsys.readouterr().err


def test_an_artefact_that_lies_in_no_run_is_refused(command, run, tmp_path, capsys):
    (run.folder / "artefacts" / "onnx-cpu-int8").rename(tmp_path / "onnx-cpu-int8")
    assert command(str(tmp_path / "onnx-cpu-int8")) == 2
    assert "lies in no run" in capsys.readouterr().err


def test_no_run_at_all_says_how_to_make_one(command, capsys):
    assert command() == 2
    assert "sfd-deploy train" in capsys.readouterr().err
