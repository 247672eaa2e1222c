"""``sfd-deploy teacher`` of text and ``judge`` of coloured images, on IDX files of ten made-up objects."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sfd_deploy.manifest import verify
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.text_teacher.captions import COLOURS, OBJECTS
from tests.cli.test_teacher_and_judge import command, press_ctrl_c, refused, step_saved_in
from tests.training.text_toy import VALUES, toy_objects

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
JUDGE = {
    "classifier": {"architecture": "plain", "channels": 3, "widths": [8]}, "coloured": "colour", "epochs": 20,
    "batch_size": 16, "shift": 1, "edges": "repeat", "learning_rate": 0.03, "precision": "fp32",
}  # fmt: skip


def write_idx(folder: Path, prefix: str, objects: LabelledImages) -> None:
    count, _, height, width = objects.images.shape
    header = struct.pack(">4i", 0x803, count, height, width)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + objects.images.tobytes())
    labels = objects.labels.astype("uint8").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "objects"
    folder.mkdir()
    write_idx(folder, "train", toy_objects(96, 0))
    write_idx(folder, "t10k", toy_objects(60, 1))
    return folder


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bars")
    for prefix, count, seed in (("train", 300, 0), ("t10k", 90, 1)):
        write_idx(folder, prefix, toy_objects(count, seed, side=28))
    return folder


def config(folder: Path, values: dict[str, Any], **changes: Any) -> str:
    (folder / "config.yaml").write_text(json.dumps(values | changes))
    return str(folder / "config.yaml")


def test_a_text_teacher_is_trained_watched_and_sealed_as_a_pipeline(data, tmp_path, capsys):
    watched = config(tmp_path, VALUES, monitor={"every": 4, "previews": 2})
    assert command("teacher", watched, data, tmp_path / "teacher", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    sealed = verify(tmp_path / "teacher", "teacher")
    assert (printed["digest"], printed["data"], printed["prompt_agreement"]) == (sealed.digest, "objects", {})
    assert {"model_index.json", WEIGHTS, "vae/config.json", "tokenizer/vocab.json"} <= sealed.manifest.files.keys()
    work = tmp_path / "teacher.work"
    for part, rows in (("vae", 8), ("text-teacher", 10)):
        assert f"{part} step 4 of 4" in (work / "train.log").read_text()
        assert list((work / part / "tensorboard").iterdir())
        with Image.open(work / part / "previews" / "step-000004.png") as picture:
            assert picture.size == (2 * (2 * 33 - 1), 2 * (rows * 33 - 1))  # 32 pixels and a gap, twice as large
    assert command("teacher", watched, data, tmp_path / "teacher") == 0  # finished: sealed again, not trained
    assert verify(tmp_path / "teacher", "teacher").manifest.files == sealed.manifest.files


@pytest.mark.parametrize(("part", "batch", "step"), [("vae", 1, 2), ("text-teacher", 6, 2)])
def test_a_text_teacher_interrupted_by_ctrl_c_goes_on_to_the_same_weights(
    part, batch, step, data, tmp_path, capsys, monkeypatch
):
    toy = config(tmp_path, VALUES)
    assert command("teacher", toy, data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at_batch=batch)  # four of the autoencoder's, one that measures it
        assert command("teacher", toy, data, tmp_path / "broken") == 130
    assert f"{part}: saved step {step} of 4" in capsys.readouterr().err
    assert step_saved_in(tmp_path / "broken.work" / part) == step
    assert not (tmp_path / "broken").exists()
    assert command("teacher", toy, data, tmp_path / "broken") == 0
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"kind": "text"}, 2, "`kind`: Input should be 'text-to-image'"),
        ({"prompt_tokens": 2}, 2, "`prompt_tokens`"),
        ({"learning_rate": 1e30}, 1, "text-teacher diverged"),
    ],
)
def test_a_text_teacher_that_cannot_be_is_one_line_and_writes_none(changes, code, message, data, tmp_path, capsys):
    assert command("teacher", config(tmp_path, VALUES, **changes), data, tmp_path / "teacher") == code
    assert refused(capsys, message)
    assert not (tmp_path / "teacher").exists()


def test_a_judge_of_other_classes_is_refused_before_anything_is_trained(data, tmp_path, capsys):
    halves = config(tmp_path, {"classifier": JUDGE["classifier"] | {"channels": 1}, "epochs": 1, "precision": "fp32"})
    assert command("judge", halves, data, tmp_path / "digits") == 0
    toy = config(tmp_path, VALUES)
    assert command("teacher", toy, data, tmp_path / "teacher", "--judge", str(tmp_path / "digits")) == 2
    assert refused(capsys, "judge digits knows neither the captions' objects nor their colours")
    assert not (tmp_path / "teacher.work" / "vae").exists()


def test_two_judges_of_one_name_are_refused_before_anything_is_trained(data, tmp_path, capsys):
    for place in ("a", "b"):
        assert command("judge", config(tmp_path, JUDGE, epochs=1), data, tmp_path / place / "colour") == 0
    both = [word for place in ("a", "b") for word in ("--judge", str(tmp_path / place / "colour"))]
    assert command("teacher", config(tmp_path, VALUES), data, tmp_path / "teacher", *both) == 2
    assert refused(capsys, "two judges are named colour")
    assert not (tmp_path / "teacher.work" / "vae").exists()


def test_a_judge_of_colours_is_trained_and_measures_the_teacher(bars, tmp_path, capsys):
    assert command("judge", config(tmp_path, JUDGE), bars, tmp_path / "colour", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"] > 0.9
    assert printed["class_names"] == list(COLOURS)
    toy, judge = config(tmp_path, VALUES), ("--judge", str(tmp_path / "colour"), "--json")
    assert command("teacher", toy, bars, tmp_path / "teacher", *judge) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["prompt_agreement"]) == {"colour"}
    assert printed["prompt_agreement"]["colour"] < 0.5  # four steps of training: chance is a sixth
    assert printed["samples"] == 600


def test_a_judge_of_objects_names_the_captions_objects(bars, tmp_path, capsys):
    values = JUDGE | {"coloured": "object", "epochs": 1}
    assert command("judge", config(tmp_path, values), bars, tmp_path / "object", "--json") == 0
    assert json.loads(capsys.readouterr().out)["class_names"] == list(OBJECTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["a"]}, "leave the key out"),
        ({"classifier": {"architecture": "plain", "channels": 1, "widths": [8]}}, "coloured images have 3 channels"),
        ({"coloured": "size"}, "`coloured`"),
        ({"edges": "mirror"}, "`edges`"),
    ],
)
def test_a_coloured_judge_that_cannot_be_is_one_line(changes, message, data, tmp_path, capsys):
    assert command("judge", config(tmp_path, JUDGE, **changes), data, tmp_path / "judge") == 2
    assert refused(capsys, message)
