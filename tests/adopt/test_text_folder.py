"""Adopting one-step text-to-image pipelines: the same images, what is assumed, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler, StableDiffusionPipeline

from sfd_deploy.adopt import text_stage
from sfd_deploy.adopt.config import TextAdoptConfig
from sfd_deploy.adopt.text_stage import adopt_text_folder
from sfd_deploy.audit.selection import find_teacher
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import LimitError, ModelError, RunError
from sfd_deploy.models.denoiser import DiscreteDenoiser
from sfd_deploy.models.text.generator import load_text_generator
from sfd_deploy.prompts import prompts_in
from sfd_deploy.runs import Run
from tests.text_world import SD_BETAS, text_pipeline

RETAINED = "a green bag\na coat on a black background\n"
TEXTS = ["the sandal", "a green bag"]
# Stable Diffusion's schedule cut off behind timestep 625, whose noise level is 2.5.
CUT_BETA = (0.00085**0.5 + 625 / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
ONE_STEP: dict[str, Any] = {
    "num_train_timesteps": 626, "beta_start": 0.00085, "beta_end": CUT_BETA, "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}  # fmt: skip
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A stock pipeline of one step, as others save it, with prompt files beside it."""
    folder = text_pipeline(tmp_path / "foreign")
    EulerDiscreteScheduler(**ONE_STEP).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    (tmp_path / "retained.txt").write_text(RETAINED, encoding="utf-8")
    (tmp_path / "forget.txt").write_text("a red sandal\nthe {concept}\n", encoding="utf-8")
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def config(folder: Path, **fields: Any) -> TextAdoptConfig:
    beside = {"prompts": str(folder.parent / "retained.txt")}
    return TextAdoptConfig.from_mapping({"source": str(folder)} | beside | fields, "test")


def adopt(folder: Path, *more: str) -> int:
    beside = folder.parent
    return exit_code_of(["adopt", str(folder), "-o", str(beside / "run"), "--prompts", str(beside / "retained.txt"),
                         *more])  # fmt: skip


def claim(folder: Path) -> list[str]:
    return ["--forget-prompts", str(folder.parent / "forget.txt"), "--concept", "sandal", "--substitute", "sneaker"]


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))


def drawn_by_stock(folder: Path) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(TEXTS, num_inference_steps=1, guidance_scale=1.0, latents=noise(), output_type="pt").images
    return torch.as_tensor(images) * 2 - 1


def drawn(run: Run) -> torch.Tensor:
    with torch.no_grad():
        return load_text_generator(run.generator(), TEXTS)(noise(), torch.tensor([0, 1]))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")  # stock, of steps_offset 0
def test_a_stock_one_step_pipeline_becomes_a_run_that_draws_its_images_and_exports(
    foreign: Path, capsys: pytest.CaptureFixture[str]
):
    assert adopt(foreign, *claim(foreign), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompts"] == {"retained": 2, "forget": 2}
    assert told["sigma_init"] == pytest.approx(2.502, abs=1e-3)
    assert (told["adopted"]["timestep"], told["adopted"]["level"]) == (625, "its schedule's end")
    run = Run(foreign.parent / "run")
    assert torch.allclose(drawn(run), drawn_by_stock(foreign), atol=1e-5)
    assert torch.allclose(drawn_by_stock(run.folder / "generator"), drawn_by_stock(foreign), atol=1e-5)
    prompts = prompts_in(run.folder / "generator")
    assert {prompts.texts[a]: prompts.texts[b] for a, b in prompts.forget.items()} == {
        "a red sandal": "a red sneaker", "the sandal": "the sneaker"
    }  # fmt: skip
    assert exit_code_of(["export", str(run.folder), "--onnx", "--fp32"]) == 0
    (source,) = run.generator().manifest.parents
    assert (source.kind, source.name) == ("generator", "foreign")


@pytest.mark.parametrize(("level", "timestep"), [(["--timestep", "625"], 625), (["--sigma-init", "2.5"], 625),
                                                 (["--timestep", "999"], 999)])  # fmt: skip
def test_a_schedule_of_many_steps_is_taken_for_one_where_that_is_said(
    foreign: Path, capsys: pytest.CaptureFixture[str], level: list[str], timestep: int
):
    """As SFD's own loop draws: x = (b z - b e) / a, b and a of that timestep, from a folder with SD 1.x's scheduler."""
    PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1).save_pretrained(foreign / "scheduler")
    assert adopt(foreign, *level) == 0
    assert f"taken for one unguided step from timestep {timestep} (said)" in capsys.readouterr().out
    run = Run(foreign.parent / "run")
    pipe = StableDiffusionPipeline.from_pretrained(
        foreign, scheduler=DDIMScheduler(**SD_BETAS, steps_offset=1, clip_sample=False)
    )
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timestep]
    a, b = kept.sqrt().item(), (1 - kept).sqrt().item()
    with torch.no_grad():
        told, _ = pipe.encode_prompt(TEXTS, "cpu", 1, False)
        epsilon = pipe.unet(b * noise(), timestep, encoder_hidden_states=told).sample
        clean = (b * noise() - b * epsilon) / a
        expected = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(drawn(run), expected, atol=1e-4)
    assert run.generator().facts["sigma_init"] == pytest.approx(b / a, rel=1e-5)


