"""The official code's defects D1 to D6 that concern label-conditional training: none can be here.

docs/training.md has the table. Each test was seen failing with the defect planted.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import ConfigError, DivergedError, LabelError
from sfd_deploy.labels import Labels
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.course import Course
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.rows import draw_rows
from sfd_deploy.training.stage import train
from tests.conftest import TINY_LABELS, tiny_generator
from tests.training.test_loop import iterations_of, tiny_loop
from tests.training.test_stages import CLASSES, config, equal, seal_teacher, weights_of


def test_d1_the_second_stages_teacher_is_the_teacher_and_no_network_of_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Officially phi is entry 0 of the first stage's checkpoint: its fake score."""
    teacher = seal_teacher(tmp_path / "teacher")
    first = train(config(teacher), tmp_path / "first")
    done = iterations_of(monkeypatch)
    train(config(teacher, init_from=str(first.folder), forget={"square": "star"}), tmp_path / "second")
    loop, _ = done[-1]
    phi = loop.teacher.unet.state_dict()  # after the last step: nothing moved it
    assert equal(phi, weights_of(teacher.folder))
    for name in ("generator", "fake-score"):
        assert not equal(phi, weights_of(first.folder / name))


@pytest.mark.parametrize("forget", [{"square": "square"}, {1: 1}, {"square": "1"}])
def test_d2_an_override_that_is_the_forget_label_is_refused(forget: dict[str | int, str | int]):
    with pytest.raises(LabelError, match="its own override"):
        CLASSES.forgetting(forget)


def test_d2_retained_labels_are_as_many_as_the_teacher_has_not_ten():
    labels = Labels(class_names=tuple(f"class {index}" for index in range(13))).forgetting({0: 12})
    drawn = torch.cat([
        draw_rows(tiny_loop().config, labels, (1, 2, 2), "generator", step).labels for step in range(60)
    ])  # fmt: skip
    assert set(drawn.tolist()) == set(range(13))


def test_d3_training_opens_no_file_but_its_inputs_and_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Officially real images are fetched, decoded and flipped, and only their labels used."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("data was asked for")

    monkeypatch.setattr("sfd_deploy.training.data.load_images", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    run = train(config(seal_teacher(tmp_path / "teacher"), forget={"square": "star"}), tmp_path / "run")
    assert run.generator().facts["labels"]["forget"] == {"1": 2}


class Dropping(torch.nn.Module):
    """A layer that drops as long as it is in training mode."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.drop = layer, torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.drop(self.layer(x))
        return found


def loop_of_a_dropping_teacher() -> SfdLoop:
    teacher = tiny_generator().denoiser
    teacher.unet.conv_in = Dropping(teacher.unet.conv_in)
    return tiny_loop(teacher=teacher.train())


def test_d4_both_steps_see_one_generator_function_whatever_dropout_the_teacher_was_trained_with():
    loop = loop_of_a_dropping_teacher()
    rows = draw_rows(loop.config, TINY_LABELS, loop.shape, "generator", 0)
    for step in range(2):  # officially the first iteration differs from the rest
        with torch.no_grad():
            as_psi_sees_it = loop._generate(rows)
            exported = loop.generator.unclamped(rows.latents, rows.labels)
        as_theta_is_trained = loop._generate(rows)
        assert torch.equal(as_psi_sees_it, as_theta_is_trained.detach())
        assert torch.equal(as_psi_sees_it, exported)
        loop.iterate(step)


@pytest.mark.parametrize("name", ["teacher", "fake_score"])
def test_d4_teacher_and_fake_score_drop_nothing_either(name: str):
    loop = loop_of_a_dropping_teacher()
    noisy, sigma, labels = torch.ones(2, 1, 16, 16), torch.ones(2), torch.tensor([0, 1])
    for step in range(2):
        with torch.no_grad():
            one, other = (getattr(loop, name)(noisy, sigma, labels) for _ in range(2))
        assert torch.equal(one, other)
        loop.iterate(step)


def test_d5_early_averages_let_go_of_the_start_and_the_audited_weights_are_the_exported_ones(tmp_path: Path):
    """Without a ramp, 0.9999 keeps 99.9 % of a start that knows the forget class after ten steps; ours keeps 5e-4."""
    loop = tiny_loop(iterations=10, ema_decay=0.9999)
    share = 1.0
    for step in range(10):
        share *= min(0.9999, (1 + step) / (10 + step))
    with torch.no_grad():  # a network that moved at once and then stood still
        start = [value.clone() for value in loop.ema.network.parameters()]
        for value in loop.generator.parameters():
            value.add_(1.0)
    for step in range(10):
        loop.ema.update(loop.generator, step)
    left = [1 - (now - then).mean().item() for now, then in zip(loop.ema.network.parameters(), start, strict=True)]
    assert left == pytest.approx([share] * len(left), abs=1e-5)
    assert share < 1e-3
    course = Course(tiny_loop(), tmp_path / "c.safetensors")
    assert course.run() is course.loop.ema.network
    published = {"teacher": "any", "iterations": 50_000, "ema_decay": 0.9999, "ema_ramp": False}
    assert TrainConfig.from_mapping(published, "test").ema_ramp is False  # keeps 0.7 %
    with pytest.raises(ConfigError, match="61% of what is exported would be the start"):
        TrainConfig.from_mapping(published | {"iterations": 5_000}, "test")


def test_d6_training_fails_loudly_and_goes_on_without_special_hardware(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Officially every exception is swallowed and 0 returned, and optimisers are saved but never read."""
    assert exit_code_of(["train", "--config", str(tmp_path / "none.yaml"), "-o", str(tmp_path / "run")]) == 2
    assert "no such file or preset" in capsys.readouterr().err
    loop = tiny_loop(iterations=10)
    with torch.no_grad():
        next(loop.fake_score.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError):
        Course(loop, tmp_path / "nan.safetensors").run()
    Course(tiny_loop(checkpoint_every=1), tmp_path / "c.safetensors").run()
    resumed = Course(tiny_loop(checkpoint_every=1), tmp_path / "c.safetensors")
    moments = [state["exp_avg_sq"] for state in resumed.loop.generator_adam.state.values()]
    assert len(moments) == len(list(resumed.loop.generator.parameters()))
    assert any(moment.abs().max() > 0 for moment in moments)


def test_d6_gradients_are_clipped_in_every_step_of_both_networks():
    loop = tiny_loop(clip_value=1e-7)
    loop.iterate(0)
    for network in (loop.fake_score, loop.generator):
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert len(gradients) == len(list(network.parameters()))
        assert max(g.abs().max().item() for g in gradients) == pytest.approx(1e-7)
    assert TrainConfig.model_fields["clip_value"].default == 1.0
