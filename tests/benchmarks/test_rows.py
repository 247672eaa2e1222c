from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import expect, page, rows_table
from benchmarks import rows as rows_module
from benchmarks.classes import open_classes
from benchmarks.intervals import Difference
from benchmarks.ledger import Ledger
from benchmarks.rows import (
    ROWS,
    Rows,
    command,
    expected_minutes,
    facts_of,
    images_folder,
    make_all,
    open_rows,
    wanted_rows,
)
from benchmarks.rows_table import criteria
from benchmarks.workshop import Workshop, replaced
from sfd_deploy.errors import ConfigError, DataError
from sfd_deploy.manifest import verify
from sfd_deploy.training.data import LabelledImages
from tests.benchmarks.conftest import TINY_SIZES, calls_to, tiny_workshop

ALL = wanted_rows(",".join(ROWS), 1)


def test_one_command_makes_all_rows_and_a_second_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = Rows(tiny_workshop(tmp_path), Ledger(tmp_path / "results", {}), TINY_SIZES)
    assert expected_minutes(rows, ALL) > 0
    found = make_all(rows, ALL, lambda _: None)
    text = rows_table.text(facts_of(rows, found), criteria(facts_of(rows, found)), "here")
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:8]] == list(rows_table.TITLES.values())
    again = Rows(tiny_workshop(tmp_path), Ledger(tmp_path / "results", {}), TINY_SIZES)
    monkeypatch.setattr("benchmarks.rows.measure", None)  # calling it would raise
    assert expected_minutes(again, ALL) == 0
    assert make_all(again, ALL, lambda _: None) == found
    assert_rows_are_what_they_say(rows)


def assert_rows_are_what_they_say(rows: Rows) -> None:
    shop = rows.workshop
    runs = {
        name: shop.folder / "seed-0" / name / "generator" for name in ("distilled", "sfd", "two-stage", "retrained")
    }
    sealed = {name: verify(folder, "generator") for name, folder in runs.items()}
    forgotten = {name: item.facts["labels"]["forget"] for name, item in sealed.items()}
    assert forgotten == {"distilled": {}, "sfd": {"1": 0}, "two-stage": {"1": 0}, "retrained": {}}
    parents = {name: [parent.digest for parent in item.manifest.parents] for name, item in sealed.items()}
    assert sealed["distilled"].digest in parents["two-stage"]
    teacher, retrained = (verify(shop.folder / "seed-0" / name, "teacher") for name in ("teacher", "retrained-teacher"))
    assert teacher.digest in parents["sfd"]
    assert parents["retrained"] == [retrained.digest]
    assert teacher.digest != retrained.digest
    with_unclean = shop.seconds(0, "distilled", "two-stage")
    assert rows.row("two-stage", 0).seconds == pytest.approx(with_unclean)
    assert rows.row("remap", 0).seconds == rows.row("distilled", 0).seconds


def test_override_images_stand_in_for_the_forget_label_s_and_nothing_else_changes():
    images = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
    data = LabelledImages(images, np.array([0, 1, 1, 2, 1, 0, 2]), ("a", "b", "c"))
    found = replaced(data, {1: 2})
    assert found.images.ravel().tolist() == [0, 3, 6, 3, 3, 5, 6]
    assert found.labels.tolist() == data.labels.tolist()
    assert data.images.ravel().tolist() == list(range(7))


def test_rows_take_their_own_number_of_seeds_and_always_bring_the_teacher():
    assert wanted_rows("sfd:2,remap", 1) == {"teacher": 2, "sfd": 2, "remap": 1}
    for text in ("sdf", "sfd:0", "sfd:x"):
        with pytest.raises(ConfigError, match="not a row"):
            wanted_rows(text, 1)


def test_images_that_a_later_row_needs_are_missed_before_the_first_is_made(tmp_path: Path):
    arguments = ["--data", "fashion-mnist", "--images", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert isinstance(result.exception, DataError)
    assert not list((tmp_path / "out").glob("seed-*"))


@pytest.mark.parametrize(("excess", "code"), [(0.0051, 1), (0.0049, 0)])
def test_a_missed_criterion_exits_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: float, code: int):
    monkeypatch.setattr("benchmarks.rows.expected_minutes", lambda *_: 0.0)
    for name in ("open_rows", "require_images", "make_all", "facts_of"):
        monkeypatch.setattr(f"benchmarks.rows.{name}", lambda *_: None)
    monkeypatch.setattr(rows_table, "criteria", lambda _: rows_table.Criteria(None, None, Difference(excess, 0, 0.01)))
    monkeypatch.setattr(rows_table, "text", lambda *_: "the table")
    result = CliRunner().invoke(command, ["--data", "digits", "-o", str(tmp_path)], standalone_mode=False)
    assert result.exception is None, result.output
    assert result.return_value == code


def test_the_judges_error_is_seen_on_a_stretch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    original = rows_module.look_at
    monkeypatch.setattr(rows_module, "look_at", lambda *how: asked.append(how[1:4]) or original(*how))
    Rows(tiny_workshop(tmp_path), Ledger(tmp_path / "results", {}), TINY_SIZES).judges_error(0)
    assert asked == [("override", 0, TINY_SIZES.override)]


def test_expected_time_is_work_times_cost():
    work, cost = expect.Work(10, 100, 1000, 20), expect.Work(0.5, 0.01, 0.001, 0.1)
    assert work.seconds(cost) == pytest.approx(5 + 1 + 1 + 2)
    assert (work + work).teacher_draws == 40


