"""The text-to-image training benchmark at a tiny size, and its literal schedule as the reference of ours."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import page
from benchmarks.official import Term
from benchmarks.official_text import OfficialTextSchedule
from benchmarks.sides import Side
from benchmarks.text_sides import BF16, FP32, LITERAL, LORA, SMALL, VARIANTS, Shape, TextTask, open_text_task
from benchmarks.text_training import Cost, command, measure, text_of
from sfd_deploy.training.guidance import Guidance
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.memory import MemoryLimitError
from sfd_deploy.training.rows import Rows
from sfd_deploy.training.text_config import TextTrainConfig
from tests.benchmarks.literal import gradient, moved_off, same_draws, with_weights_of
from tests.conftest import tiny_generator
from tests.training.text_loop import FORGET, NEGATIVE, OVERRIDE, PROMPTS, VALUES

N = 3
SCALES = {"fake_score_fit": 1.5, "fake_score": 2.5, "teacher": 4.0}  # apart, so that a swap is seen
SD15_WEIGHTS = 859_520_964


def config(**guidance: Any) -> TextTrainConfig:
    values = {"retained_rows": N, "forget_rows": N, "forget_weight": 0.3, "guidance": SCALES | guidance}
    return TextTrainConfig.from_mapping(VALUES | values, "test")


def schedule(asked: TextTrainConfig) -> OfficialTextSchedule:
    return moved_off(OfficialTextSchedule(asked, PROMPTS, SMALL.teacher(PROMPTS.count)))


def ours(made: OfficialTextSchedule, asked: TextTrainConfig) -> SfdLoop:
    """Our loop with the schedule's own weights."""
    loop = SfdLoop(asked, PROMPTS, SMALL.teacher(PROMPTS.count), guidance=asked.guidance.bind(PROMPTS))
    return with_weights_of(made, loop)


def terms(made: OfficialTextSchedule) -> tuple[tuple[Term, Term], Rows]:
    """The same draws as two terms, and as one batch of ours; one row of each part is left empty."""
    labels = torch.tensor([1, 2, 0, FORGET, FORGET, 0])
    targets = torch.tensor([1, 2, 0, OVERRIDE, OVERRIDE, 0])
    return same_draws(made, labels, targets, (4, 8, 8))


def both(
    name: str, asked: TextTrainConfig, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[SfdLoop], None] | None = None
) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """Total loss and gradient of the literal terms, each with its own backward call, and of our one batch."""
    made = schedule(asked)
    loop = ours(made, asked)
    (retained, forget), rows = terms(made)
    if spoil is not None:
        spoil(loop)
    is_fake_score = name == "fake score"
    term = made.fake_score_term if is_fake_score else made.generator_term
    made.psi.requires_grad_(is_fake_score)
    losses = [term(retained), asked.forget_weight * term(forget)]
    for loss in losses:
        loss.backward()
    monkeypatch.setattr(SfdLoop, "_parts", lambda *_: iter([rows]))
    monkeypatch.setattr(SfdLoop, "_apply", lambda *_: False)  # the gradient is looked at, not applied
    passes = loop.fake_score_step(0) if is_fake_score else loop.generator_step(0)
    total = float((rows.weights * passes[0].loss).sum())
    theirs, mine = (made.psi, loop.fake_score) if is_fake_score else (made.theta, loop.generator)
    return (sum(loss.item() for loss in losses), gradient(theirs)), (total, gradient(mine))


def agree(theirs: tuple[float, Tensor], mine: tuple[float, Tensor]) -> bool:
    (their_loss, expected), (our_loss, found) = theirs, mine
    assert expected.abs().max() > 1e-3
    close = torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    return close and our_loss == pytest.approx(their_loss, rel=1e-10)


@pytest.mark.parametrize("name", ["fake score", "generator"])
@pytest.mark.parametrize("negative", [False, True])
def test_our_one_batch_has_the_loss_and_gradient_of_the_literal_terms(name, negative, monkeypatch: pytest.MonkeyPatch):
    assert agree(*both(name, config(fake_score_negative=negative), monkeypatch))


def guided_by(**changes: Any) -> Callable[[SfdLoop], None]:
    def spoil(loop: SfdLoop) -> None:
        loop.guidance = replace(loop.guidance, **changes)

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("fake score", guided_by(fake_score_fit=SCALES["fake_score"])),
        ("fake score", guided_by(fake_score_away=True)),
        ("generator", guided_by(fake_score=SCALES["fake_score_fit"])),
        ("generator", guided_by(teacher=SCALES["fake_score"])),
        ("generator", guided_by(away=())),
        ("generator", guided_by(fake_score_away=True)),
        ("generator", guided_by(unconditional=1)),
    ],
)
def test_a_planted_fault_of_the_guidance_is_seen(name, spoil, monkeypatch: pytest.MonkeyPatch):
    assert not agree(*both(name, config(), monkeypatch, spoil))