def test_the_same_again_is_left_as_it_is_and_anything_else_is_refused(foreign: Path, tmp_path: Path):
    first = adopt_text_folder(config(foreign), tmp_path / "run").generator()
    moved = shutil.copytree(foreign, tmp_path / "moved" / "foreign")
    shutil.copy(tmp_path / "retained.txt", moved.parent / "retained.txt")
    assert adopt_text_folder(config(foreign), tmp_path / "run").generator().digest == first.digest
    with pytest.raises(RunError, match="another run's generator"):
        adopt_text_folder(config(moved), tmp_path / "run")  # its list of prompts is another file
    (tmp_path / "retained.txt").write_text("a green coat\n", encoding="utf-8")
    with pytest.raises(RunError, match="adopted with other prompts"):
        adopt_text_folder(config(foreign), tmp_path / "run")
    (tmp_path / "retained.txt").write_text(RETAINED, encoding="utf-8")
    edit(foreign / "unet" / "config.json", note="changed")
    with pytest.raises(RunError, match="another run's generator"):
        adopt_text_folder(config(foreign), tmp_path / "run")


def test_a_generator_of_ours_brings_its_own_prompts(foreign: Path, tmp_path: Path):
    assert adopt(foreign, *claim(foreign)) == 0
    ours = tmp_path / "run" / "generator"
    assert exit_code_of(["adopt", str(ours), "-o", str(tmp_path / "again")]) == 0
    assert prompts_in(tmp_path / "again" / "generator") == prompts_in(ours)
    (ours / "prompts.json").write_text("{}")
    assert exit_code_of(["adopt", str(ours), "-o", str(tmp_path / "tampered")]) == 2


