"""What surrounds the iterations: resuming, recording, looking, stopping, and memory that runs out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sfd_deploy.errors import ConfigError, DivergedError, ManifestError
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.training.course import Course
from sfd_deploy.training.memory import MemoryLimitError, is_out_of_memory, saying_no_room
from tests.training.test_loop import tiny_loop, weights
from tests.training.text_loop import text_loop


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def course(file: Path, **changes: object) -> Course:
    return Course(tiny_loop(checkpoint_every=2, **changes), file)


@pytest.mark.parametrize("changes", [{}, {"share_generated": True}, {"accumulate": 2, "precision": "bf16"}])
def test_a_resumed_training_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, changes: dict[str, object]):
    unbroken = course(tmp_path / "a.safetensors", **changes).run()
    broken = course(tmp_path / "b.safetensors", **changes)
    original = broken.loop.iterate

    def die_at_three(step: int, watched: bool = False):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, watched)

    broken.loop.iterate = die_at_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = course(tmp_path / "b.safetensors", **changes)
    assert resumed.step == 2
    assert same_weights(unbroken, resumed.run())
    assert resumed.record[-1]["step"] == 4


def test_a_resumed_training_keeps_its_record_and_counts_its_skips_on(tmp_path: Path):
    first = course(tmp_path / "a.safetensors")
    first.record, first.loop.skipped = [{"step": 3}], 7
    first.loop.skips_in_a_row = {"fake score": 4, "generator": 1}
    first._save()
    resumed = course(tmp_path / "a.safetensors")
    assert (resumed.record, resumed.loop.skipped) == ([{"step": 3}], 7)
    assert resumed.loop.skips_in_a_row == {"fake score": 4, "generator": 1}


def test_at_the_start_the_recorded_gap_is_the_forget_rows_alone(tmp_path: Path):
    """phi = psi = theta at the start: on retained rows they agree to rounding. So small a rate moves nothing."""
    still = course(tmp_path / "a.safetensors", iterations=1, fake_score_rate=1e-9, generator_rate=1e-9)
    still.run()
    (row,) = still.record
    assert row["gap_retained"] < 1e-6 * row["gap_forget"]


class Written(dict[str, float]):
    """Stands for TensorBoard: the figures that were written."""

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, _step: int, figures: dict[str, float]) -> None:
        self.update(figures)


@pytest.mark.parametrize("most", [2, 100])
def test_with_many_prompts_figures_are_by_part_and_else_by_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
):
    monkeypatch.setattr("sfd_deploy.training.course.MOST_FOLLOWED", most)
    written, loop = Written(), text_loop(iterations=1, retained_rows=12, forget_rows=3)
    Course(loop, tmp_path / "a.safetensors", scalars=lambda _: written, bounded=False).run()  # type: ignore[arg-type, return-value]
    (theta,) = text_loop(iterations=1, retained_rows=12, forget_rows=3).iterate(0)[1]
    within = [theta.x[theta.rows.labels == prompt].var(0).mean().item() for prompt in (1, 2)]
    counts = [(theta.rows.labels == prompt).sum().item() for prompt in (1, 2)]
    forgotten = "forget" if most == 2 else "forget-3"
    parts = {name.split("/")[1] for name in written if name.startswith(("gap/", "spread/"))} - {"retained"}
    assert parts - {"label-1", "label-2"} == {forgotten}
    assert ("gap/label-1" in written) == (most == 100)
    assert not any(name.startswith("outside") for name in written)
    expected = sum(count * value for count, value in zip(counts, within, strict=True)) / sum(counts)
    assert written["spread/retained"] == pytest.approx(expected**0.5, rel=1e-4)


def test_an_estimate_is_given_before_the_first_step_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    without = course(tmp_path / "a.safetensors").run()
    monkeypatch.setattr("sfd_deploy.training.steps.WORTH_ESTIMATING", 1)
    assert same_weights(without, course(tmp_path / "b.safetensors").run())
    assert "train: about" in capsys.readouterr().err


def test_the_skips_of_an_estimates_own_steps_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfd_deploy.training.steps.WORTH_ESTIMATING", 1)
    diverging = course(tmp_path / "a.safetensors")
    with torch.no_grad():
        next(diverging.loop.teacher.parameters()).fill_(float("nan"))
    diverging._estimate()
    assert (diverging.loop.skipped, set(diverging.loop.skips_in_a_row.values())) == (0, {0})


def test_ctrl_c_finishes_the_step_saves_and_the_rest_is_the_same(tmp_path: Path):
    unbroken = course(tmp_path / "a.safetensors").run()
    stopped = course(tmp_path / "b.safetensors")
    original = stopped.loop.generator_step

    def interrupt(step: int, *arguments: object):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, *arguments)

    stopped.loop.generator_step = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = course(tmp_path / "b.safetensors")
    assert resumed.step == 3  # no multiple of checkpoint_every
    assert same_weights(unbroken, resumed.run())


def test_a_checkpoint_of_another_config_or_input_is_refused_naming_the_key(tmp_path: Path):
    course(tmp_path / "c.safetensors").run()
    with pytest.raises(ConfigError, match="seed"):
        course(tmp_path / "c.safetensors", seed=5)
    with pytest.raises(ConfigError, match="inputs"):
        Course(tiny_loop(checkpoint_every=2), tmp_path / "c.safetensors", identity={"inputs": ["another teacher"]})


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    file = tmp_path / "c.safetensors"
    course(file).run()
    whole = file.read_bytes()
    notes = whole.index(b"record")
    spoilt = {
        "cut": whole[:200],
        "a weight's last bit": whole[:-1] + bytes([whole[-1] ^ 1]),
        "what is said of it": whole[:notes] + b"R" + whole[notes + 1 :],
    }
    for name, content in spoilt.items():
        file.write_bytes(content)
        with pytest.raises(ManifestError, match=r"c\.safetensors: not a checkpoint, or damaged"):
            pytest.fail(f"{name}: step {course(file).step}")
    save_file({"unet/weight": torch.zeros(1)}, file)
    with pytest.raises(ManifestError, match="not a checkpoint"):
        course(file)


class Preferring:
    """Stands for ``Watch``, and for its rating: likes the generator best at one step."""

    def __init__(self, likes: int) -> None:
        self.likes, self.looks, self.seen = likes, [], {}
        self.rating = self

    def due(self, step: int, last: bool = False) -> bool:
        return True

    def look(self, step: int, generator: OneStepGenerator) -> dict[str, float]:
        self.looks.append(step)
        self.seen[step] = [value.clone() for value in weights(generator)]
        return {"watch/forget-rate": 0.5}

    @property
    def best(self) -> SimpleNamespace:
        return SimpleNamespace(step=self.likes if self.likes in self.looks else max(self.looks))

    doubt = ""

    def state(self) -> dict[str, object]:
        return {"looks": self.looks}

    def restore(self, state: dict[str, list[int]]) -> None:
        self.looks = list(state.get("looks", []))


class Blind(Preferring):
    """Never looks."""

    best = None  # type: ignore[assignment]

    def due(self, step: int, last: bool = False) -> bool:
        return False


def test_the_best_looks_weights_are_exported_and_survive_a_stop(tmp_path: Path):
    watch = Preferring(likes=1)
    stopped = Course(tiny_loop(checkpoint_every=2), tmp_path / "a.safetensors", watch=watch)  # type: ignore[arg-type]
    original = stopped.loop.iterate

    def die_at_three(step: int, watched: bool = False):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, watched)

    stopped.loop.iterate = die_at_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = Preferring(likes=1)
    resumed = Course(tiny_loop(checkpoint_every=2), tmp_path / "a.safetensors", watch=again)  # type: ignore[arg-type]
    exported = resumed.run()
    assert again.looks == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(watch.seen[1], weights(exported), strict=True))
    assert not same_weights(exported, resumed.loop.averaged())
    assert resumed.exported["step"] == 1
    assert "by a judge" in resumed.exported["rule"]


def test_a_judge_that_never_looked_chooses_nothing(tmp_path: Path):
    """Every look failed to come due: the start, which the best is kept in, would be exported."""
    watch = Blind(likes=9)
    blind = Course(tiny_loop(checkpoint_every=2), tmp_path / "a.safetensors", watch=watch)  # type: ignore[arg-type]
    assert blind.run() is blind.loop.averaged()
    assert blind.exported == {"step": 4, "rule": "the last step's average"}


def test_skipped_steps_are_told_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stumbling = course(tmp_path / "a.safetensors")
    step = stumbling.loop.generator_step

    def stumble(number: int, *arguments: object):
        weight = next(stumbling.loop.generator.parameters())
        nan = weight.register_hook(lambda gradient: gradient * float("nan")) if number == 1 else None
        done = step(number, *arguments)  # type: ignore[arg-type]
        if nan is not None:
            nan.remove()
        return done

    stumbling.loop.generator_step = stumble  # type: ignore[method-assign]
    stumbling.run()
    assert "train: 1 of 8 steps skipped: non-finite gradients" in capsys.readouterr().err


def test_a_training_that_took_fewer_than_half_its_steps_makes_nothing(tmp_path: Path, monkeypatch):
    """Too short for as many skips in a row as stop it: the untouched start was exported, and called trained."""
    taken = iter([False] * 4 + [True] * 4 + [False] * 4 + [True] * 2 + [False] * 2)  # both networks' steps in turn
    monkeypatch.setattr("sfd_deploy.training.loop.all_finite", lambda _: next(taken))
    course(tmp_path / "half.safetensors").run()
    for _ in range(2):  # run again, it is still not finished
        with pytest.raises(DivergedError, match="training diverged: 6 of 8 steps skipped"):
            course(tmp_path / "most.safetensors").run()
    assert next(taken, "all asked") == "all asked"


def test_what_speaks_against_the_exported_look_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    watch = Preferring(likes=1)
    watch.doubt = "still draws it"
    Course(tiny_loop(), tmp_path / "a.safetensors", watch=watch).run()  # type: ignore[arg-type]
    assert "train: still draws it" in capsys.readouterr().err


def test_without_a_judge_the_last_average_is_exported(tmp_path: Path):
    plain = course(tmp_path / "a.safetensors")
    assert plain.run() is plain.loop.averaged()
    assert plain.exported == {"step": 4, "rule": "the last step's average"}


def test_out_of_memory_is_one_line_with_the_batch_that_would_fit_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = course(tmp_path / "a.safetensors")
    original = full.loop.iterate

    def greedy(step: int, watched: bool = False):
        if step == 2:
            torch.empty(2**50)  # the allocator's own error
        return original(step, watched)

    full.loop.iterate = greedy  # type: ignore[method-assign]
    # A row of 100 bytes above 1,000: 1,500 bytes, a tenth kept free, hold three.
    monkeypatch.setattr("sfd_deploy.training.estimate.peak_bytes", lambda call, _: 1000 + 100 * len(call()[1][0].rows))
    monkeypatch.setattr("sfd_deploy.training.estimate.free_bytes", lambda _: 1500)
    monkeypatch.setattr("sfd_deploy.training.estimate.held_bytes", lambda _: 0)
    with pytest.raises(MemoryLimitError, match="8 rows at once") as caught:
        full.run()
    assert caught.value.exit_code == 2
    assert "about 3 rows would fit: set `accumulate` to 3" in caught.value.mend
    resumed = course(tmp_path / "a.safetensors")
    assert resumed.step == 2
    assert same_weights(resumed.run(), course(tmp_path / "b.safetensors").run())


def test_no_room_with_shared_images_is_not_mended_by_what_they_refuse(tmp_path: Path):
    full = course(tmp_path / "a.safetensors", share_generated=True)
    full.loop.iterate = lambda *_, **__: torch.empty(2**50)  # type: ignore[assignment, method-assign]
    with pytest.raises(MemoryLimitError, match="leave `share_generated` out or lower the rows") as caught:
        full.run()
    assert "accumulate" not in caught.value.mend


def test_one_row_that_does_not_fit_is_not_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Two smaller batches may still say that three would."""
    alone = course(tmp_path / "a.safetensors", accumulate=8)
    monkeypatch.setattr("sfd_deploy.training.memory.largest_batch", lambda _: 3)
    alone.loop.iterate = lambda *_, **__: torch.empty(2**50)  # type: ignore[assignment, method-assign]
    with pytest.raises(MemoryLimitError, match="1 rows at once; not even one row fits"):
        alone.run()


def test_networks_that_do_not_fit_are_one_line():
    with pytest.raises(MemoryLimitError, match="out of memory on cuda before the first step"), saying_no_room("cuda"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="shape mismatch"), saying_no_room("cuda"):
        raise RuntimeError("shape mismatch")


def test_only_an_allocators_error_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
