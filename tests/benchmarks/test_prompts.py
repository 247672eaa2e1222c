"""The tables of the two prompt experiments, from audits of a toy world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import optimum
from benchmarks.prompts import Before, Found, Stock, forget_table, named, retained_table, text
from sfd_deploy.audit.figures import count
from sfd_deploy.latents import Latents
from tests.audit.conftest import text_world  # noqa: F401
from tests.audit.test_text_stage import record_of
from tests.audit.text_toy import TextWorld, forgetful, leaking, real_images
from tests.export.text_runs import exported_text_run

BEFORE = Before(hits={label: count(np.arange(500) < 480, 0.99) for label in range(3)})


def found_of(folder: Path, world: TextWorld, reading=forgetful) -> Found:
    return Found("toy", BEFORE, record_of(folder, world, reading), Stock(difference={"fp32": 1e-6, "int8": 0.01}))


def test_the_tables_have_a_row_a_forget_family_and_one_an_artefact(tmp_path: Path, text_world: TextWorld):  # noqa: F811
    found = found_of(tmp_path, text_world)
    rows = forget_table(found).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "training prompts", "held-out paraphrases", "inside longer prompts",
    ]  # fmt: skip
    assert all("| 96.0 (n = 500) | 0 of 500" in row for row in rows)
    accuracy = found.rows["generator"].retained_accuracy_by_label
    shown = retained_table(found).splitlines()[3].split(" | ")
    # Labels 3 to 6: sneaker, bag and coat are objects, "in green" is a colour.
    assert shown[1:3] == [f"{100 * sum(accuracy[n] for n in (3, 4, 5)) / 3:.2f}", f"{100 * accuracy[6]:.2f}"]
    assert list(found.missed()) == []  # 0 of 500: a bound of 0.92 %
    assert "at most 1% for training prompts and held-out paraphrases" in text(found, "here")


@pytest.mark.parametrize(("words", "family"), [("a red", "training prompts"), ("the", "held-out paraphrases")])
def test_a_leak_in_a_promised_family_is_missed(tmp_path: Path, text_world: TextWorld, words: str, family: str):  # noqa: F811
    missed = list(found_of(tmp_path, text_world, leaking(0.3, words)).missed())
    assert any(f"generator: {family}: the bound is" in line for line in missed)


def test_lost_quality_is_missed(tmp_path: Path, text_world: TextWorld):  # noqa: F811
    worse = found_of(tmp_path, text_world, lambda words, number: forgetful(words, number).replace("coat", "bag"))
    assert any("retained accuracy is" in line for line in worse.missed())


def test_a_hit_is_what_either_judge_of_the_concept_says(text_world: TextWorld):  # noqa: F811
    images, objects, colours = real_images(7, 120)
    either = named(images.numpy(), "sandal", text_world.judges)
    alone = [judge.look(images.numpy())[0] == 0 for judge in text_world.judges[:2]]
    assert (either == (alone[0] | alone[1])).all()
    assert (either == (objects == 0).numpy()).mean() > 0.9
    assert (named(images.numpy(), "green", text_world.judges) == (colours == 1).numpy()).mean() > 0.9


def test_another_pipeline_that_draws_other_images_is_missed(tmp_path: Path, text_world: TextWorld):  # noqa: F811
    found = replace(found_of(tmp_path, text_world), stock=Stock(difference={"fp32": 2e-3, "int8": 0.01}))
    assert [line for line in found.missed() if "Optimum" in line] == [
        "toy: Optimum's pipeline differs from ours by 2.0e-03 in FP32"
    ]


def test_the_difference_from_optimum_is_of_the_folder_s_own_images(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("optimum.onnxruntime", reason="needs Optimum: pip install 'sfd-deploy[t2i]'")
    folder = exported_text_run("sd1")[1]["onnx-cpu-fp32"].folder
    latents = Latents.of_stream("sample", 0, 0, 2).array((4, 8, 8))
    prompts = ["a red sandal", "a green bag"]
    assert optimum.difference(folder, "fp32", prompts, latents) < 1e-5
    theirs = optimum._drawn_by_optimum(folder, prompts, latents)
    monkeypatch.setattr(optimum, "_drawn_by_optimum", lambda *asked: theirs + 0.25)
    assert optimum.difference(folder, "fp32", prompts, latents) == pytest.approx(0.25, abs=1e-5)
