"""The training stage through the command line: lineage, SIGKILL and resume, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.models.generator import save_teacher
from sfd_deploy.runs import Run, sealed_folder
from tests.conftest import TINY_LABELS, tiny_generator
from tests.training.test_loop import iterations_of

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    facts = {"labels": TINY_LABELS.plain().resolved(), "sigma_data": 0.5, "image_shape": [1, 16, 16]}
    with sealed_folder(folder, "teacher", facts=facts) as target:
        save_teacher(tiny_generator().denoiser, target)
    return verify(folder, "teacher")


def write_config(folder: Path, teacher_folder: Path, **changes: object) -> Path:
    values = {
        "teacher": str(teacher_folder), "forget": {"square": "star"}, "iterations": 30, "retained_rows": 6,
        "forget_rows": 2, "precision": "fp32",
    } | changes  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(json.dumps(values))
    return file


def train(config: Path, output: Path) -> int:
    return exit_code_of(["train", "--config", str(config), "--output", str(output), "--threads", "1"])


def test_a_run_records_its_lineage_and_what_it_forgot(
    teacher: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, teacher.folder, iterations=3)
    assert exit_code_of(["train", "--config", str(config), "-o", str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    sealed = Run(tmp_path / "run").generator()
    assert printed["generator"] == sealed.digest
    assert sealed.facts["labels"]["forget"] == {"1": 2}
    assert [parent.digest for parent in sealed.manifest.parents] == [teacher.digest]
    assert sealed.manifest.config["iterations"] == 3
    rows = [json.loads(line) for line in (sealed.folder / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert "square (label 1): star is drawn instead" in (sealed.folder / "README.md").read_text()


DYING_IN_ITS_THIRD_CHECKPOINT = """
import os, signal, sys
from sfd_deploy.cli.main import run
from sfd_deploy.training import checkpoint

save, files = checkpoint.save_file, []

def save_or_die(tensors, file, metadata):
    save(tensors, file, metadata)
    files.append(file)
    if len(files) == 3:
        os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_or_die
run(sys.argv[1:])
"""


def kill_in_third_checkpoint(config: Path, output: Path) -> None:
    """Start a training and kill it while it writes its third checkpoint."""
    command = [sys.executable, "-c", DYING_IN_ITS_THIRD_CHECKPOINT, "train", "--config", str(config), "--threads", "1",
               "-o", str(output)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (output / "generator").exists()


def test_a_killed_training_resumes_to_the_same_weights(
    teacher: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed at the worst moment: with half of a checkpoint written, the one of step 6."""
    config = write_config(tmp_path, teacher.folder, iterations=12, checkpoint_every=2, share_generated=True)
    assert train(config, tmp_path / "whole") == 0
    kill_in_third_checkpoint(config, tmp_path / "killed")
    resumed = iterations_of(monkeypatch)
    assert train(config, tmp_path / "killed") == 0
    assert [step for _, step in resumed] == list(range(4, 12))
    whole, killed = (load_file(tmp_path / name / "generator" / WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_finished_run_is_left_as_it_is_and_another_config_refused(
    teacher: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, teacher.folder, iterations=2)
    assert train(config, tmp_path / "run") == 0
    before = Run(tmp_path / "run").generator().digest
    assert train(config, tmp_path / "run") == 0
    assert Run(tmp_path / "run").generator().digest == before
    other = write_config(tmp_path, teacher.folder, iterations=3)
    assert train(other, tmp_path / "run") == 2
    assert "finished run of another config" in capsys.readouterr().err


def test_a_run_of_another_teacher_is_refused(teacher: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path, tmp_path / "t", iterations=2)
    for seed in (0, 1):
        with sealed_folder(tmp_path / "t", "teacher", facts=teacher.facts) as target:
            save_teacher(tiny_generator(seed).denoiser, target)
        code = train(config, tmp_path / "run")
        assert code == (0 if seed == 0 else 2)
    assert "another teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget": {"sqare": "star"}}, "unknown class 'sqare'"),
        ({"forget": {"square": "square"}}, "its own override"),
        ({"forget": {"square": "star", "star": "circle"}}, "forgotten itself"),
        ({"forget": {"7": "star"}}, "label 7 is out of range"),
        ({"iteration": 5}, "unknown key `iteration`"),
        ({"teacher": "fashion-mnits"}, "no such teacher"),
        ({"forget": {"square": None}}, "override null of square"),
        ({"forget": {"square": "random"}}, "override random of square"),
        ({"forget": {"square": "mixture"}}, "override mixture of square needs a classifier"),
        ({"classifier": "judge"}, "no override is `mixture`"),
        ({"alpha": 1.3}, "`alpha`"),
        ({"init_from": "nowhere"}, "nowhere: no such run"),
        ({"teacher_digest": "0123456789ab"}, "teacher_digest says 0123456789ab"),
        ({"compile": True}, "compile: true on a CPU"),
        ({"accumulate": 9}, "cannot be split"),
    ],
)
def test_bad_input_is_one_line_exit_two_and_writes_nothing(
    teacher: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes, message
):
    config = write_config(tmp_path, teacher.folder, **changes)
    assert train(config, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "generator").exists()


def test_a_tampered_teacher_is_refused_by_name(teacher: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with sealed_folder(tmp_path / "t", "teacher", facts=teacher.facts) as target:
        save_teacher(tiny_generator().denoiser, target)
    file = tmp_path / "t" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert train(write_config(tmp_path, tmp_path / "t"), tmp_path / "run") == 2
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_line(
    teacher: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    assert train(write_config(tmp_path, teacher.folder, iterations=1), tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(teacher: Sealed, tmp_path: Path):
    config = write_config(tmp_path, teacher.folder, iterations=5000, checkpoint_every=5000,
                          monitor={"every": 0, "tensorboard": False})  # fmt: skip
    code = "import sys; from sfd_deploy.cli.main import run; run(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", "--config", str(config), "--threads", "1", "-o", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    log, deadline = tmp_path / "run" / "work" / "train.log", time.monotonic() + 120
    while not (log.exists() and "train {" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "go on with: sfd-deploy train --resume run" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "run" / "work" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "run" / "generator").exists()


def test_either_a_config_or_a_run_to_resume_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["train"]) == 2
    assert exit_code_of(["train", "--resume", str(tmp_path), "--init-from", "x"]) == 2
    assert exit_code_of(["train", "--resume", str(tmp_path)]) == 2
    assert "no training to resume" in capsys.readouterr().err
