"""Teacher and judge training, mechanics and a toy on which both must succeed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfd_deploy.errors import ConfigError, DataError, DivergedError, LabelError, LimitError, ModelError
from sfd_deploy.measure.judges import either_matrix, open_judge
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.frame import learning_rate_at, total_steps
from sfd_deploy.training.judge import JudgeConfig, augment, seal_judge, train_judge
from sfd_deploy.training.memory import MemoryLimitError
from sfd_deploy.training.teacher import (
    TeacherConfig,
    TeacherTraining,
    seal_teacher,
    teacher_loss,
    train_teacher,
)
from tests.conftest import tiny_generator

NETWORK = {"image_size": 16, "channels": 1, "block_channels": [8, 16], "norm_groups": 4}


def halves(count: int, seed: int) -> LabelledImages:
    """Class 0 is bright above, class 1 bright below, with noise."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 2, count)
    images = draws.integers(0, 60, (count, 1, 16, 16)).astype(np.uint8)
    images[labels == 0, :, :8] += 180
    images[labels == 1, :, 8:] += 180
    return LabelledImages(images, labels.astype(np.int64), ("above", "below"))


def teacher_config(**changes: object) -> TeacherConfig:
    values = {"network": NETWORK, "images": 8 * 6, "batch_size": 8, "precision": "fp32",
              "monitor": {"every": 0, "tensorboard": False}} | changes  # fmt: skip
    return TeacherConfig.from_mapping(values, "test")


