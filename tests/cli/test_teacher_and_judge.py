"""``sfd-deploy judge`` and ``teacher`` on IDX files of a toy: bright above or bright below."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.manifest import verify
from sfd_deploy.training.data import LabelledImages

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NETWORK = {"image_size": 8, "channels": 1, "block_channels": [8], "norm_groups": 4}


def write_idx(folder: Path, prefix: str, count: int, seed: int) -> None:
    """Two classes in the format of MNIST (yann.lecun.com/exdb/mnist): magic, sizes, bytes; images gzipped."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 2, count).astype(np.uint8)
    images = draws.integers(0, 60, (count, 8, 8)).astype(np.uint8)
    images[labels == 0, :4] += 180
    images[labels == 1, 4:] += 180
    packed = gzip.compress(struct.pack(">4i", 0x803, count, 8, 8) + images.tobytes())
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(packed)
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "halves"
    folder.mkdir()
    write_idx(folder, "train", 96, 0)
    write_idx(folder, "t10k", 40, 1)
    return folder


Write = Callable[..., str]


@pytest.fixture
def teacher_config(tmp_path: Path) -> Write:
    def write(**changes: Any) -> str:
        values = {
            "network": NETWORK, "class_names": ["above", "below"], "images": 8 * 12, "batch_size": 8,
            "precision": "fp32", "monitor": {"every": 6, "previews": 2},
        } | changes  # fmt: skip
        (tmp_path / "teacher.yaml").write_text(json.dumps(values))
        return str(tmp_path / "teacher.yaml")

    return write


@pytest.fixture
def judge_config(tmp_path: Path) -> Write:
    def write(**changes: Any) -> str:
        classifier = {"architecture": "plain", "channels": 1, "widths": [8]}
        values = {
            "classifier": classifier, "class_names": ["above", "below"], "epochs": 6, "batch_size": 16, "shift": 0,
            "flip": False, "learning_rate": 0.03, "precision": "fp32",
        } | changes  # fmt: skip
        (tmp_path / "judge.yaml").write_text(json.dumps(values))
        return str(tmp_path / "judge.yaml")

    return write


def command(name: str, config: str, data: Path, output: Path, *more: str) -> int:
    return exit_code_of([name, "--config", config, "--data", str(data), "-o", str(output), "--threads", "1", *more])