def test_a_safety_checker_is_left_behind_and_said_so(foreign: Path, capsys: pytest.CaptureFixture[str]):
    edit(foreign / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (foreign / "safety_checker").mkdir()
    (foreign / "safety_checker" / "pytorch_model.bin").write_bytes(b"never opened")
    assert adopt(foreign) == 0
    assert "its safety checker is left behind" in capsys.readouterr().out
    run = Run(foreign.parent / "run")
    assert not (run.folder / "generator" / "safety_checker").exists()
    assert run.generator().facts["adopted"]["safety_checker_dropped"] is True


def test_without_a_claim_or_a_teacher_what_an_audit_needs_is_said(foreign: Path, capsys: pytest.CaptureFixture[str]):
    assert adopt(foreign) == 0
    out = capsys.readouterr().out
    assert "an audit needs --forget-prompts FILE" in out
    assert "an audit needs --teacher REF, a yardstick of the same latents" in out


def test_a_named_teacher_is_a_parent_and_is_found_again(foreign: Path, tmp_path: Path):
    teacher = text_pipeline(tmp_path / "teacher", seed=1)
    run = adopt_text_folder(config(foreign, teacher=str(teacher)), tmp_path / "run")
    sealed = run.generator()
    assert [parent.kind for parent in sealed.manifest.parents] == ["generator", "teacher"]
    assert find_teacher(sealed, None).digest == sealed.manifest.parents[1].digest


def test_a_source_that_changes_while_it_is_read_is_refused_and_leaves_nothing(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = text_stage.save_text_generator

    def interfere(*arguments: Any) -> None:
        write(*arguments)
        edit(foreign / "vae" / "config.json", note="changed")

    monkeypatch.setattr(text_stage, "save_text_generator", interfere)
    with pytest.raises(ModelError, match="changed while it was read"):
        adopt_text_folder(config(foreign), tmp_path / "run")
    assert not (tmp_path / "run" / "generator").exists()


def test_images_that_depart_from_the_sources_fail_and_leave_nothing(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(DiscreteDenoiser, "timestep", lambda self, sigma: 600 + 0 * sigma)
    assert adopt(foreign) == 1
    assert "differ from the source's" in capsys.readouterr().err
    assert not (foreign.parent / "run" / "generator").exists()


def test_a_weight_that_is_written_wrong_fails(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = text_stage.save_text_generator

    def spoilt(generator: Any, parts: Any, target: Path) -> None:
        before = parts.unet.conv_out.bias.data.clone()
        parts.unet.conv_out.bias.data += 1e-7
        write(generator, parts, target)
        parts.unet.conv_out.bias.data.copy_(before)

    monkeypatch.setattr(text_stage, "save_text_generator", spoilt)
    with pytest.raises(LimitError, match=r"conv_out\.bias was not written"):
        adopt_text_folder(config(foreign), tmp_path / "run")


def many_steps(folder: Path) -> None:
    PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")


def trailing_to_the_end(folder: Path) -> None:
    EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing").save_pretrained(folder / "scheduler")


def pickled(folder: Path) -> None:
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


FAULTS: list[tuple[Any, list[str], str]] = [
    (lambda f: shutil.rmtree(f / "vae"), [], "no vae"),
    (lambda f: shutil.rmtree(f / "tokenizer"), [], "no tokenizer"),
    (lambda f: shutil.rmtree(f / "scheduler"), [], "no scheduler"),
    (pickled, [], "a pickle that could run code"),
    (lambda f: (f / "unet" / "model.py").write_text(""), [], "model.py: code of its own"),
    (lambda f: edit(f / "model_index.json", unet=["my_code", "MyUNet"]), [], "unet is made by my_code"),
    (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"), [], "is unknown"),
    (lambda f: edit(f / "model_index.json", _class_name=["pipeline", "Mine"]), [], "is unknown"),
    (lambda f: edit(f / "unet" / "config.json", time_cond_proj_dim=256), [], "an input besides the prompt"),
    (lambda f: LCMScheduler().save_pretrained(f / "scheduler"), [], "LCMScheduler is unknown"),
    (many_steps, [], "nothing says that it draws in one"),
    (trailing_to_the_end, [], "timestep 999, as that of a model of many steps"),
    (many_steps, ["--timestep", "1000"], "not one of its schedule"),
    (many_steps, ["--timestep", "3.5"], "not one of its schedule"),
    (many_steps, ["--sigma-init", "900"], "outside the schedule"),
    (many_steps, ["--sigma-init", "3", "--timestep", "4"], "give one"),
    (lambda f: None, ["--sigma-init", "1"], "its schedule ends at sigma 2.502, timestep 625"),
    (lambda f: edit(f / SCHEDULER, timestep_spacing="leading"), [], "does not start there"),
    (lambda f: edit(f / SCHEDULER, _class_name="DDIMScheduler"), [], "does not start there"),
    (lambda f: (f.parent / "retained.txt").write_text("\n"), [], "no prompt in it"),
    (lambda f: (f.parent / "retained.txt").write_bytes(b"caf\xe9\n"), [], "not UTF-8"),
    (lambda f: (f.parent / "retained.txt").write_text("a red bag " * 9), [], "tokens, start and end included"),
    (lambda f: (f.parent / "retained.txt").unlink(), [], "no such prompt list"),
    (lambda f: None, ["--concept", "sandal"], "make one claim"),
    (lambda f: None, ["--forget-prompts", "portraits", "--concept", "sandal", "--substitute", "sandal"], "still holds"),
    (lambda f: None, ["--class-names", "a,b"], "--class-names says nothing of a generator that draws from prompts"),
    (lambda f: None, ["--forget", "1=2"], "--forget says nothing of a generator that draws from prompts"),
    (lambda f: None, ["--teacher", "nowhere"], "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "options", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_bad_input_is_refused_in_one_line_with_exit_two(
    foreign: Path, capsys: pytest.CaptureFixture[str], spoil: Any, options: list[str], message: str
):
    spoil(foreign)
    assert adopt(foreign, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (foreign.parent / "run").exists()


def test_without_prompts_the_one_line_asks_for_them(foreign: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["adopt", str(foreign), "-o", str(foreign.parent / "run")]) == 2
    assert "--prompts FILE" in capsys.readouterr().err


def test_a_tampered_folder_of_ours_is_refused(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert adopt(foreign) == 0
    weights = tmp_path / "run" / "generator" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert exit_code_of(["adopt", str(weights.parents[1]), "-o", str(tmp_path / "again")]) == 2
    assert f"{weights.name}: sha256 is" in capsys.readouterr().err
