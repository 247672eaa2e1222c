"""One iteration: who is asked what, how often, and which gradients it leaves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sfd_deploy.embedded import resolve
from sfd_deploy.errors import BackendError, ConfigError, DivergedError
from sfd_deploy.labels import Labels
from sfd_deploy.models.denoiser import Denoiser, EdmDenoiser
from sfd_deploy.models.generator import load_teacher
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.course import Course
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.losses import sid_loss
from sfd_deploy.training.rows import draw_rows
from sfd_deploy.training.steps import MAX_SKIPS_IN_A_ROW
from tests.conftest import TINY_LABELS, tiny_generator


def tiny_config(**changes: object) -> TrainConfig:
    values = {"teacher": "unused", "iterations": 4, "retained_rows": 6, "forget_rows": 2, "precision": "fp32"} | changes
    return TrainConfig.from_mapping(values, "test")


def tiny_loop(labels: Labels = TINY_LABELS, teacher: Denoiser | None = None, **changes: object) -> SfdLoop:
    return SfdLoop(tiny_config(**changes), labels, teacher or tiny_generator().denoiser)


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return list(network.state_dict().values())


def snapshot(network: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in weights(network)]


def is_still(before: list[torch.Tensor], network: torch.nn.Module) -> bool:
    return all(torch.equal(old, now) for old, now in zip(before, weights(network), strict=True))


def iterations_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SfdLoop, int]]:
    """Which loop did which step, filled by every training from here on."""
    done: list[tuple[SfdLoop, int]] = []
    original = SfdLoop.iterate

    def iterate(self: SfdLoop, step: int, watched: bool = False):
        done.append((self, step))
        return original(self, step, watched)

    monkeypatch.setattr(SfdLoop, "iterate", iterate)
    return done


def test_the_teacher_is_asked_for_the_override_and_never_for_a_forget_label():
    loop = tiny_loop()
    asked: dict[str, set[int]] = {"teacher": set(), "fake_score": set()}
    loop.teacher.register_forward_hook(lambda _m, inputs, _o: asked["teacher"].update(inputs[2].tolist()))
    loop.fake_score.register_forward_hook(lambda _m, inputs, _o: asked["fake_score"].update(inputs[2].tolist()))
    for step in range(4):
        loop.iterate(step)
    assert asked["teacher"] == {0, 2}
    assert asked["fake_score"] == {0, 1, 2}


@pytest.mark.parametrize(("shared", "forwards"), [(False, 5), (True, 4)])
def test_an_iteration_is_five_forward_and_two_backward_calls_or_four_forward_when_images_are_shared(
    monkeypatch: pytest.MonkeyPatch, shared: bool, forwards: int
):
    calls: Counter[str] = Counter()
    backward = torch.Tensor.backward

    def counted(tensor: torch.Tensor, *arguments: object) -> None:
        calls["backward"] += 1
        backward(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    loop = tiny_loop(share_generated=shared)
    for network in (loop.teacher, loop.fake_score, loop.generator.denoiser):
        network.unet.register_forward_hook(lambda *_: calls.update(["forward"]))
    loop.iterate(0)
    assert calls == {"forward": forwards, "backward": 2}


def test_shared_images_are_the_generators_re_noised_afresh_for_the_fake_score():
    fake, theta = tiny_loop(share_generated=True).iterate(0)
    assert torch.equal(fake[0].x, theta[0].x)
    assert torch.equal(fake[0].rows.labels, theta[0].rows.labels)
    assert not torch.equal(fake[0].sigma, theta[0].sigma)
    alone = tiny_loop().iterate(0)[1]
    assert torch.equal(alone[0].x, theta[0].x)
    assert torch.equal(alone[0].sigma, theta[0].sigma)


def test_training_draws_with_the_function_that_is_exported_but_for_the_clamp():
    loop = tiny_loop()
    rows = draw_rows(loop.config, TINY_LABELS, loop.shape, "generator", 0)
    assert torch.equal(loop.iterate(0)[1][0].x, tiny_generator().unclamped(rows.latents, rows.labels))


def test_diff_instruct_reads_both_scores_and_keeps_no_graph_of_them():
    loop, through = tiny_loop(objective="diff-instruct"), []
    for network in (loop.teacher, loop.fake_score, loop.generator.denoiser):
        network.register_forward_hook(lambda _m, _i, output: through.append(output.requires_grad))
    (done,) = loop.generator_step(0)
    assert through == [True, False, False]  # theta, psi, phi
    assert not torch.equal(done.x_phi[-2:], done.x_psi[-2:])
    expected = tiny_loop().generator_step(0)[0]
    torch.testing.assert_close((done.x_phi, done.x_psi), (expected.x_phi, expected.x_psi))
    omega = (done.x_phi - done.x).flatten(1).abs().mean(1)
    pull = -(done.x_phi - done.x_psi) * (done.rows.weights / omega).reshape(-1, 1, 1, 1)
    # The step moved the weights; the start's gradient is asked of a network that has not moved.
    fresh = tiny_loop().generator
    (wanted,) = torch.autograd.grad(
        (fresh.unclamped(done.rows.latents, done.rows.labels) * pull).sum(), fresh.denoiser.unet.conv_in.weight
    )
    torch.testing.assert_close(loop.generator.denoiser.unet.conv_in.weight.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_generator_step_takes_its_alpha_from_the_config(alpha: float):
    (done,) = tiny_loop(alpha=alpha).generator_step(0)
    assert done.x_phi is not None
    torch.testing.assert_close(done.loss, sid_loss(done.x, done.x_phi, done.x_psi, alpha))
    assert not torch.allclose(done.loss, sid_loss(done.x, done.x_phi, done.x_psi, 1.2))


def largest_first_gradient(labels: Labels) -> float:
    loop = tiny_loop(labels=labels)
    loop.generator_step(0)
    return max(p.grad.abs().max().item() for p in loop.generator.parameters() if p.grad is not None)


def test_at_the_first_step_only_forget_rows_have_a_gradient():
    """phi = psi = theta at the start: retained rows cancel, to rounding."""
    assert largest_first_gradient(TINY_LABELS.plain()) < 1e-4 * largest_first_gradient(TINY_LABELS)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}])
def test_each_step_moves_its_own_network_alone(changes: dict[str, object]):
    loop = tiny_loop(**changes)
    teacher, fake, generator = snapshot(loop.teacher), snapshot(loop.fake_score), snapshot(loop.generator)
    loop.fake_score_step(0)
    assert is_still(teacher, loop.teacher)
    assert is_still(generator, loop.generator)
    assert not is_still(fake, loop.fake_score)
    assert all(p.grad is None for p in loop.generator.parameters())
    fake = snapshot(loop.fake_score)
    loop.fake_score_adam.zero_grad(set_to_none=True)
    loop.generator_step(1)
    assert is_still(teacher, loop.teacher)
    assert is_still(fake, loop.fake_score)
    assert not is_still(generator, loop.generator)
    assert all(p.grad is None for p in [*loop.teacher.parameters(), *loop.fake_score.parameters()])


def gradient(step: str, part: slice, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The float64 gradient of one network's step over ``part`` of the batch's eight rows."""
    monkeypatch.setattr("sfd_deploy.training.loop.draw_rows", lambda *arguments: draw_rows(*arguments)[part])
    loop = tiny_loop(teacher=tiny_generator().denoiser.double(), clip_value=1e9)
    with torch.no_grad():
        loop.fake_score.unet.conv_out.bias.add_(0.01)  # at the start psi is phi, and nothing would pull
    getattr(loop, f"{step}_step")(0)
    network = loop.fake_score if step == "fake_score" else loop.generator
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("step", ["fake_score", "generator"])
def test_one_concatenated_batch_equals_the_two_halves(monkeypatch: pytest.MonkeyPatch, step: str):
    merged, retained, forgotten = (gradient(step, part, monkeypatch) for part in (slice(8), slice(6), slice(6, 8)))
    assert merged.dtype == torch.float64
    assert forgotten.abs().max() > 1e-3 * merged.abs().max()
    assert torch.allclose(merged, retained + forgotten, rtol=1e-10, atol=1e-12 * merged.abs().max().item())


