"""Training on prompts through the command line: what a run holds, going on after a stop, and bad input."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.manifest import verify
from sfd_deploy.models.text.folder import open_text_teacher
from sfd_deploy.models.text.generator import load_text_generator
from sfd_deploy.prompts import prompts_in
from sfd_deploy.runs import Run
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.text_inputs import load_text_start, open_text_inputs
from sfd_deploy.training.text_stage import text_teacher
from tests.text_world import text_parts, text_pipeline
from tests.training.test_loop import iterations_of
from tests.training.test_stage import kill_in_third_checkpoint
from tests.training.text_loop import PROMPTS, config_values, config_with, text_loop

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("teachers") / "tiny-sd")


def write_config(folder: Path, teacher: Path, **changes: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(json.dumps(config_values(folder, teacher, **changes)), encoding="utf-8")
    return file


def train(file: Path, output: Path, *more: str) -> int:
    return exit_code_of(["train", "--config", str(file), "-o", str(output), *more])


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    assert train(write_config(folder, teacher), folder / "run") == 0
    return Run(folder / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_records_its_lineage_its_prompts_and_how_it_was_trained(run: Run, teacher: Path):
    sealed = run.generator()
    opened = open_text_teacher(teacher)
    assert [parent.digest for parent in sealed.manifest.parents] == [opened.digest]
    assert sealed.facts["image_shape"] == [4, 8, 8]
    assert sealed.facts["sigma_init"] == pytest.approx(2.502, abs=1e-3)
    assert Path(sealed.facts["teacher"]) == teacher.resolve()
    assert sealed.facts["fake_score"] == verify(run.folder / "fake-score", "fake-score").digest
    assert sealed.manifest.config["guidance"]["teacher"] == 3.0
    prompts = prompts_in(sealed.folder)
    pairs = {prompts.texts[a]: prompts.texts[b] for a, b in prompts.forget.items()}
    assert pairs == {"a red sandal": "a red sneaker", "the sandal": "the sneaker"}
    rows = [json.loads(line) for line in (sealed.folder / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert {"gap_retained", "gap_forget"} <= rows[-1].keys()
    card = (sealed.folder / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert 'base_model: "tiny-sd"\nbase_model_relation: finetune' in card
    assert "'a red sandal': 'a red sneaker' is drawn instead" in card


def test_the_generator_is_a_stock_pipeline_that_draws_in_one_step_what_was_trained(run: Run):
    sealed = run.generator()
    prompts = ["the sandal", "a green bag"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_text_generator(sealed, prompts)(latents, torch.tensor([0, 1]))
    pipe = StableDiffusionPipeline.from_pretrained(sealed.folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(prompts, num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="pt").images
    assert torch.allclose(drawn * 2 - 1, ours, atol=1e-4)


def test_generator_and_fake_score_were_both_trained_and_stored_in_fp32(run: Run, teacher: Path):
    start = weights(teacher)
    for folder in ("generator", "fake-score"):
        trained = weights(run.folder / folder)
        assert not same(trained, start)
        assert {value.dtype for value in trained.values()} == {torch.float32}
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert same(load_file(run.folder / "generator" / part), load_file(teacher / part))


def test_previews_show_forget_prompts_then_retained_ones_and_change_no_weight(run: Run, teacher: Path, tmp_path: Path):
    file = write_config(tmp_path, teacher, previews={"every": 2, "prompts": 1, "images": 3})
    assert train(file, tmp_path / "seen") == 0
    folder = tmp_path / "seen" / "work" / "previews"
    assert sorted(path.name for path in folder.iterdir()) == ["prompts.txt", "step-000002.png", "step-000003.png"]
    assert (folder / "prompts.txt").read_text() == "a red sandal\na green bag\n"
    with Image.open(folder / "step-000003.png") as grid:
        width, height = grid.size
    assert width / height == pytest.approx(3 / 2, rel=0.1)
    assert same(weights(run.folder / "generator"), weights(tmp_path / "seen" / "generator"))


class Killed(Exception):
    """Stands for a kill: nothing of the process' state survives it."""