def judge_config(**changes: object) -> JudgeConfig:
    classifier = {"architecture": "plain", "channels": 1, "widths": [8, 8]}
    values = {"classifier": classifier, "epochs": 3, "batch_size": 16, "shift": 1, "flip": False} | changes
    return JudgeConfig.from_mapping(values, "test")


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which Ctrl-C stops at one more call than ``calls``."""
    left = iter(range(calls))

    def broken(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return broken


def test_a_resumed_teacher_equals_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfd_deploy.training.teacher.CHECKPOINT_EVERY", 2)
    data, config = halves(40, 0), teacher_config()
    unbroken = train_teacher(config, data, tmp_path / "a.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(LabelledImages, "batch", failing_after(4, LabelledImages.batch))
        with pytest.raises(KeyboardInterrupt):
            train_teacher(config, data, tmp_path / "b.safetensors")
    resumed = train_teacher(config, data, tmp_path / "b.safetensors")
    assert same_weights(unbroken, resumed)


def test_every_weight_of_the_network_is_trained(tmp_path: Path):
    """A compiled network once lost the gradients below the first level, and its loss still fell (decision 0001)."""
    data, config = halves(40, 0), teacher_config(images=8)
    torch.manual_seed(config.seed)
    start = config.network.build(2).state_dict()
    trained = train_teacher(config, data, tmp_path / "a.safetensors").unet.state_dict()
    untouched = {name for name, value in trained.items() if torch.equal(value, start[name])}
    assert untouched == set()


def test_the_average_follows_the_ramp_of_the_steps_taken():
    """Weight of the old average after step k: min(decay, (1 + k) / (10 + k)), by hand on one parameter."""
    training = TeacherTraining(teacher_config(ema_decay=0.15, warmup_steps=0), halves(40, 0), "cpu")
    weights, averages = training.unet.conv_in.weight, training.ema.network.conv_in.weight
    expected = weights.detach().double()
    for step, kept in enumerate((1 / 10, 0.15, 0.15)):
        training.iterate(step)
        expected = kept * expected + (1 - kept) * weights.detach().double()
    assert torch.allclose(averages.double(), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(averages, weights, rtol=0, atol=1e-5)


def test_a_teacher_starts_from_another_ones_weights_or_says_why_not(tmp_path: Path):
    data, first = halves(40, 0), teacher_config(images=8)
    denoiser = train_teacher(first, data, tmp_path / "a.safetensors")
    sealed = seal_teacher(first, denoiser, data, tmp_path / "first", data_name="halves")
    still = teacher_config(images=8, init_from=str(tmp_path / "first"), learning_rate=1e-30)
    assert same_weights(train_teacher(still, data, tmp_path / "b.safetensors"), denoiser)
    second = seal_teacher(still, denoiser, data, tmp_path / "second", data_name="halves")
    assert [parent.digest for parent in second.manifest.parents] == [sealed.digest]
    other = teacher_config(init_from=str(tmp_path / "first"), network=NETWORK | {"block_channels": [8, 8]})
    with pytest.raises(ConfigError, match="its network is another"):
        train_teacher(other, data, tmp_path / "c.safetensors")


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    config = teacher_config(images=8 * 100, warmup_steps=10, decay_share=0.5, learning_rate=1.0)
    assert total_steps(config) == 100
    assert learning_rate_at(0, config) == pytest.approx(0.1)
    assert learning_rate_at(30, config) == learning_rate_at(50, config) == 1.0
    assert learning_rate_at(75, config) == pytest.approx(0.5)
    assert learning_rate_at(99, config) == pytest.approx(0.02)


def test_teacher_loss_of_a_perfect_prediction_is_zero_and_of_zero_prediction_its_closed_form():
    class Fixed(torch.nn.Module):
        sigma_data = 0.5

        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.value = value

        def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.value

    images, sigma = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0.5, 1.0])
    arguments = (images, torch.tensor([0, 1]), sigma, torch.randn(2, 1, 2, 2))
    assert teacher_loss(Fixed(images), *arguments).tolist() == [0.0, 0.0]  # type: ignore[arg-type]
    # weight (s^2 + 1/4) / (s/2)^2 times 0.25: s = 0.5 → 8 / 4, s = 1 → 5 / 4
    assert teacher_loss(Fixed(images * 0), *arguments).tolist() == pytest.approx([2.0, 1.25])  # type: ignore[arg-type]


def test_images_that_do_not_fit_and_a_diverging_teacher_are_one_line(tmp_path: Path):
    data = halves(20, 0)
    with pytest.raises(DataError, match=r"images are \(1, 16, 16\), the network wants \(1, 32, 32\)"):
        train_teacher(teacher_config(network=NETWORK | {"image_size": 32}), data, tmp_path / "a.safetensors")
    with pytest.raises(DivergedError, match=r"teacher diverged: 5 non-finite steps in a row at step \d"):
        train_teacher(
            teacher_config(learning_rate=1e30, warmup_steps=0, images=8 * 40), data, tmp_path / "b.safetensors"
        )


def test_a_judge_learns_is_sealed_with_its_errors_and_opens_the_same(tmp_path: Path):
    train, held_out, config = halves(400, 0), halves(100, 1), judge_config()
    classifier = train_judge(config, train, tmp_path / "a.safetensors")
    sealed = seal_judge(config, classifier, train, held_out, tmp_path / "judge", "halves")
    assert sealed.facts["accuracy"] > 0.95
    assert np.array(sealed.facts["confusion"]).sum() == 100
    judge = open_judge(tmp_path / "judge")
    images = held_out.batch(torch.arange(100))[0].numpy()
    labels, features = judge.look(images)
    assert (labels == held_out.labels).mean() == pytest.approx(sealed.facts["accuracy"])
    assert judge.accuracy == pytest.approx(sealed.facts["accuracy"])
    ours = features[held_out.labels == 1].mean(0)
    assert judge.reference.mean[1] == pytest.approx(ours, abs=1e-4)
    expected = np.cov(features.astype(np.float64).T, ddof=0)
    pooled_mean, pooled = judge.reference.pooled([0, 1])
    assert pooled_mean == pytest.approx(features.mean(0), abs=0.1)
    assert pooled == pytest.approx(expected, abs=0.1)
    assert either_matrix([judge]) == pytest.approx(
        np.array(sealed.facts["confusion"]) / np.bincount(held_out.labels)[:, None]
    )


def test_a_resumed_judge_equals_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfd_deploy.training.judge.CHECKPOINT_EVERY", 3)
    data, config = halves(64, 0), judge_config(epochs=2)
    unbroken = train_judge(config, data, tmp_path / "a.safetensors")
    monkeypatch.setattr("sfd_deploy.training.judge.augment", failing_after(4, augment))
    with pytest.raises(KeyboardInterrupt):
        train_judge(config, data, tmp_path / "b.safetensors")
    monkeypatch.setattr("sfd_deploy.training.judge.augment", augment)
    assert same_weights(unbroken, train_judge(config, data, tmp_path / "b.safetensors"))


def test_a_judge_that_diverges_is_one_line(tmp_path: Path):
    with pytest.raises(DivergedError, match=r"judge diverged: 5 non-finite steps in a row at step \d"):
        train_judge(judge_config(learning_rate=1e30), halves(64, 0), tmp_path / "a.safetensors")


@pytest.mark.parametrize("network", ["teacher", "judge"])
def test_a_step_with_a_gradient_that_is_no_number_is_skipped_counted_and_told(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def trained(name: str) -> dict[str, torch.Tensor]:
        file = tmp_path / f"{name}.safetensors"
        if network == "teacher":
            return train_teacher(teacher_config(), halves(64, 0), file).state_dict()
        return train_judge(judge_config(), halves(40, 0), file).state_dict()

    with spoilt_gradients(monkeypatch, {3}):
        found = trained("one")
    assert all(value.isfinite().all() for value in found.values())
    said = capsys.readouterr().err
    assert f"{network}: 1 of " in said
    assert "steps skipped: non-finite loss or gradient" in said
    with spoilt_gradients(monkeypatch, set(range(1, 100))):
        with pytest.raises(DivergedError, match=f"{network} diverged: 5 non-finite steps in a row at step 5"):
            trained("many")
        assert not (tmp_path / "many.safetensors").exists()


@contextmanager
def spoilt_gradients(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> Iterator[None]:
    """Gradients of the backward passes of these numbers hold an infinity."""
    backward, count = torch.Tensor.backward, itertools.count()

    def spoiling(loss: torch.Tensor) -> None:
        backward(loss * torch.inf if next(count) in steps else loss)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", spoiling)
        yield


def test_weights_that_only_the_last_step_spoils_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = torch.optim.AdamW.step

    def spoil(optimiser: torch.optim.AdamW, *arguments: Any) -> None:
        step(optimiser, *arguments)
        with torch.no_grad():
            optimiser.param_groups[0]["params"][0].view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(DivergedError, match="judge: weights are not finite after 1 steps"):
        train_judge(judge_config(epochs=1), halves(16, 0), tmp_path / "a.safetensors")
    with pytest.raises(DivergedError, match="teacher: weights are not finite after 1 steps"):
        train_teacher(teacher_config(images=8), halves(16, 0), tmp_path / "b.safetensors")


def test_a_judge_that_sees_no_numbers_is_neither_sealed_nor_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, data = judge_config(), halves(50, 0)
    classifier = config.classifier.build(2).eval()
    with torch.no_grad():
        classifier.body[0].weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="features of real images are not finite"):
        seal_judge(config, classifier, data, halves(50, 1), tmp_path / "judge", "halves")
    assert not (tmp_path / "judge").exists()
    monkeypatch.setattr("sfd_deploy.measure.sealing.np.isfinite", np.ones_like)
    seal_judge(config, classifier, data, halves(50, 1), tmp_path / "judge", "halves")
    with pytest.raises(ModelError, match="judge: its features are not finite"):
        open_judge(tmp_path / "judge")


def test_a_training_goes_on_with_its_own_data_alone(tmp_path: Path):
    train_judge(judge_config(), halves(32, 0), tmp_path / "judge.safetensors")
    with pytest.raises(ConfigError, match=r"another config \(data differ\)"):
        train_judge(judge_config(), halves(32, 1), tmp_path / "judge.safetensors")
    train_teacher(teacher_config(), halves(32, 0), tmp_path / "teacher.safetensors")
    with pytest.raises(ConfigError, match=r"another config \(data differ\)"):
        train_teacher(teacher_config(), halves(32, 1), tmp_path / "teacher.safetensors")


def test_a_judges_batch_that_does_not_fit_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("sfd_deploy.training.judge.augment", full)
    with pytest.raises(MemoryLimitError, match="out of memory on cpu with a batch of 16; lower `batch_size`"):
        train_judge(judge_config(), halves(32, 0), tmp_path / "a.safetensors")


def test_a_judge_below_its_minimum_is_refused_and_not_written(tmp_path: Path):
    config = judge_config(epochs=1, min_accuracy=1.0)
    classifier = config.classifier.build(2)
    with pytest.raises(LimitError, match="judge accuracy is"):
        seal_judge(config, classifier.eval(), halves(50, 0), halves(50, 1), tmp_path / "judge", "halves")
    assert not (tmp_path / "judge").exists()


def test_augmentation_shifts_each_image_within_its_range():
    images = torch.full((200, 1, 8, 8), -1.0)
    images[:, :, 4, 4] = 1.0
    moved = augment(images, judge_config(shift=2, flip=False), torch.Generator().manual_seed(0))
    rows, columns = torch.nonzero(moved[:, 0] == 1.0)[:, 1:].T
    assert len(rows) == 200
    assert (sorted(set(rows.tolist())), sorted(set(columns.tolist()))) == ([2, 3, 4, 5, 6], [2, 3, 4, 5, 6])
    flipped = augment(images[:, :, :, :], judge_config(shift=0, flip=True), torch.Generator().manual_seed(0))
    assert set(torch.nonzero(flipped[:, 0] == 1.0)[:, 2].tolist()) == {3, 4}


def test_a_shift_moves_in_black_or_the_edge_again():
    grey, draws = torch.zeros(50, 3, 8, 8), torch.Generator().manual_seed(0)
    config = judge_config(shift=2, flip=False)
    assert augment(grey, config, draws).unique().tolist() == [-1.0, 0.0]
    assert augment(grey, config.model_copy(update={"edges": "repeat"}), draws).unique().tolist() == [0.0]


def test_a_sealed_teacher_carries_what_judges_say_of_its_samples(tmp_path: Path):
    data, config = halves(200, 0), judge_config()
    classifier = train_judge(config, data, tmp_path / "j.safetensors")
    seal_judge(config, classifier, halves(200, 0), halves(100, 1), tmp_path / "judge", "halves")
    judge = open_judge(tmp_path / "judge")
    denoiser = train_teacher(teacher_config(), data, tmp_path / "t.safetensors")
    sealed = seal_teacher(
        teacher_config(), denoiser, data, tmp_path / "teacher", data_name="halves", judges=[judge], per_label=4
    )
    assert set(sealed.facts["label_agreement"]) == {"judge"}
    assert 0 <= sealed.facts["label_agreement"]["judge"] <= 1
    assert sealed.facts["labels"]["class_names"] == ["above", "below"]
    other = LabelledImages(data.images, data.labels, ("a", "b"))
    with pytest.raises(LabelError, match="knows other classes"):
        seal_teacher(teacher_config(), denoiser, other, tmp_path / "x", data_name="x", judges=[judge])


def test_the_agreement_of_a_random_teacher_is_that_of_chance(tmp_path: Path):
    """A metric that cannot fail would call any image by the label asked for."""
    from sfd_deploy.labels import Labels
    from sfd_deploy.training.teacher import label_agreement

    config = judge_config(classifier={"architecture": "residual", "channels": 1, "widths": [8, 8]})
    classifier = train_judge(config, halves(200, 0), tmp_path / "j.safetensors")
    seal_judge(config, classifier, halves(200, 0), halves(100, 1), tmp_path / "judge", "halves")
    labels = Labels(class_names=("above", "below", "beside"))
    found = label_agreement(tiny_generator().denoiser, labels, [open_judge(tmp_path / "judge")], per_label=20)
    assert found["judge"] < 0.7
