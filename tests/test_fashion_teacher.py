"""What is shipped for Fashion-MNIST, and what must fail an audit: the teacher, a distillation that forgets nothing.

Apart from ``test_fashion``, which takes one worker's time for its training.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.embedded import resolve
from sfd_deploy.measure.judges import Judge, either_matrix
from sfd_deploy.runs import Run
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.stage import train
from tests.fashion import BAG, TROUSER, policy_file, rows, shipped_judges

# Enough to fail a model that draws the forget label; too few to certify at 99 %.
QUICK = {"name": "quick", "confidence": 0.9, "forget_samples": 230, "override_samples": 60, "retained_samples": 10,
         "reference_samples": 10}  # fmt: skip


@pytest.fixture(scope="module")
def judges() -> list[Judge]:
    return shipped_judges()


def test_a_generator_distilled_without_forgetting_fails(tmp_path: Path):
    config = TrainConfig.load("fashion-mnist", "train").resolved() | {"forget": {}, "iterations": 30}
    run = train(TrainConfig.from_mapping(config, "test"), tmp_path / "plain")
    arguments = ["audit", str(run.folder), "--forget", "Trouser=Bag", "--policy", policy_file(tmp_path, QUICK)]
    assert exit_code_of(arguments) == 1
    assert rows(run)["generator"]["figures"]["forget"]["lower"] > 0.3


def test_the_teacher_itself_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    teacher = str(resolve("fashion-mnist", "teacher").folder)
    arguments = ["audit", teacher, "--forget", "Trouser=Bag", "--policy", policy_file(tmp_path, QUICK)]
    assert exit_code_of(arguments) == 1
    row = rows(Run(tmp_path / "runs" / "audit-of-teacher"))["teacher"]
    assert row["figures"]["forget"]["lower"] > 0.8


def test_the_teachers_samples_agree_with_their_labels_almost_as_real_images_do(judges: list[Judge]):
    agreement = resolve("fashion-mnist", "teacher").facts["label_agreement"]
    assert {judge.name: agreement[judge.name] >= judge.accuracy - 0.03 for judge in judges} == {
        "judge-plain": True, "judge-residual": True,
    }  # fmt: skip


def test_shipped_judges_are_good_enough_and_the_package_small_enough(judges: list[Judge]):
    for judge in judges:
        assert judge.accuracy >= 0.93
    assert either_matrix(judges)[BAG, TROUSER] <= 0.003
    shipped = resolve("fashion-mnist", "teacher").folder.parent
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) <= 16 * 2**20


def test_judges_card_holds_on_the_real_test_images(judges: list[Judge], fashion_data: Path):
    import torch

    from sfd_deploy.training.data import load_images

    data = load_images(fashion_data, "test")
    images = data.batch(torch.arange(len(data)))[0].numpy()
    for judge in judges:
        assert (judge.look(images)[0] == data.labels).mean() == pytest.approx(judge.accuracy, abs=1e-3)