@pytest.mark.parametrize("step", ["fake_score", "generator"])
def test_accumulated_parts_leave_the_whole_batchs_gradient(step: str):
    found = []
    for accumulate in (1, 2, 3):
        loop = tiny_loop(teacher=tiny_generator().denoiser.double(), accumulate=accumulate, clip_value=1e9)
        with torch.no_grad():
            loop.fake_score.unet.conv_out.bias.add_(0.01)
        assert len(getattr(loop, f"{step}_step")(0)) == accumulate
        network = loop.fake_score if step == "fake_score" else loop.generator
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-10, atol=1e-12 * found[0].abs().max().item())


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="8 rows cannot be split over 1 processes and `accumulate` 9"):
        tiny_loop(accumulate=9)


def test_compiling_on_a_cpu_is_refused():
    with pytest.raises(BackendError, match="compile: true on a CPU"):
        tiny_loop(compile=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_networks_have_the_gradients_of_eager_ones_parameter_by_parameter(precision: str):
    """On CPUs a compiled U-Net's loss was right, and its gradients zero from the first downsampler inwards."""
    eager, compiled = (gradients_on_a_gpu(precision=precision, compile=compiles) for compiles in (False, True))
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        assert torch.cosine_similarity(gradient, compiled[name], dim=0) > 0.95, name


def gradients_on_a_gpu(**changes: object) -> dict[str, torch.Tensor]:
    """Of both networks after one iteration of the shipped teacher's network, those that are not next to nothing."""
    teacher = load_teacher(resolve("fashion-mnist", "teacher"))
    config = tiny_config(objective="sid", retained_rows=24, forget_rows=8, clip_value=1e9, **changes)
    labels = Labels(class_names=tuple("abcdefghij"), forget={1: 8})
    loop = SfdLoop(config, labels, teacher, workers=Workers(torch.device("cuda")))
    loop.iterate(0)
    networks = {"psi": loop.fake_score, "theta": loop.generator}
    found = {f"{net}.{name}": value.grad.flatten().float() for net, network in networks.items()
             for name, value in network.named_parameters() if value.grad is not None}  # fmt: skip
    return {name: gradient for name, gradient in found.items() if gradient.norm() > 1e-6}


def test_the_teachers_own_loss_weight_and_noise_levels_are_used():
    """A parameterisation decides both: one that draws sigma 3 alone, and weighs it 7, must be heard."""

    class Odd(EdmDenoiser):
        def fit_weight(self, sigma: torch.Tensor) -> torch.Tensor:
            return torch.full_like(sigma, 7.0)

        def training_sigma(self, u: torch.Tensor, sigma_min: float, sigma_max: float) -> torch.Tensor:
            return torch.full_like(u, 3.0)

    (fake,), (theta,) = tiny_loop(teacher=Odd(tiny_generator().denoiser.unet, 0.5)).iterate(0)
    assert set(fake.sigma.tolist()) == set(theta.sigma.tolist()) == {3.0}
    expected = 7 * (fake.x_psi - fake.x).square().flatten(1).sum(1)
    assert torch.allclose(fake.loss, expected)


def test_both_steps_draw_noise_levels_between_the_configs_ends():
    for (done,) in tiny_loop(sigma_min=3.0, sigma_max=4.0).iterate(0):
        assert 3 <= done.sigma.min() <= done.sigma.max() <= 4


def test_both_optimisers_are_adam_without_momentum():
    """As SiD and SFD use it, on every weight."""
    loop = tiny_loop()
    for network, adam in ((loop.fake_score, loop.fake_score_adam), (loop.generator, loop.generator_adam)):
        (group,) = adam.param_groups
        assert type(adam) is torch.optim.Adam
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.0, 0.999), 0, 1e-8)
        assert len(group["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_non_finite_gradient_moves_neither_the_generator_nor_its_average(value: float):
    loop = tiny_loop()
    loop.iterate(0)
    generator, average = snapshot(loop.generator), snapshot(loop.ema.network)
    next(loop.generator.parameters()).register_hook(lambda gradient: torch.full_like(gradient, value))
    loop.generator_step(1)
    assert loop.skipped == 1
    assert is_still(generator, loop.generator)
    assert is_still(average, loop.ema.network)


def test_non_finite_steps_are_skipped_counted_and_then_stop_the_training(tmp_path: Path):
    loop = tiny_loop(iterations=10)
    with torch.no_grad():
        next(loop.teacher.parameters()).fill_(float("nan"))
    before = snapshot(loop.generator)
    with pytest.raises(DivergedError, match="5 non-finite steps in a row"):
        Course(loop, tmp_path / "d.safetensors").run()
    assert loop.skipped == MAX_SKIPS_IN_A_ROW
    assert is_still(before, loop.generator)


def test_bf16_autocast_keeps_losses_and_weights_in_fp32():
    loop = tiny_loop(precision="bf16")
    (fake,), (theta,) = loop.iterate(0)
    assert all(p.dtype == torch.float32 for p in loop.generator.parameters())
    assert {fake.loss.dtype, theta.loss.dtype, theta.x_phi.dtype} == {torch.float32}  # type: ignore[union-attr]
    exact = tiny_loop(precision="fp32").iterate(0)[0][0]
    assert not torch.equal(fake.x, exact.x)


@pytest.mark.parametrize(("ramp", "kept"), [(True, [1 / 10, 2 / 11, 3 / 12, 4 / 13]), (False, [0.9] * 4)])
def test_the_average_follows_its_ramp_step_by_step_and_has_none_when_that_is_asked_for(ramp: bool, kept: list[float]):
    """Ramp: (1 + step) / (10 + step), up to ``ema_decay``."""
    loop = tiny_loop(iterations=50, ema_decay=0.9, ema_ramp=ramp)
    start = expected = snapshot(loop.generator)
    for step, share in enumerate(kept):
        loop.iterate(step)
        now = weights(loop.generator)
        expected = [share * old + (1 - share) * new for old, new in zip(expected, now, strict=True)]
    found = weights(loop.ema.network)
    assert distance(found, expected) < 1e-2 * distance(found, start)


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))