def test_one_command_makes_the_padded_rows_their_picture_and_their_page(tmp_path: Path, monkeypatch):
    """What is run on a GPU for `fashion-mnist-32`, on the digits with a margin."""
    monkeypatch.setattr(Workshop, "of_preset", lambda _name, home, _images, device: tiny_workshop(home, 12, device))
    monkeypatch.setattr(
        "benchmarks.rows.Sizes", lambda override=5: TINY_SIZES.model_copy(update={"override": override})
    )
    (tmp_path / "page.md").write_text("<!-- rows fashion-mnist-32 --><!-- /rows fashion-mnist-32 -->")
    arguments = ["--data", "fashion-mnist-32", "--rows", "teacher,distilled,sfd", "-o", str(tmp_path / "out"),
                 "--override-samples", "7", "--curves", str(tmp_path / "curves.png"),
                 "--page", str(tmp_path / "page.md")]  # fmt: skip
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.exception is None, result.output
    (tmp_path / "page.md").write_text((tmp_path / "page.md").read_text() + "<!-- mine --><!-- /mine -->")
    again = CliRunner().invoke(
        command, [*arguments[:3], "teacher", *arguments[4:], "--table", "mine"], standalone_mode=False
    )
    assert again.exception is None, again.output
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == ["curves.png"]
    table, mine = (tmp_path / "page.md").read_text().split("<!-- mine -->")
    assert rows_table.TITLES["teacher"] in mine
    assert rows_table.TITLES["sfd"] not in mine
    assert "--override-samples 7" in table
    assert "on 7 samples of the override label" in table
    assert all(rows_table.TITLES[name] in table for name in ("teacher", "distilled", "sfd"))
    for name, kind in (("teacher", "teacher"), ("sfd/generator", "generator")):
        assert verify(tmp_path / "out" / "seed-0" / name, kind).facts["image_shape"] == [1, 12, 12]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_and_the_padding_reach_every_training_and_every_runtime(tmp_path: Path, monkeypatch, device):
    """The GPU is planted: what is asked of it is done on the CPU."""
    monkeypatch.setattr("sfd_deploy.training.precision.computes_in_bf16", lambda where: where == "cuda")
    asked = {
        name: calls_to(monkeypatch, name, place)
        for name, place in [("benchmarks.workshop.make_judge", 3), ("benchmarks.workshop.train_teacher", 3),
                            ("benchmarks.workshop.train", 2), ("benchmarks.rows.open_runtime", 1)]
    }  # fmt: skip
    shop = tiny_workshop(tmp_path, 12, device, "auto")
    make_all(Rows(shop, Ledger(tmp_path / "results", {}), TINY_SIZES), wanted_rows("distilled", 1), lambda _: None)
    assert {name: set(found) for name, found in asked.items()} == {name: {device} for name in asked}
    chosen = {"cpu": "fp32", "cuda": "bf16"}[device]
    sealed = [verify(tmp_path / "seed-0" / "teacher", "teacher")]
    sealed += [verify(tmp_path / "judges" / kind, "judge") for kind in ("plain", "residual")]
    assert [item.manifest.config["precision"] for item in sealed] == [chosen] * 3
    assert [item.manifest.config["pad_to"] for item in sealed] == [12] * 3


def test_expected_time_is_taken_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = [calls_to(monkeypatch, f"benchmarks.expect.{name}", place)
             for name, place in [("train", 2), ("train_teacher", 3), ("open_runtime", 1)]]  # fmt: skip
    monkeypatch.setitem(expect.LONG, "cuda", 3)
    expect.costs(tiny_workshop(tmp_path, device="cuda"), teacher_training=True)
    assert [set(found) for found in asked] == [{"cuda"}] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_missing_gpu_is_one_line_before_anything_else(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("SFD_DEPLOY_DATA", str(tmp_path))  # no images there: nothing is trained by mistake
    monkeypatch.setattr(
        sys, "argv", ["rows", "--data", "fashion-mnist-32", "--device", "cuda", "-o", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stopped:
        page.run(command)
    assert stopped.value.code == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_larger_teacher_is_of_32_pixels_and_30_million_weights_and_its_presets_agree(tmp_path: Path):
    shop = Workshop.of_preset("fashion-mnist-32", tmp_path, tmp_path)
    network = shop.teacher_config.network
    with torch.device("meta"):
        unet = network.build(len(shop.teacher_config.class_names))
    assert sum(weights.numel() for weights in unet.parameters()) >= 30_000_000
    assert (network.image_size, shop.teacher_config.pad_to) == (32, 32)
    assert [judge.pad_to for judge in shop.judge_configs] == [32, 32]
    assert {judge.class_names for judge in shop.judge_configs} == {shop.teacher_config.class_names}
    assert shop.forget == {1: 8}
    assert not shop.shipped


def test_the_images_at_32_pixels_are_those_at_28(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SFD_DEPLOY_DATA", "/data")
    assert (
        images_folder("fashion-mnist-32", None) == images_folder("fashion-mnist", None) == Path("/data/fashion-mnist")
    )
    assert images_folder("fashion-mnist-32", Path("mine")) == Path("mine")


@pytest.mark.parametrize("open_table", [open_rows, open_classes])
def test_results_of_two_devices_are_not_put_into_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_table: Callable[..., object]
):
    monkeypatch.setattr(
        Workshop, "of_preset", lambda _name, home, _images, device: replace(tiny_workshop(home), device=device)
    )
    open_table("digits", tmp_path, Path("digits"), TINY_SIZES)
    with pytest.raises(ConfigError, match=r"other settings \(device\)"):
        open_table("digits", tmp_path, Path("digits"), TINY_SIZES, "cuda")