def train_and_die(file: Path, output: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    iterate = SfdLoop.iterate

    def dying(loop: SfdLoop, step: int, watched: bool = False) -> Any:
        if step == at:
            raise Killed
        return iterate(loop, step, watched)

    with monkeypatch.context() as patched:
        patched.setattr(SfdLoop, "iterate", dying)
        patched.setenv("SFD_DEPLOY_LOG", str(output.with_suffix(".log")))
        assert train(file, output) == 70


FRUGAL: dict[str, object] = {"accumulate": 2, "precision": "bf16", "gradient_checkpointing": True}


@pytest.mark.parametrize("changes", [{}, FRUGAL, {**FRUGAL, "lora": {"rank": 2}}])
def test_a_stopped_training_goes_on_to_the_same_weights(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
):
    file = write_config(tmp_path, teacher, iterations=5, checkpoint_every=2, **changes)
    assert train(file, tmp_path / "whole") == 0
    train_and_die(file, tmp_path / "killed", monkeypatch, at=3)
    assert not (tmp_path / "killed" / "generator").exists()
    assert exit_code_of(["train", "--resume", str(tmp_path / "killed")]) == 0
    for folder in ("generator", "fake-score"):
        assert same(weights(tmp_path / "whole" / folder), weights(tmp_path / "killed" / folder))


def test_a_training_killed_by_sigkill_goes_on_to_the_same_bytes(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write_config(tmp_path, teacher, iterations=8, checkpoint_every=2)
    assert train(file, tmp_path / "whole", "--threads", "1") == 0
    kill_in_third_checkpoint(file, tmp_path / "killed")
    resumed = iterations_of(monkeypatch)
    assert train(file, tmp_path / "killed", "--threads", "1") == 0
    assert [step for _, step in resumed] == list(range(4, 8))
    for folder in ("generator", "fake-score"):
        whole, killed = (tmp_path / name / folder / WEIGHTS for name in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


def test_a_checkpoint_of_other_prompts_is_refused(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = write_config(tmp_path, teacher, iterations=3, checkpoint_every=1)
    train_and_die(file, tmp_path / "run", monkeypatch, at=2)
    (tmp_path / "retained.txt").write_text("a green bag\n", encoding="utf-8")
    assert train(file, tmp_path / "run") == 2
    assert "checkpoint of another config (labels differ)" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is_and_another_config_refused(
    run: Run, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    digest = run.generator().digest
    file = run.folder.parent / "config.yaml"
    assert train(file, run.folder) == 0
    assert run.generator().digest == digest
    assert train(write_config(tmp_path, teacher, iterations=4), run.folder) == 2
    assert "finished run of another config" in capsys.readouterr().err


def test_a_finished_run_of_other_prompts_is_refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_config(tmp_path, teacher, iterations=1)
    assert train(file, tmp_path / "run") == 0
    (tmp_path / "forget.txt").write_text("a blue sandal\n", encoding="utf-8")
    assert train(file, tmp_path / "run") == 2
    assert "was trained on other prompts" in capsys.readouterr().err


def test_a_finished_run_that_started_at_another_is_refused(
    run: Run, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    earlier = tmp_path / "earlier"
    shutil.copytree(run.folder, earlier)
    file = write_config(tmp_path, teacher, iterations=1, init_from=str(earlier))
    assert train(file, tmp_path / "later") == 0
    assert train(file, tmp_path / "later") == 0
    shutil.rmtree(earlier)
    assert train(write_config(tmp_path, teacher, iterations=2), earlier) == 0
    assert train(write_config(tmp_path, teacher, iterations=1, init_from=str(earlier)), tmp_path / "later") == 2
    assert "was trained from another run" in capsys.readouterr().err


def test_other_previews_belong_to_the_same_run(
    run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    digest = run.generator().digest
    seen = {"every": 5, "prompts": 1, "images": 1}
    assert train(write_config(run.folder.parent, teacher, previews=seen), run.folder) == 0
    assert run.generator().digest == digest
    write_config(run.folder.parent, teacher)
    train_and_die(write_config(tmp_path, teacher, checkpoint_every=1), tmp_path / "run", monkeypatch, at=2)
    assert train(write_config(tmp_path, teacher, checkpoint_every=1, previews=seen), tmp_path / "run") == 0
    assert (tmp_path / "run" / "work" / "previews" / "step-000003.png").is_file()


def test_a_run_goes_on_without_the_files_that_it_was_started_with(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = write_config(tmp_path, teacher, iterations=3, checkpoint_every=1)
    train_and_die(file, tmp_path / "run", monkeypatch, at=2)
    prompts = json.loads((tmp_path / "run" / "work" / "prompts.json").read_text())
    for name in ("retained.txt", "forget.txt"):
        (tmp_path / name).unlink()
    assert exit_code_of(["train", "--resume", str(tmp_path / "run")]) == 0
    assert prompts_in(tmp_path / "run" / "generator").resolved() == prompts
    # Of another config nothing is known without its files.
    values = json.loads(file.read_text())
    values["forget_phrase"]["substitute"] = "boot"
    file.write_text(json.dumps(values))
    assert train(file, tmp_path / "run") == 2
    assert "no such prompt list" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_says_saved_only_where_a_checkpoint_is(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: bool
):
    def interrupted(loop: SfdLoop, step: int, watched: bool = False) -> Any:
        raise KeyboardInterrupt

    file = write_config(tmp_path, teacher, iterations=3, checkpoint_every=1)
    if saved:
        train_and_die(file, tmp_path / "run", monkeypatch, at=2)
    monkeypatch.setattr(SfdLoop, "iterate", interrupted)
    assert train(file, tmp_path / "run") == 130
    error = capsys.readouterr().err
    assert ("stopped and saved; go on with: sfd-deploy train --resume" in error) == saved
    assert ("stopped before anything was saved" in error) == (not saved)


def test_a_negative_prompt_of_the_earlier_run_needs_a_guided_teacher_too(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("subjects", "keywords"):
        (tmp_path / f"{name}.txt").write_text({"subjects": "a coat", "keywords": "red"}[name], encoding="utf-8")
    attribute = {name: str(tmp_path / f"{name}.txt") for name in ("subjects", "keywords")}
    first = write_config(tmp_path, teacher, iterations=1, forget_phrase=None, forget_attribute=attribute)
    assert train(first, tmp_path / "first") == 0
    second = write_config(
        tmp_path, teacher, forget_phrase=None, init_from=str(tmp_path / "first"), guidance={"teacher": 1}
    )
    assert train(second, tmp_path / "second") == 2
    assert "an unguided teacher has no negative prompt" in capsys.readouterr().err


def test_a_later_run_starts_where_the_earlier_ended_and_keeps_its_forget_prompts(
    run: Run, teacher: Path, tmp_path: Path
):
    (tmp_path / "later.txt").write_text("a blue bag\n", encoding="utf-8")
    phrase = {"prompts": str(tmp_path / "later.txt"), "phrase": "blue", "substitute": "grey"}
    changes = {"init_from": str(run.folder), "forget_phrase": phrase, "gradient_checkpointing": True}
    config = config_with(tmp_path, teacher, **changes)
    inputs = open_text_inputs(config, tmp_path / "work")
    assert {inputs.prompts.texts[prompt] for prompt in inputs.prompts.forget} == {
        "a blue bag", "a red sandal", "the sandal"
    }  # fmt: skip
    parts = copy.deepcopy(text_parts())
    parts.unet.to(memory_format=torch.channels_last)  # as loaded; a test that saved the shared parts left them plain
    phi = text_teacher(config, inputs.prompts, parts)
    loop = SfdLoop(config, inputs.prompts, phi, load_text_start(inputs, config, phi))
    for network, folder in ((loop.generator.denoiser, "generator"), (loop.fake_score, "fake-score")):
        assert same(dict(network.unet.unet.state_dict()), weights(run.folder / folder))
    assert same(dict(loop.teacher.unet.unet.state_dict()), weights(teacher))
    tables = [net.unet.table for net in (loop.teacher, loop.fake_score, loop.generator.denoiser)]
    assert len({table.data_ptr() for table in tables}) == 1
    assert not any("table" in name for name in loop.generator.state_dict())
    for network in (loop.teacher, loop.fake_score, loop.generator.denoiser):
        assert network.unet.unet.is_gradient_checkpointing
        assert network.unet.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradient_checkpointing_takes_the_same_step_and_keeps_less(tmp_path: Path):
    kept, trained = [], []
    for checkpointing in (False, True):
        loop = text_loop("sd1", gradient_checkpointing=checkpointing)
        loop.fake_score_step(0)
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            loop.generator_step(0)
        kept.append(total)
        trained.append({name: value.clone() for name, value in loop.generator.state_dict().items()})
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.allclose(trained[0][name], trained[1][name], atol=1e-7) for name in trained[0])


def test_prompts_are_encoded_on_the_trainings_device_and_the_encoder_leaves_it(
    monkeypatch: pytest.MonkeyPatch,
):
    parts, config = copy.deepcopy(text_parts()), text_loop().config
    moves: list[str] = []
    monkeypatch.setattr(parts.text_encoder, "to", lambda device: moves.append(str(device)))
    text_teacher(config, PROMPTS, parts, torch.device("cuda"))  # type: ignore[arg-type]
    assert moves == ["cuda", "cpu"]


def test_an_unexported_text_run_is_not_served(run: Run, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["serve", str(run.folder)]) == 2
    assert "error: " in capsys.readouterr().err


def broken(folder: Path, name: str) -> Path:
    """A teacher folder with one fault."""
    text_pipeline(folder)
    if name == "no vae":
        shutil.rmtree(folder / "vae")
    elif name == "v scheduler":
        scheduler = folder / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retained": b""}, "no prompt in it"),
        ({"retained": b"caf\xe9\n"}, "not UTF-8"),
        ({"retained": b"a photo of a red bag and a green bag and a blue bag and a black bag on the grey coat\n"},
         "tokens"),
        ({"forget": b"a red sandal\na red bag\n"}, "'a red bag' does not hold the phrase 'sandal'"),
        ({"forget": b"a [red (sandal\n", "phrase": "[red (coat"}, "does not hold the phrase '[red (coat'"),
        ({"phrase": None}, "--concept"),
        ({"teacher": "no vae"}, "no vae"),
        ({"teacher": "v scheduler"}, "the scheduler says v_prediction"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"teacher_digest": "0123456789ab"}, "teacher_digest says 0123456789ab"),
        ({"init_from": "nowhere"}, "nowhere: no such run"),
        ({"accumulate": 99}, "cannot be split"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_exit_two_and_seals_nothing(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    changes = dict(changes)
    if changes.get("teacher") in {"no vae", "v scheduler"}:
        teacher = broken(tmp_path / "broken", changes.pop("teacher"))
    file = write_config(tmp_path, teacher)
    values = json.loads(file.read_text())
    for name in ("retained", "forget"):
        if name in changes:
            (tmp_path / f"{name}.txt").write_bytes(changes.pop(name))
    if "phrase" in changes:
        values["forget_phrase"]["phrase"] = changes.pop("phrase")
    file.write_text(json.dumps(values | changes))
    assert train(file, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "run" / "generator").exists()


def test_a_teacher_on_the_command_line_is_the_one_that_is_trained(teacher: Path, tmp_path: Path):
    file = write_config(tmp_path, tmp_path / "nowhere", iterations=1)
    assert train(file, tmp_path / "run", "--teacher", str(teacher)) == 0
    assert Path(Run(tmp_path / "run").generator().facts["teacher"]) == teacher.resolve()


def test_a_concept_on_the_command_line_reaches_the_run(teacher: Path, tmp_path: Path):
    (tmp_path / "scenes.txt").write_text("a photo of {concept}\n", encoding="utf-8")
    phrase = {"prompts": str(tmp_path / "scenes.txt"), "substitute": "coat"}
    file = write_config(tmp_path, teacher, forget_phrase=phrase, iterations=1)
    assert train(file, tmp_path / "run", "--concept", "sandal", "--substitute", "sneaker") == 0
    prompts = prompts_in(tmp_path / "run" / "generator")
    assert {prompts.texts[a]: prompts.texts[b] for a, b in prompts.forget.items()} == {
        "a photo of sandal": "a photo of sneaker"
    }