def test_a_teacher_that_is_asked_for_the_forget_prompt_is_seen(monkeypatch: pytest.MonkeyPatch):
    honest = Guidance.for_teacher

    def asks_the_label(self: Guidance, predict: Any, rows: Rows) -> Any:
        ask = honest(self, predict, rows)
        return lambda noisy, sigma, _targets: ask(noisy, sigma, rows.labels)

    monkeypatch.setattr(Guidance, "for_teacher", asks_the_label)
    assert not agree(*both("generator", config(), monkeypatch))


def calls_of(made: OfficialTextSchedule) -> list[tuple[str, list[int]]]:
    """Which network is asked for which prompts, in one iteration."""
    calls: list[tuple[str, list[int]]] = []
    for name, network in (("phi", made.phi), ("psi", made.psi), ("theta", made.theta.denoiser)):
        network.register_forward_hook(lambda _m, inputs, _o, name=name: calls.append((name, inputs[2].tolist())))
    made.iterate(0)
    return calls


def test_an_iteration_calls_sixteen_networks_and_goes_backward_four_times(monkeypatch: pytest.MonkeyPatch):
    made = OfficialTextSchedule(config(), PROMPTS, SMALL.teacher(PROMPTS.count))
    backward, count = Tensor.backward, []
    monkeypatch.setattr(Tensor, "backward", lambda self, *a, **k: (count.append(1), backward(self, *a, **k)))
    calls = calls_of(made)
    assert len(count) == 4
    assert [sum(name == other for other, _ in calls) for name in ("phi", "psi", "theta")] == [4, 8, 4]
    assert all(len(prompts) == N for _, prompts in calls)
    assert FORGET not in {prompt for name, prompts in calls for prompt in prompts if name == "phi"}
    assert [NEGATIVE] * N in [prompts for name, prompts in calls if name == "phi"]
    assert NEGATIVE not in {prompt for name, prompts in calls for prompt in prompts if name == "psi"}


def test_the_generator_is_asked_without_a_prompt_in_the_fake_scores_step_alone():
    made = OfficialTextSchedule(config(dropout=0.9), PROMPTS, SMALL.teacher(PROMPTS.count))
    theta = [prompts for name, prompts in calls_of(made) if name == "theta"]
    assert 0 in theta[0] + theta[1]
    assert 0 not in theta[2] + theta[3]


def test_without_guidance_a_prediction_is_one_call_and_nothing_is_left_empty():
    asked = config(fake_score_fit=1, fake_score=1, teacher=1, dropout=0.9)
    calls = calls_of(OfficialTextSchedule(asked, PROMPTS, SMALL.teacher(PROMPTS.count)))
    assert len(calls) == 10
    assert 0 not in {prompt for _, prompts in calls for prompt in prompts}


def test_the_u_net_has_the_weights_of_stable_diffusion_one_five():
    with torch.device("meta"):
        unet = Shape().unet()
    assert sum(weight.numel() for weight in unet.parameters()) == SD15_WEIGHTS
    assert all(weight.is_meta for weight in unet.parameters())


def test_the_teacher_predicts_epsilon_on_stable_diffusions_schedule():
    teacher = SMALL.teacher(2)
    assert teacher.prediction_type == "epsilon"
    # The method's own figures: timestep 625 is sigma 2.502, 20 is 0.138, 979 is 12.97.
    found = [teacher.log_sigmas[timestep].exp().item() for timestep in (20, 625, 979)]
    assert found == pytest.approx([0.138, 2.502, 12.97], rel=3e-3)


def small_task() -> TextTask:
    return open_text_task("sd15-celebrity", 2, SMALL)


def test_the_presets_values_are_kept_but_for_the_rows():
    task = small_task()
    preset = TextTrainConfig.load("sd15-celebrity", "train")
    assert (task.config.retained_rows, task.config.forget_rows) == (2, 2)
    assert task.config.guidance == preset.guidance
    assert len(task.prompts.forget) == 50
    assert task.teacher.unet.table.shape == (task.prompts.count, 4, 8)
    assert preset.gradient_checkpointing
    assert task.teacher.unet.unet.is_gradient_checkpointing


