from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfd_deploy.adopt import stage
from sfd_deploy.adopt.config import AdoptConfig
from sfd_deploy.adopt.stage import adopt_folder
from sfd_deploy.audit.selection import find_teacher
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import LabelError, LimitError, ModelError, RunError
from sfd_deploy.manifest import verify
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.models.generator import labels_of, load_generator, save_teacher
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.runs import Run, sealed_folder
from tests.adopt.conftest import NAMES, save_folder, tiny_unet
from tests.adopt.official import cumulative
from tests.conftest import TINY_LABELS, seal_tiny_run, tiny_generator

T = 440
A, B = math.sqrt(cumulative(T)), math.sqrt(1 - cumulative(T))


def noise(count: int = 6, channels: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(8)), torch.arange(count) % 3


def config(folder: Path, **fields: Any) -> AdoptConfig:
    return AdoptConfig(source=str(folder), **fields)


def test_a_pipeline_folder_becomes_a_run_that_exports_and_tells_its_lineage(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert exit_code_of(["adopt", str(pipeline_folder), "-o", str(run), "--class-names", NAMES, "--forget",
                         "square=star", "--json"]) == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert (told["labels"]["forget"], told["sigma_init"], told["teacher"]) == ({"1": 2}, 2.5, None)
    assert exit_code_of(["export", str(run), "--onnx", "--fp32"]) == 0
    assert exit_code_of(["sample", str(run), "--artefact", "onnx-cpu-fp32", "--count", "1",
                         "-o", str(tmp_path / "grid.png")]) == 0  # fmt: skip
    capsys.readouterr()
    assert exit_code_of(["info", str(run), "--json"]) == 0
    folders = {row["folder"]: row for row in json.loads(capsys.readouterr().out)["folders"]}
    (source,) = folders["generator"]["parents"]
    assert (source["kind"], source["name"]) == ("generator", "foreign")
    assert folders["artefacts/onnx-cpu-fp32"]["parents"][0]["digest"] == told["generator"]


def test_the_run_holds_the_very_weights_and_draws_the_very_images(pipeline_folder: Path, tmp_path: Path):
    adopted = load_generator(adopt_folder(config(pipeline_folder), tmp_path / "run").generator())
    original = tiny_generator()
    stored = adopted.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in original.state_dict().items())
    torch.testing.assert_close(adopted(*noise()), original(*noise()), rtol=0, atol=1e-5)