def refused(capsys: pytest.CaptureFixture[str], message: str) -> bool:
    error = capsys.readouterr().err
    return message in error and "mend:" in error and "Traceback" not in error


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, at_batch: int) -> None:
    """A real SIGINT while the given batch is read."""
    batches = iter(range(1000))
    original = LabelledImages.batch

    def batch(images: LabelledImages, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if next(batches) == at_batch:
            os.kill(os.getpid(), signal.SIGINT)
        return original(images, rows)

    monkeypatch.setattr(LabelledImages, "batch", batch)


def step_saved_in(work: Path) -> int:
    with safe_open(work / "checkpoint.safetensors", framework="pt") as handle:
        return int(handle.metadata()["step"])


def test_a_judge_is_trained_measured_and_sealed(judge_config, data, tmp_path, capsys):
    assert command("judge", judge_config(), data, tmp_path / "judge", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    sealed = verify(tmp_path / "judge", "judge")
    assert printed["digest"] == sealed.digest
    assert (printed["accuracy"], printed["held_out_images"], printed["data"]) == (1.0, 40, "halves")
    assert "judge step 36 of 36" in (tmp_path / "judge.work" / "train.log").read_text()
    assert command("judge", judge_config(), data, tmp_path / "judge") == 0  # finished: measured again, not trained
    assert "accuracy 1.0000 on 40 held-out images" in capsys.readouterr().out
    assert verify(tmp_path / "judge", "judge").facts == sealed.facts


def test_a_judge_interrupted_by_ctrl_c_saves_and_goes_on_to_the_same_weights(
    judge_config, data, tmp_path, capsys, monkeypatch
):
    assert command("judge", judge_config(), data, tmp_path / "whole") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at_batch=3 + 7)  # the estimate reads three
        assert command("judge", judge_config(), data, tmp_path / "broken") == 130
    error = capsys.readouterr().err
    assert "judge: saved step 8 of 36" in error
    assert step_saved_in(tmp_path / "broken.work") == 8
    assert "run the same command to go on" in error
    assert not (tmp_path / "broken").exists()
    assert command("judge", judge_config(), data, tmp_path / "broken") == 0
    whole, broken = (load_file(tmp_path / name / "judge.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_teacher_is_trained_watched_measured_and_sealed(teacher_config, judge_config, data, tmp_path, capsys):
    assert command("judge", judge_config(), data, tmp_path / "judge") == 0
    capsys.readouterr()
    arguments = ("--judge", str(tmp_path / "judge"), "--json", "--device", "auto")
    assert command("teacher", teacher_config(), data, tmp_path / "teacher", *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    sealed = verify(tmp_path / "teacher", "teacher")
    assert printed["digest"] == sealed.digest
    assert printed["images_seen"] == 8 * 12
    assert set(printed["label_agreement"]) == {"judge"}
    assert printed["samples_per_label"] == 100
    work = tmp_path / "teacher.work"
    assert [file.name for file in sorted((work / "previews").iterdir())] == ["step-000006.png", "step-000012.png"]
    with Image.open(work / "previews" / "step-000012.png") as picture:
        assert picture.size == (7 * (2 * 9 - 1), 7 * (2 * 9 - 1))  # two labels, two images each, 8 pixels and a gap
    events = EventAccumulator(str(work / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("teacher/loss")] == [10, 12]
    assert command("teacher", teacher_config(), data, tmp_path / "teacher") == 0
    assert "teacher" in capsys.readouterr().out


def test_a_teacher_interrupted_by_ctrl_c_saves_and_goes_on_to_the_same_weights(
    teacher_config, data, tmp_path, capsys, monkeypatch
):
    assert command("teacher", teacher_config(), data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at_batch=4)
        assert command("teacher", teacher_config(), data, tmp_path / "broken") == 130
    error = capsys.readouterr().err
    assert "teacher: saved step 5 of 12" in error
    assert step_saved_in(tmp_path / "broken.work") == 5
    assert "run the same command to go on" in error
    # Other previews are no other training.
    resumed = teacher_config(monitor={"every": 0, "tensorboard": False})
    assert command("teacher", resumed, data, tmp_path / "broken") == 0
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_second_ctrl_c_stops_at_once(teacher_config, data, tmp_path, monkeypatch):
    original = LabelledImages.batch

    def batch(images: LabelledImages, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return original(images, rows)

    monkeypatch.setattr(LabelledImages, "batch", batch)
    before = signal.getsignal(signal.SIGINT)
    assert command("teacher", teacher_config(), data, tmp_path / "teacher") == 130
    assert not (tmp_path / "teacher.work" / "checkpoint.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_expected_time_and_memory_are_said_before_the_first_step(teacher_config, judge_config, data, tmp_path, capsys):
    config = teacher_config(images=8 * 20, monitor={"every": 0, "tensorboard": False})
    assert command("teacher", config, data, tmp_path / "teacher") == 0
    assert "s for 20 iterations, " in (error := capsys.readouterr().err)
    assert error.startswith("teacher: about ")
    assert "teacher: about " in (tmp_path / "teacher.work" / "train.log").read_text().splitlines()[0]
    assert not (tmp_path / "teacher.work" / "tensorboard").exists()


def test_images_are_padded_for_a_teacher_and_its_judge(teacher_config, judge_config, data, tmp_path):
    assert command("judge", judge_config(pad_to=12), data, tmp_path / "judge") == 0
    config = teacher_config(network=NETWORK | {"image_size": 12}, pad_to=12)
    assert command("teacher", config, data, tmp_path / "teacher", "--judge", str(tmp_path / "judge")) == 0
    teacher, judge = verify(tmp_path / "teacher", "teacher"), verify(tmp_path / "judge", "judge")
    assert teacher.facts["image_shape"] == [1, 12, 12]
    assert (teacher.manifest.config["pad_to"], judge.manifest.config["pad_to"]) == (12, 12)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"network": NETWORK | {"image_size": 16}}, 2, "images are (1, 8, 8), the network wants (1, 16, 16)"),
        ({"class_names": ["above"]}, 2, "label 1 but 1 class names"),
        ({"batchsize": 8}, 2, "did you mean `batch_size`"),
        ({"init_from": "nowhere"}, 2, "nowhere: no such teacher"),
        ({"learning_rate": 1e30, "warmup_steps": 0}, 1, "teacher diverged"),
    ],
)
def test_a_teacher_that_cannot_be_is_one_line_and_writes_no_teacher(
    teacher_config, data, tmp_path, capsys, changes, code, message
):
    assert command("teacher", teacher_config(**changes), data, tmp_path / "teacher") == code
    assert refused(capsys, message)
    assert not (tmp_path / "teacher").exists()


def test_bad_places_devices_and_judges_are_one_line(teacher_config, judge_config, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name, config in (("teacher", teacher_config()), ("judge", judge_config())):
        assert command(name, config, tmp_path / "none", tmp_path / name) == 2
        assert refused(capsys, "no such data folder")
        assert command(name, config, data, tmp_path / "file" / name) == 2
        assert refused(capsys, "cannot be written")
    assert command("teacher", teacher_config(), data, tmp_path / "t", "--judge", str(tmp_path / "none")) == 2
    assert refused(capsys, "manifest")
    if not torch.cuda.is_available():
        assert command("teacher", teacher_config(), data, tmp_path / "t", "--device", "cuda") == 2
        assert refused(capsys, "no CUDA GPU")


def test_a_checkpoint_of_another_config_is_refused_naming_the_key(teacher_config, judge_config, data, tmp_path, capsys):
    for name, config in (("teacher", teacher_config), ("judge", judge_config)):
        assert command(name, config(), data, tmp_path / name) == 0
        shutil.rmtree(tmp_path / name)
        capsys.readouterr()
        assert command(name, config(seed=1), data, tmp_path / name) == 2
        assert refused(capsys, "checkpoint of another config (seed differ)")


def test_what_is_finished_is_replaced_by_the_same_alone(teacher_config, judge_config, data, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_idx(other, "train", 96, 2)
    write_idx(other, "t10k", 40, 3)
    for name, config in (("teacher", teacher_config), ("judge", judge_config)):
        target = tmp_path / name
        assert command(name, config(), data, target) == 0
        before = (target / "manifest.json").read_bytes()
        shutil.rmtree(tmp_path / f"{name}.work")
        capsys.readouterr()
        assert command(name, config(seed=1), data, target) == 2
        assert refused(capsys, f"holds a {name} of another config or data (seed differ)")
        assert command(name, config(), other, target) == 2
        assert refused(capsys, "(data differ)")
        assert not (tmp_path / f"{name}.work" / "checkpoint.safetensors").exists()  # said before any step
        assert (target / "manifest.json").read_bytes() == before
    assert command("judge", judge_config(), data, tmp_path / "teacher") == 2
    assert refused(capsys, "holds a teacher, and a judge would replace it")


def test_a_judge_of_other_classes_is_refused_before_the_teachers_first_step(
    teacher_config, judge_config, data, tmp_path, capsys
):
    assert command("judge", judge_config(class_names=["left", "right"]), data, tmp_path / "judge") == 0
    capsys.readouterr()
    code = command("teacher", teacher_config(), data, tmp_path / "teacher", "--judge", str(tmp_path / "judge"))
    assert code == 2
    assert refused(capsys, "judge judge knows other classes than the teacher")
    assert not (tmp_path / "teacher.work" / "checkpoint.safetensors").exists()


def test_a_judge_below_its_minimum_fails_and_is_not_written(judge_config, data, tmp_path, capsys):
    hard = judge_config(epochs=1, learning_rate=1e-9, min_accuracy=1.0)
    assert command("judge", hard, data, tmp_path / "judge") == 1
    assert refused(capsys, "judge accuracy is")
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("fits", "mend"),
    [(5, "about 5 images would fit"), (0, "not even one image fits"), (99, "about 7 images would fit")],
)
def test_out_of_memory_names_the_batch_that_would_fit(teacher_config, data, tmp_path, capsys, monkeypatch, fits, mend):
    """The allocator's error and the measured memory are planted."""
    original = LabelledImages.batch

    def batch(images: LabelledImages, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(rows) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(images, rows)

    monkeypatch.setattr(LabelledImages, "batch", batch)
    monkeypatch.setattr("sfd_deploy.training.estimate.rows_that_fit", lambda _peaks, _free: fits)
    assert command("teacher", teacher_config(), data, tmp_path / "teacher") == 2
    error = capsys.readouterr().err
    assert "out of memory on cpu with a batch of 8" in error
    assert mend in error
