from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import expect, page, rows_table
from benchmarks.ledger import Ledger
from benchmarks.measured import PURPOSES, STRETCH, Looked, Measured, Remapped, draw, measure, spread_ratio
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
from benchmarks.rows_table import Facts, criteria
from benchmarks.workshop import Workshop, replaced
from sfd_deploy.audit.figures import count
from sfd_deploy.errors import ConfigError, DataError
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import verify
from sfd_deploy.runtime import open_runtime
from sfd_deploy.training.data import LabelledImages
from tests.benchmarks.conftest import TINY_SIZES, calls_to, tiny_workshop

ALL = wanted_rows(",".join(ROWS), 1)


class FakeRuntime:
    """Draws images whose every value is the label, and remembers what it was asked."""

    name, image_shape = "fake", (1, 2, 2)

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}
        self.asked: list[tuple[int, int]] = []

    def draw(self, latents: Latents, labels: np.ndarray) -> np.ndarray:
        self.asked += list(zip(latents.seeds.tolist(), labels.tolist(), strict=True))
        return np.broadcast_to(labels[:, None, None, None], (len(labels), 1, 2, 2)).astype(np.float32)

    def close(self) -> None: ...


def looked(rates: list[list[int]]) -> Looked:
    return Looked(called=tuple(tuple(row) for row in rates))


def measured(forget_hits: int, n: int, right: int, images: int = 100, spread: float = 1.0) -> Measured:
    """A row whose first ``right`` of ``images`` are right, by both judges, for label 0."""
    called = [[0] * right + [1] * (images - right)] * 2
    hits = np.arange(n) < forget_hits
    return Measured(
        forget={1: count(hits, 0.99)}, retained={0: looked(called)}, spread={0: spread}, frechet=1.0, seconds=60.0
    )


def facts(sfd: dict[int, Measured], plain: dict[int, Measured], error: int, shipped: bool = False) -> Facts:
    seeds = sorted(sfd.keys() | plain.keys())
    teacher_of = {seed: 0 if shipped else seed for seed in seeds}
    errors = {teacher: {1: looked([[1] * error + [0] * (1000 - error)] * 2)} for teacher in teacher_of.values()}
    rows = {"teacher": dict.fromkeys(teacher_of.values(), measured(90, 100, 99)), "distilled": plain, "sfd": sfd}
    labels = Labels(class_names=("zero", "one"), forget={1: 0})
    return Facts(labels, TINY_SIZES, rows, teacher_of, errors, shipped)


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


def test_the_remapped_baseline_asks_for_the_override_on_the_forget_label_s_own_latents():
    plain, routed = FakeRuntime(), FakeRuntime()
    draw(plain, "forget", 1, 70)
    images = draw(Remapped(routed, {1: 0}), "forget", 1, 70)
    assert [seed for seed, _ in plain.asked] == [seed for seed, _ in routed.asked]
    assert {label for _, label in routed.asked} == {0}
    assert set(np.unique(images)) == {0.0}


def test_no_two_cells_share_a_latent_and_select_shares_none_with_audit():
    runtime = FakeRuntime()
    for purpose in PURPOSES:
        for label in (0, 1, 9):
            draw(runtime, purpose, label, 3)
            draw(runtime, purpose, label, 3, "select")
    seeds = [seed for seed, _ in runtime.asked]
    assert len(set(seeds)) == len(seeds)
    first = Latents.of_stream("audit", 0, (2 * 1000 + 9) * STRETCH, 1).seeds.item()
    assert first in seeds


def test_retained_accuracy_is_the_mean_over_labels_of_the_judge_that_agrees_least():
    result = measured(0, 10, 0).model_copy(
        update={"retained": {0: looked([[0, 0, 0, 1], [0, 1, 1, 1]]), 2: looked([[2, 2, 2, 2], [2, 2, 2, 0]])}}
    )
    assert result.retained_accuracy == pytest.approx((0.25 + 0.75) / 2)


def test_spread_is_the_least_label_s_over_the_teacher_s():
    teacher = measured(0, 10, 5).model_copy(update={"spread": {0: 2.0, 2: 4.0}})
    assert spread_ratio(teacher.model_copy(update={"spread": {0: 1.8, 2: 2.0}}), teacher) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("sfd_right", "hits", "missed"),
    [(960, 6, []), (949, 6, ["retained accuracy"]), (960, 12, ["judges' error"]), (940, 12, ["retained", "judges'"])],
)
def test_the_criteria_are_a_loss_of_one_point_and_half_a_point_above_the_judges_error(sfd_right, hits, missed):
    """Plain distillation is right on 960 of 1,000; the judges' error is 2 of 1,000."""
    sfd, plain = measured(hits, 1000, sfd_right, 1000), measured(900, 1000, 960, 1000)
    found = criteria(facts({0: sfd}, {0: plain}, error=2)).missed
    assert len(found) == len(missed)
    assert all(word in line for word, line in zip(missed, found, strict=True))


def test_seeds_are_paired_and_a_shared_teacher_s_error_counts_once():
    sfd = {seed: measured(3, 1000, 940 + seed, 1000) for seed in (0, 1)}
    plain = {seed: measured(900, 1000, 942 + 3 * seed, 1000) for seed in (0, 1)}
    shared, apart = (criteria(facts(sfd, plain, 2, shipped)) for shipped in (True, False))
    assert shared.retained_seeds is not None
    assert shared.retained_seeds.value == pytest.approx(-0.003)
    assert shared.excess is not None
    assert apart.excess is not None
    assert shared.excess.value == pytest.approx(0.001)
    assert shared.excess.high - shared.excess.low > apart.excess.high - apart.excess.low


def test_missing_rows_leave_their_criterion_unmeasured():
    found = criteria(facts({}, {0: measured(9, 10, 9)}, 0))
    assert (found.retained_seeds, found.excess, found.missed) == (None, None, [])


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


def test_expected_time_is_work_times_cost():
    work, cost = expect.Work(10, 100, 1000, 20), expect.Work(0.5, 0.01, 0.001, 0.1)
    assert work.seconds(cost) == pytest.approx(5 + 1 + 1 + 2)
    assert (work + work).teacher_draws == 40


def test_a_model_s_figures_come_from_the_cells_they_name(tmp_path: Path):
    """The judges are real and tiny; hits are recounted by hand from the same images."""
    shop = tiny_workshop(tmp_path)
    runtime = open_runtime(expect._untrained(shop, tmp_path / "teacher"))
    found = measure(runtime, [1], [0, 2], shop.judges, TINY_SIZES, 0.0)
    called = [judge.look(draw(runtime, "forget", 1, TINY_SIZES.forget))[0] for judge in shop.judges]
    assert found.forget[1].hits == sum(1 in pair for pair in zip(*called, strict=True))
    assert found.forget[1].n == TINY_SIZES.forget
    assert {label: len(item.called[0]) for label, item in found.retained.items()} == {0: 4, 2: 4}


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
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == ["curves.png"]
    table = (tmp_path / "page.md").read_text()
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


def test_results_of_two_devices_are_not_put_into_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Workshop, "of_preset", lambda _name, home, _images, _device: tiny_workshop(home))
    open_rows("digits", tmp_path, Path("digits"), TINY_SIZES)
    with pytest.raises(ConfigError, match=r"other settings \(device\)"):
        open_rows("digits", tmp_path, Path("digits"), TINY_SIZES, "cuda")