def test_a_folder_that_stock_diffusers_saved_with_its_default_scheduler_draws_the_pipelines_images(tmp_path: Path):
    """The default sigma_min of 0.002 shifts a step from 2.5 by 4e-4: it is part of what is adopted."""
    from diffusers import ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler(sigma_max=2.5)
    pipeline = ConsistencyModelPipeline(unet=tiny_unet(channels=3), scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "foreign")
    pipeline.set_progress_bar_config(disable=True)
    latents, labels = noise(channels=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own deprecations
        stock = pipeline(batch_size=6, class_labels=labels, latents=latents, output_type="pt").images
    adopted = load_generator(adopt_folder(config(tmp_path / "foreign"), tmp_path / "run").generator())
    torch.testing.assert_close((adopted(latents, labels) + 1) / 2, stock, rtol=0, atol=5e-6)


# What the network's output f says of the clean image at x_t = B z, by each definition.
PREDICTIONS = {
    "epsilon": lambda x, f: (x - B * f) / A,
    "v_prediction": lambda x, f: A * x - B * f,
    "sample": lambda x, f: f,
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_a_discrete_schedules_generator_draws_its_definition(tmp_path: Path, scheduler, prediction: str):
    unet = tiny_unet()
    save_folder(tmp_path / "foreign", unet, scheduler(prediction_type=prediction))  # linear, 1e-4 to 0.02
    adopted = adopt_folder(config(tmp_path / "foreign", timestep=T), tmp_path / "run").generator()
    latents, labels = noise()
    output = unet(B * latents, torch.tensor(T), class_labels=labels).sample
    expected = PREDICTIONS[prediction](B * latents, output).clamp(-1, 1)
    torch.testing.assert_close(load_generator(adopted)(latents, labels), expected, rtol=0, atol=2e-5)
    assert adopted.facts["sigma_init"] == pytest.approx(B / A, rel=1e-5)


def test_a_noise_level_finds_its_timestep(tmp_path: Path):
    save_folder(tmp_path / "foreign", tiny_unet(), DDPMScheduler())
    sealed = adopt_folder(config(tmp_path / "foreign", sigma_init=2.5), tmp_path / "run").generator()
    assert sealed.facts["sigma_init"] == pytest.approx(B / A, rel=1e-5)  # t = 440's 2.502 is the nearest


@pytest.mark.parametrize(
    ("scheduler", "level"),
    [(EDMEulerScheduler(), {"sigma_init": 2.5}), (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigma_init": 2.5}),
     (FlowMatchEulerDiscreteScheduler(), {"timestep": 714.0})],
)  # fmt: skip
def test_edm_and_flow_schedulers_are_adopted(tmp_path: Path, scheduler, level):
    save_folder(tmp_path / "foreign", tiny_unet(), scheduler)
    sealed = adopt_folder(config(tmp_path / "foreign", **level), tmp_path / "run").generator()
    assert sealed.facts["sigma_init"] == pytest.approx(2.5, abs=4e-3)
    images = load_generator(sealed)(*noise())
    assert images.isfinite().all()
    assert images.std() > 0.01


def test_a_null_label_row_is_left_behind_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    unet = tiny_unet(rows=4)
    save_folder(tmp_path / "foreign", unet, DDPMScheduler())
    assert exit_code_of(["adopt", str(tmp_path / "foreign"), "-o", str(tmp_path / "run"), "--timestep", str(T),
                         "--class-names", NAMES]) == 0  # fmt: skip
    assert "its null label is left behind" in capsys.readouterr().out
    generator = load_generator(Run(tmp_path / "run").generator())
    assert torch.equal(generator.denoiser.unet.class_embedding.weight, unet.class_embedding.weight[:3])


def test_half_precision_weights_are_widened_and_nothing_else(tmp_path: Path):
    unet = tiny_unet()
    half = tiny_unet().half()
    save_folder(tmp_path / "foreign", half, DDPMScheduler())
    stored = load_generator(
        adopt_folder(config(tmp_path / "foreign", timestep=T), tmp_path / "run").generator()
    ).denoiser.unet.state_dict()  # fmt: skip
    assert all(torch.equal(stored[name], value.half().float()) for name, value in unet.state_dict().items())


def test_the_same_again_is_left_as_it_is_and_anything_else_is_refused(pipeline_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    first = adopt_folder(config(pipeline_folder), run).generator()
    moved = shutil.copytree(pipeline_folder, tmp_path / "moved" / "foreign")
    assert adopt_folder(config(moved), run).generator().digest == first.digest
    with pytest.raises(RunError, match="another run's generator"):
        adopt_folder(config(pipeline_folder, forget={"1": "2"}), run)
    weights = moved / "unet" / "config.json"
    weights.write_text(weights.read_text() + " ")
    with pytest.raises(RunError, match="another run's generator"):
        adopt_folder(config(moved), run)
    (tmp_path / "other" / "generator").mkdir(parents=True)
    (tmp_path / "other" / "generator" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not one of ours"):
        adopt_folder(config(pipeline_folder), tmp_path / "other")
    assert (tmp_path / "other" / "generator" / "thesis.txt").read_text() == "mine"


def test_a_folder_of_ours_keeps_its_classes_and_what_it_forgot(tmp_path: Path):
    folder = seal_tiny_run(tmp_path / "origin").folder / "generator"
    again = adopt_folder(config(folder), tmp_path / "again").generator()
    assert labels_of(again) == TINY_LABELS
    with pytest.raises(LabelError, match="its manifest's classes are circle, square, star"):
        adopt_folder(config(folder, class_names=("a", "b", "c")), tmp_path / "renamed")
    with pytest.raises(LabelError, match="square was forgotten earlier"):
        adopt_folder(config(folder, forget={"square": "circle"}), tmp_path / "reclaimed")


def test_a_remap_is_refused(pipeline_folder: Path, tmp_path: Path):
    """Export would refuse the run, but a run is audited without one too."""
    file = next((pipeline_folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["class_embedding.weight"][1] = tensors["class_embedding.weight"][2]
    save_file(tensors, file)
    adopt_folder(config(pipeline_folder, forget={"0": "2"}), tmp_path / "other")
    with pytest.raises(LabelError, match="label 1 has the very embedding of its override 2: a remap, not forgetting"):
        adopt_folder(config(pipeline_folder, forget={"1": "2"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def spoil_weight(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, file)


def test_a_tampered_folder_of_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = seal_tiny_run(tmp_path / "origin").folder / "generator"
    assert exit_code_of(["adopt", str(folder), "-o", str(tmp_path / "whole"), "--class-names", NAMES]) == 0
    weights = next((folder / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert exit_code_of(["adopt", str(folder), "-o", str(tmp_path / "run")]) == 2
    assert f"{weights.name}: sha256 is" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_source_that_changes_while_it_is_read_is_refused(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = stage.save_generator

    def interfere(generator: Any, target: Path) -> None:
        write(generator, target)
        file = pipeline_folder / "unet" / "config.json"
        file.write_text(file.read_text() + " ")

    monkeypatch.setattr(stage, "save_generator", interfere)
    with pytest.raises(ModelError, match="changed while it was read"):
        adopt_folder(config(pipeline_folder), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_weight_that_is_written_wrong_fails(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = stage.read_denoiser

    def damaged(folder: Path) -> Any:
        denoiser = read(folder)
        denoiser.unet.conv_out.bias.data[0] += 1e-7
        return denoiser

    monkeypatch.setattr(stage, "read_denoiser", damaged)
    with pytest.raises(LimitError, match=r"conv_out\.bias was not written"):
        adopt_folder(config(pipeline_folder), tmp_path / "run")


def test_images_that_depart_from_the_sources_fail_and_leave_nothing(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(EdmDenoiser, "timestep", lambda self, sigma: 249 * sigma.log())
    assert exit_code_of(["adopt", str(pipeline_folder), "-o", str(tmp_path / "run")]) == 1
    assert "differ from the source's" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pickles_only(folder: Path) -> None:
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


FAULTS: list[tuple[Any, list[str], str]] = [
    (shutil.rmtree, [], "no such folder"),
    (lambda f: shutil.rmtree(f / "unet"), [], "neither unet/config.json nor config.json"),
    (lambda f: shutil.rmtree(f / "scheduler"), [], "which says what the network predicts"),
    (pickles_only, [], "a pickle that could run code"),
    (lambda f: (f / "unet" / "model.py").write_text(""), [], "model.py: code of its own"),
    (lambda f: edit(f / "model_index.json", unet=["my_code", "MyUNet"]), [], "unet is made by my_code"),
    (lambda f: edit(f / "model_index.json", _class_name=["pipeline", "Mine"]), [], "is not one network"),
    (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"), [], "StableDiffusionPipeline is"),
    (lambda f: (f / "model_index.json").write_text("{"), [], "not readable JSON"),
    (lambda f: edit(f / "unet" / "config.json", num_class_embeds=None), [], "takes no class labels"),
    (lambda f: LCMScheduler().save_pretrained(f / "scheduler"), ["--sigma-init", "2.5"], "LCMScheduler is unknown"),
    (lambda f: DDPMScheduler().save_pretrained(f / "scheduler"), [], "nothing in it says at which noise level"),
    (lambda f: DDPMScheduler().save_pretrained(f / "scheduler"), ["--timestep", "1000"], "not one of its schedule"),
    (lambda f: DDPMScheduler().save_pretrained(f / "scheduler"), ["--sigma-init", "900"], "outside the schedule"),
    (lambda f: None, ["--sigma-init", "3"], "its scheduler starts at sigma 2.5"),
    (lambda f: None, ["--sigma-init", "3", "--timestep", "4"], "give one"),
    (lambda f: None, ["--sigma-init", "-1"], "greater than 0"),
    (lambda f: None, ["--sigma-init", "inf"], "finite number"),
    (spoil_weight, [], "non-finite network: conv_out.bias"),
    (lambda f: edit(f / "unet" / "config.json", sample_size=15), [], "draws no image of 1 x 15 x 15"),
    (lambda f: None, ["--class-names", "a"], "a: no such file"),
    (lambda f: None, ["--class-names", "a" * 500], "cannot be read as text"),
    (lambda f: None, ["--class-names", "a,b,c,d"], "knows 3 labels, 4 classes are named"),
    (lambda f: None, ["--class-names", "a,b,A"], "a,b,A: A is both class 0 and 2"),
    (lambda f: None, ["--forget", "1=1"], "its own override"),
    (lambda f: None, ["--forget", "1"], "is not FORGET=OVERRIDE"),
    (lambda f: None, ["--forget", "1=2", "--forget", "1=0"], "named twice"),
    (lambda f: None, ["--teacher", "fashion-mnist", "--class-names", NAMES], "its manifest names the classes"),
    (lambda f: None, ["--teacher", "fashion-mnist"], "knows 3 labels, 10 classes are named"),
    (lambda f: None, ["--convert", "ckpt.pth"], "give a FOLDER, or a checkpoint"),
]


@pytest.mark.parametrize(("spoil", "options", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_bad_input_is_refused_in_one_line(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, options, message
):
    spoil(pipeline_folder)
    assert exit_code_of(["adopt", str(pipeline_folder), "-o", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "circle\nsquare\n\nstar\n"),
        ("notepad.txt", "\ufeffcircle\r\nsquare\r\nstar\r\n"),
        ("names.json", '["circle", "square", "star"]'),
        ("labels.json", '{"0": "circle", "2": "star", "1": "square"}'),
    ],
)
def test_class_names_come_from_a_file(pipeline_folder: Path, tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, encoding="utf-8")
    arguments = ["adopt", str(pipeline_folder), "-o", str(tmp_path / "run"), "--class-names", str(tmp_path / name)]
    assert exit_code_of(arguments) == 0
    assert Run(tmp_path / "run").generator().facts["labels"]["class_names"] == ["circle", "square", "star"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1", "neither a JSON list"), ('{"0": "a", "2": "b"}', "neither a JSON list"), ("\n", "names no class")],
)
def test_a_broken_file_of_names_is_refused(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
):
    (tmp_path / "names.json").write_text(content)
    arguments = ["adopt", str(pipeline_folder), "-o", str(tmp_path / "run"), "--class-names",
                 str(tmp_path / "names.json")]  # fmt: skip
    assert exit_code_of(arguments) == 2
    assert message in capsys.readouterr().err


def seal_teacher_folder(folder: Path, shape: tuple[int, int, int] = (1, 16, 16)) -> Path:
    facts = {"labels": TINY_LABELS.plain().resolved(), "image_shape": list(shape),
             "sampler": SamplerConfig().resolved(), "sigma_data": 0.5}  # fmt: skip
    with sealed_folder(folder, "teacher", facts=facts) as target:
        save_teacher(tiny_generator(seed=1).denoiser, target)
    return folder


def test_a_named_teacher_is_recorded_and_pinned(pipeline_folder: Path, tmp_path: Path):
    teacher = seal_teacher_folder(tmp_path / "teacher")
    run = adopt_folder(config(pipeline_folder, teacher=str(teacher)), tmp_path / "run")
    sealed = run.generator()
    assert sealed.facts["labels"]["class_names"] == ["circle", "square", "star"]  # the teacher's
    assert find_teacher(sealed, None).digest == verify(teacher).digest
    with pytest.raises(RunError, match="was distilled from"):
        find_teacher(sealed, seal_teacher_folder(tmp_path / "another", (1, 16, 16)))


def test_without_a_teacher_an_audit_takes_any_yardstick_of_the_same_classes_and_size(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["adopt", str(pipeline_folder), "-o", str(tmp_path / "run"), "--class-names", NAMES]
    assert exit_code_of(arguments) == 0
    assert "an audit needs --teacher" in capsys.readouterr().out
    sealed = Run(tmp_path / "run").generator()
    with pytest.raises(RunError, match="does not say where its teacher is"):
        find_teacher(sealed, None)
    yardstick = seal_teacher_folder(tmp_path / "teacher")
    assert find_teacher(sealed, yardstick).folder == yardstick
    with pytest.raises(RunError, match="the same classes and image size"):
        find_teacher(sealed, seal_teacher_folder(tmp_path / "large", (1, 32, 32)))


def test_a_run_that_was_not_adopted_still_takes_its_own_teacher_alone(tmp_path: Path):
    run = seal_tiny_run(tmp_path / "trained")
    with pytest.raises(RunError, match="no teacher on record"):
        find_teacher(run.generator(), seal_teacher_folder(tmp_path / "teacher"))


def test_the_bench_leaves_out_a_teacher_that_nobody_named(pipeline_folder: Path, tmp_path: Path):
    from sfd_deploy.bench import latency

    run = adopt_folder(config(pipeline_folder), tmp_path / "run")
    (row,) = latency(run, batches=(1,), rounds=3, device="cpu")
    assert (row.name, row.times_teacher) == ("generator", None)
