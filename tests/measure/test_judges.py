from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sfd_deploy.errors import DigestError, LabelError
from sfd_deploy.measure.judges import FeatureStatistics, Judge, either_matrix, open_judge, require_same_classes
from sfd_deploy.measure.sealing import Measured
from tests.audit.toy import NAMES, real_images, seal_judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "plain"
    seal_judge(path, "plain", 1)
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    return open_judge(folder)


def test_an_opened_judge_names_what_it_never_saw(judge):
    images, labels = real_images(seed=999, count=200)
    called, features = judge.look(images.numpy())
    assert (called == labels.numpy()).mean() > 0.97
    assert features.shape == (200, 16)
    assert judge.accuracy > 0.97


def test_the_batch_an_image_is_shown_in_changes_nothing(judge):
    images = real_images(seed=998, count=37)[0].numpy()
    whole, parts = judge.look(images), judge.look(images, batch=5)
    assert np.array_equal(whole[0], parts[0])
    assert whole[1] == pytest.approx(parts[1], abs=1e-5)


def test_a_judge_is_shown_images_clamped_to_their_range(judge):
    seen: list[torch.Tensor] = []

    def see(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(images)
        return torch.zeros(len(images)), torch.zeros(len(images), 1)

    replace(judge, sight=SimpleNamespace(see=see)).look(np.array([-3, 0.5, 7], np.float32).reshape(3, 1, 1, 1))
    assert seen[0].flatten().tolist() == [-1, 0.5, 1]


def test_a_judges_card_has_the_truth_in_rows_and_what_was_called_in_columns():
    truth, called = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1])
    found = Measured(("a", "b"), truth, called, np.zeros((4, 2), np.float32))
    assert found.facts["confusion"] == [[1, 2], [0, 1]]


def test_a_flipped_byte_in_the_weights_is_refused(tmp_path):
    seal_judge(tmp_path / "plain", "plain", 1)
    file = tmp_path / "plain" / "judge.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DigestError, match=r"judge\.safetensors"):
        open_judge(tmp_path / "plain")


def test_pooled_statistics_are_those_of_the_pooled_images():
    draws = np.random.default_rng(0)
    groups = [draws.normal(size=(5000, 3)) * (label + 1) + 4 * label for label in range(3)]
    statistics = FeatureStatistics(
        np.stack([group.mean(0) for group in groups]), np.stack([np.cov(group.T, bias=True) for group in groups])
    )
    mean, covariance = statistics.pooled([0, 2])
    together = np.concatenate([groups[0], groups[2]])
    assert mean == pytest.approx(together.mean(0))
    assert covariance == pytest.approx(np.cov(together.T, bias=True))


def test_a_judge_of_other_classes_is_refused_by_name(judge):
    require_same_classes([judge], NAMES, "the run")
    with pytest.raises(LabelError, match="plain"):
        require_same_classes([judge], NAMES[::-1], "the run")


def test_either_matrix_counts_an_image_once_for_each_class_some_judge_calls_it(judge):
    def says(called: list[int]) -> Judge:
        truth = [0, 0, 1, 1]
        return replace(judge, class_names=("a", "b"), held_out=np.array([truth, called]))

    matrix = either_matrix([says([0, 1, 1, 1]), says([0, 0, 1, 0])])
    assert matrix.tolist() == [[1.0, 0.5], [0.5, 1.0]]
