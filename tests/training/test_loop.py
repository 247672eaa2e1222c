from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfd_deploy.errors import ConfigError, DivergedError, ManifestError
from sfd_deploy.labels import Labels
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.loop import MAX_SKIPS_IN_A_ROW, Rows, SfdLoop, draw_rows
from tests.conftest import TINY_LABELS, tiny_generator


def tiny_loop(labels: Labels = TINY_LABELS, **changes: object) -> SfdLoop:
    values = {"teacher": "unused", "iterations": 4, "retained_rows": 6, "forget_rows": 2, "precision": "fp32"} | changes
    return SfdLoop(TrainConfig.from_mapping(values, "test"), labels, tiny_generator().denoiser)


def test_the_teacher_is_asked_for_the_override_and_never_for_a_forget_label():
    loop = tiny_loop()
    asked: dict[str, set[int]] = {"teacher": set(), "fake_score": set()}
    loop.teacher.register_forward_hook(lambda _m, inputs, _o: asked["teacher"].update(inputs[2].tolist()))
    loop.fake_score.register_forward_hook(lambda _m, inputs, _o: asked["fake_score"].update(inputs[2].tolist()))
    for step in range(4):
        loop.generator_step(step)
    assert asked["teacher"] == {0, 2}
    assert asked["fake_score"] == {0, 1, 2}


def largest_first_gradient(labels: Labels) -> float:
    loop = tiny_loop(labels=labels)
    loop.generator_step(0)
    return max(p.grad.abs().max().item() for p in loop.generator.parameters() if p.grad is not None)


def test_at_the_first_step_only_forget_rows_have_a_gradient():
    """phi = psi = theta at the start: retained rows cancel, to rounding."""
    assert largest_first_gradient(TINY_LABELS.plain()) < 1e-4 * largest_first_gradient(TINY_LABELS)


def test_each_step_moves_its_own_network_alone():
    loop = tiny_loop()
    snapshot = lambda net: [p.detach().clone() for p in net.parameters()]
    same = lambda old, net: all(torch.equal(a, b) for a, b in zip(old, net.parameters(), strict=True))
    teacher, fake, generator = snapshot(loop.teacher), snapshot(loop.fake_score), snapshot(loop.generator)
    loop.fake_score_step(0)
    assert same(teacher, loop.teacher)
    assert same(generator, loop.generator)
    assert not same(fake, loop.fake_score)
    assert all(p.grad is None for p in loop.generator.parameters())
    fake = snapshot(loop.fake_score)
    loop.fake_score_adam.zero_grad(set_to_none=True)
    loop.generator_step(1)
    assert same(teacher, loop.teacher)
    assert same(fake, loop.fake_score)
    assert not same(generator, loop.generator)
    assert all(p.grad is None for p in [*loop.teacher.parameters(), *loop.fake_score.parameters()])


def test_one_concatenated_batch_equals_the_two_halves():
    """float64: the gradient of the merged batch is the sum of the retained and the forget part's."""
    from sfd_deploy.training.losses import sid_loss

    loop = tiny_loop()
    for net in (loop.teacher, loop.fake_score, loop.generator):
        net.double()
    rows = draw_rows(loop.config, TINY_LABELS, torch.Generator().manual_seed(1))
    rows = Rows(rows.labels, rows.targets, rows.weights.double())
    draws = torch.Generator().manual_seed(2)
    z, noise = (torch.randn(8, 1, 16, 16, generator=draws, dtype=torch.float64) for _ in range(2))

    def gradient(part: slice) -> torch.Tensor:
        x = loop.generator.unclamped(z[part], rows.labels[part])
        noisy, sigma = x + 1.5 * noise[part], torch.full((len(x),), 1.5)
        x_phi = loop.teacher(noisy, sigma, rows.targets[part])
        x_psi = loop.fake_score(noisy, sigma, rows.labels[part]) + 0.01
        loss = (rows.weights[part] * sid_loss(x, x_phi, x_psi)).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(loop.generator.parameters()))])

    merged, halves = gradient(slice(0, 8)), gradient(slice(0, 6)) + gradient(slice(6, 8))
    # The networks' outputs are rounded to float32, hence not 1e-12.
    assert torch.allclose(merged, halves, rtol=1e-5, atol=1e-7 * merged.abs().max().item())


def test_rows_weigh_each_part_once():
    rows = draw_rows(tiny_loop().config, TINY_LABELS, torch.Generator().manual_seed(0))
    assert rows.weights[:6].sum().item() == pytest.approx(1.0)
    assert rows.weights[6:].sum().item() == pytest.approx(1 / 9)
    assert rows.labels[6:].tolist() == [1, 1]
    assert rows.targets[6:].tolist() == [2, 2]
    assert set(rows.labels[:6].tolist()) <= {0, 2}


def weights(generator: torch.nn.Module) -> list[torch.Tensor]:
    return list(generator.state_dict().values())


def test_a_resumed_training_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfd_deploy.training.loop.CHECKPOINT_EVERY", 2)
    unbroken = tiny_loop().run(tmp_path / "a.safetensors")
    broken = tiny_loop()
    original = broken.generator_step

    def die_at_three(step: int) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        return original(step)

    broken.generator_step = die_at_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run(tmp_path / "b.safetensors")
    resumed = tiny_loop()
    found = resumed.run(tmp_path / "b.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken), weights(found), strict=True))
    assert resumed.record[-1]["step"] == 4


def test_a_checkpoint_of_another_config_is_refused_naming_the_key(tmp_path: Path):
    tiny_loop().run(tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="seed"):
        tiny_loop(seed=5).run(tmp_path / "c.safetensors")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    file = tmp_path / "c.safetensors"
    tiny_loop().run(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ManifestError, match=r"c\.safetensors"):
        tiny_loop().run(file)


def test_non_finite_steps_are_skipped_counted_and_then_stop_the_training(tmp_path: Path):
    loop = tiny_loop(iterations=50)
    with torch.no_grad():
        next(loop.teacher.parameters()).fill_(float("nan"))
    before = [value.clone() for value in weights(loop.generator)]
    with pytest.raises(DivergedError, match="non-finite"):
        loop.run(tmp_path / "d.safetensors")
    assert loop.skipped == MAX_SKIPS_IN_A_ROW
    assert all(torch.equal(a, b) for a, b in zip(before, weights(loop.generator), strict=True))


def test_bf16_autocast_keeps_losses_and_weights_in_fp32():
    loop = tiny_loop(precision="bf16")
    figures = loop.fake_score_step(0) | loop.generator_step(0)
    assert all(p.dtype == torch.float32 for p in loop.generator.parameters())
    assert figures["fake_score_loss"] > 0