def test_every_variant_trains_in_its_precision_and_leaves_the_teacher(monkeypatch: pytest.MonkeyPatch):
    task = small_task()
    before = [weight.clone() for weight in task.teacher.parameters()]
    loops: list[SfdLoop] = []
    init = SfdLoop.__init__
    monkeypatch.setattr(SfdLoop, "__init__", lambda self, *a, **k: (init(self, *a, **k), loops.append(self))[0])
    for build in VARIANTS.values():
        side = build(task, "cpu")
        side.go(1, "cpu")
        assert side.step == 1
    assert all(torch.equal(old, new) for old, new in zip(before, task.teacher.parameters(), strict=True))
    assert [(loop.config.precision, loop.config.lora is not None) for loop in loops] == [
        ("bf16", False), ("fp32", False), ("bf16", True)
    ]  # fmt: skip
    assert loops[0].guidance.teacher == 4.5


def test_rounds_are_interleaved_and_one_variant_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch):
    now, visits, built = [0.0], [], []

    def pace(name: str, seconds: float) -> Callable[[TextTask, str], Side]:
        def build(_task: TextTask, _device: str) -> Side:
            gc.collect()
            assert not [side for side in built if side() is not None]
            visits.append(name)
            side = Side(lambda _step: now.__setitem__(0, now[0] + seconds), tiny_generator())
            built.append(weakref.ref(side))
            return side

        return build

    for name, seconds in zip(VARIANTS, (1.0, 3.0, 0.5, 6.0), strict=True):
        monkeypatch.setitem(VARIANTS, name, pace(name, seconds))
    costs = measure(small_task(), "cpu", rounds=2, iterations=3, clock=lambda: now[0])
    assert visits == [*VARIANTS, *reversed(VARIANTS)]
    assert {name: cost.seconds for name, cost in costs.items()} == {
        BF16: [1.0, 1.0], FP32: [3.0, 3.0], LORA: [0.5, 0.5], LITERAL: [6.0, 6.0]
    }  # fmt: skip


def test_the_text_has_rates_of_retained_images_and_ratios_with_their_spread():
    costs = {
        BF16: Cost([1.0, 1.0, 2.0], 2**30), FP32: Cost([2.0, 3.0, 3.0], 2**31), LORA: Cost([0.5] * 3, 2**29),
        LITERAL: Cost([4.0, 4.0, 4.0], 2**32),
    }  # fmt: skip
    text = text_of(small_task(), costs)
    assert "| ours, bf16 | 1.000 | 2.00 | 1.0 GiB |" in text
    assert (
        "bf16 over fp32: 2.00 times the retained images/s (from 1.50 to 3.00 over 3 interleaved rounds), "
        "0.50 times the peak memory." in text
    )
    assert "LoRA over full, in bf16: 2.00 times" in text
    assert "Ours in bf16 over the literal schedule: 4.00 times" in text
    assert "Ours: 2 + 2 rows" in text
    assert "two calls a guided prediction" in text


def test_what_does_not_fit_is_one_line_with_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    def build(_task: TextTask, _device: str) -> Side:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(VARIANTS, FP32, build)
    with pytest.raises(MemoryLimitError) as caught:
        measure(small_task(), "cpu", rounds=1, iterations=1)
    assert caught.value.exit_code == 2
    assert caught.value.what == "out of memory on cpu: ours, fp32, with 2 retained rows"
    assert "--rows 1" in caught.value.mend


def test_an_error_that_is_not_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def build(_task: TextTask, _device: str) -> Side:
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(VARIANTS, BF16, build)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(small_task(), "cpu", rounds=1, iterations=1)


def test_the_command_measures_a_small_pipeline_and_fills_the_page(tmp_path: Path):
    into = tmp_path / "results.md"
    into.write_text("before\n<!-- text training cpu -->\n<!-- /text training cpu -->\nafter\n")
    options = ["--small", "--rows", "2", "--rounds", "1", "--iterations", "1", "--threads", "1", "--page", str(into)]
    result = CliRunner().invoke(command, options, standalone_mode=False)
    assert result.exception is None
    assert result.return_value == 0
    text = into.read_text()
    assert all(f"| {name} | " in text for name in VARIANTS)
    assert "python -m benchmarks.text_training --config sd15-celebrity --small --device cpu --rows 2" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "not trained on a CPU"),
        (["--small", "--config", "fashion-mnist"], "fashion-mnist"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_two(
    options, message, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["text_training", *options])
    monkeypatch.setattr(Shape, "unet", lambda _self: pytest.fail("a network was made"))
    with pytest.raises(SystemExit) as caught:
        page.run(command)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error.splitlines()[0]
