from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd_deploy.errors import BAD_INPUT, BackendError, DigestError, ManifestError, ModelError, RunError, SfdError
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text import folder as text_folder
from sfd_deploy.models.text.folder import READ, load_parts, open_text_teacher
from sfd_deploy.models.text.generator import save_text_generator
from sfd_deploy.models.text.network import load_text_denoiser
from sfd_deploy.models.text.schedule import SCHEDULERS, read_schedule
from sfd_deploy.runs import sealed_folder
from tests.models.hub import COMMIT, pretend_hub
from tests.models.tiny import foreign_folder
from tests.text_world import SD_BETAS, TEXTS, clip_tokenizer, text_parts, text_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture
def folder(pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "model")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder: Path, said: str, kind: type[SfdError] = ModelError) -> None:
    """Opening or loading the folder says so in one line, with exit code 2."""
    with pytest.raises(kind, match=said) as caught:
        load_parts(open_text_teacher(folder))
    assert caught.value.exit_code == BAD_INPUT
    assert "\n" not in str(caught.value)


def test_a_stock_pipeline_opens_with_its_latents_shape_and_loads_frozen_in_float32(folder):
    sealed = open_text_teacher(folder)
    assert sealed.facts == {"image_shape": [4, 8, 8], "reference": str(folder)}
    parent = sealed.as_parent()
    assert (parent.kind, parent.name, parent.digest) == ("teacher", "model", sealed.digest)
    parts = load_parts(sealed)
    for network in (parts.text_encoder, parts.unet, parts.vae):
        assert not network.training
        assert {(weight.dtype, weight.requires_grad) for weight in network.parameters()} == {(torch.float32, False)}


def test_half_precision_weights_load_as_the_same_numbers_in_float32(folder):
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{name}.safetensors"
        save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    parts = load_parts(open_text_teacher(folder))
    half = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert parts.unet.conv_in.weight.dtype == parts.text_encoder.dtype == torch.float32
    assert torch.equal(parts.unet.conv_in.weight, half["conv_in.weight"].float())


def test_the_digest_is_of_every_file_that_is_read_and_of_nothing_else(folder, tmp_path):
    digest = open_text_teacher(folder).digest
    (folder / "README.md").write_text("words")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another precision")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_text_teacher(moved).digest == digest
    for file in open_text_teacher(folder).manifest.files:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole + b"\n")
        assert open_text_teacher(folder).digest != digest, file
        (folder / file).write_bytes(whole)


def test_no_other_file_is_read(folder, tmp_path):
    read = open_text_teacher(folder).manifest.files
    for file in read:
        (tmp_path / "bare" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / file, tmp_path / "bare" / file)
    whole, bare = (load_parts(open_text_teacher(path)) for path in (folder, tmp_path / "bare"))
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(parts, name).state_dict() for parts in (whole, bare))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert bare.tokenizer(TEXTS[1]).input_ids == whole.tokenizer(TEXTS[1]).input_ids


def test_the_configs_may_leave_out_what_is_the_libraries_default(folder):
    for part, key in (("unet", "in_channels"), ("unet", "out_channels"), ("vae", "latent_channels")):
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        assert config.pop(key) == 4
        file.write_text(json.dumps(config))
    assert open_text_teacher(folder).facts["image_shape"] == [4, 8, 8]


def test_weights_in_shards_are_hashed_and_loaded(folder):
    parts = load_parts(open_text_teacher(folder))
    for name, network in (("unet", parts.unet), ("text_encoder", parts.text_encoder)):
        next((folder / name).glob("*.safetensors")).unlink()
        network.save_pretrained(folder / name, max_shard_size="20KB")
    sealed = open_text_teacher(folder)
    assert any("unet/diffusion_pytorch_model-00002-of-" in file for file in sealed.manifest.files)
    assert "text_encoder/model.safetensors.index.json" in sealed.manifest.files
    assert torch.equal(load_parts(sealed).unet.conv_out.weight, parts.unet.conv_out.weight)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refused(folder, f"no {part} \\({part}/.*json is missing\\)")


@pytest.mark.parametrize(("part", "weights"), [
    ("text_encoder", "model.safetensors"), ("unet", "diffusion_pytorch_model.safetensors"),
    ("vae", "diffusion_pytorch_model.safetensors"),
])  # fmt: skip
def test_pickled_missing_or_other_variants_weights_are_refused(folder, part, weights):
    file = folder / part / weights
    content = file.read_bytes()
    file.unlink()
    refused(folder, f"{part}: no weights")
    (folder / part / weights.replace(".safetensors", ".fp16.safetensors")).write_bytes(content)
    refused(folder, f"{part}: no weights")
    (folder / part / "pytorch_model.bin").write_bytes(content)
    refused(folder, f"{part}: only pytorch_model.bin, a pickle that could run code")


def test_a_missing_vocabulary_is_refused(folder):
    (folder / "tokenizer" / "vocab.json").unlink()
    refused(folder, "tokenizer: the tokenizer cannot be loaded")


def load_words(folder: Path) -> dict[str, int]:
    words: dict[str, int] = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    return words


@pytest.mark.parametrize("words", [
    ("sandal", "sneaker", "background", "photographer", "unforgettable", "chrysanthemum", "bibliography",
     "extraordinary", "knowledgeable"),
    (),
])  # fmt: skip
def test_tokenizer_and_encoder_with_other_vocabularies_are_refused(folder, monkeypatch, words):
    clip_tokenizer(folder / "tokenizer", words)
    monkeypatch.setattr(text_folder, "PADDED_ROWS", 8)  # as a tiny vocabulary would be filled up
    refused(folder, f"tokenizer and text_encoder do not fit: {len(load_words(folder))} tokens, an embedding of 567")


@pytest.mark.parametrize("length", [8, 77])
def test_tokenizer_and_encoder_with_other_lengths_are_refused(folder, length):
    clip_tokenizer(folder / "tokenizer", length=length)
    refused(folder, f"do not fit: prompts of {length} tokens .model_max_length., 16 places")


def test_encoder_and_unet_of_other_widths_are_refused(folder):
    change(folder / "unet" / "config.json", cross_attention_dim=768)
    refused(folder, "text_encoder gives vectors of 16, unet wants 768")


def test_unet_and_vae_with_other_channels_are_refused(folder):
    change(folder / "vae" / "config.json", latent_channels=16)
    refused(folder, "vae has latents of 16 channels, unet of 4")


def test_a_shift_that_the_stock_pipeline_would_not_apply_is_refused(folder):
    change(folder / "vae" / "config.json", shift_factor=0.1)
    refused(folder, "shift_factor is 0.1")


@pytest.mark.parametrize(("values", "said"), [
    ({"in_channels": 9}, "9 channels in, 4 out"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type is text_time, an input besides the prompt"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
    ({"sample_size": None}, "no sample_size"),
    ({"_class_name": "UNet2DModel"}, "is a UNet2DModel, not a UNet2DConditionModel"),
])  # fmt: skip
def test_a_unet_that_is_asked_for_more_than_a_prompt_is_refused(folder, values, said):
    change(folder / "unet" / "config.json", **values)
    refused(folder, said)


def test_a_text_encoder_of_another_class_is_refused(folder):
    change(folder / "text_encoder" / "config.json", architectures=["T5EncoderModel"])
    refused(folder, "text_encoder: is a T5EncoderModel, not a CLIPTextModel")


def test_a_class_conditional_model_is_no_text_to_image_teacher(tmp_path):
    refused(foreign_folder(tmp_path / "model"), "no tokenizer")
    with pytest.raises(ModelError, match="no tokenizer"):
        open_text_teacher("fashion-mnist")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(key for key in sorted(weights) if key.endswith(".weight"))
    save_file({key: value for key, value in weights.items() if key != name}, file, metadata={"format": "pt"})
    refused(folder, f"weights do not fit config.json .missing keys: {name}")
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, file, metadata={"format": "pt"})
    refused(folder, f"{part}: non-finite network: {name}")
    file.write_bytes(file.read_bytes()[:100])
    refused(folder, "its weights cannot be loaded")


def test_constants_of_old_encoders_and_attention_names_of_old_vaes_load(folder):
    """Stable Diffusion 1.x as it lies on the hub: position_ids saved, and the VAE's attention named otherwise."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for key, value in load_file(file).items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{name}")  # noqa: PLW2901
        renamed[key] = value
    assert "decoder.mid_block.attentions.0.query.weight" in renamed
    save_file(renamed, file, metadata={"format": "pt"})
    file = folder / "text_encoder" / "model.safetensors"
    constant = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(load_file(file) | constant, file, metadata={"format": "pt"})
    loaded = load_parts(open_text_teacher(folder)).vae.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in vae.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, of numpy 2
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_schedule_is_the_same_whichever_scheduler_draws_with_it(folder, name):
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, name)(**SD_BETAS).save_pretrained(folder / "scheduler")
    # Stable Diffusion's betas: the square root rises linearly.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = read_schedule(folder)
    assert schedule.config.prediction_type == "epsilon"
    assert schedule.alphas_cumprod.double() == pytest.approx((1 - betas).cumprod(0), abs=1e-5)


def test_a_scheduler_without_a_prediction_type_means_epsilon(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["prediction_type"]
    file.write_text(json.dumps(config))
    assert read_schedule(folder).config.prediction_type == "epsilon"


@pytest.mark.parametrize(("values", "said"), [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "scheduler FlowMatchEulerDiscreteScheduler is unknown"),
    ({"prediction_type": "flow"}, "prediction type 'flow' is unknown"),
    ({"beta_schedule": "spiral"}, "not a schedule that diffusers makes"),
])  # fmt: skip
def test_a_scheduler_that_tells_no_schedule_is_refused(folder, values, said):
    change(folder / "scheduler" / "scheduler_config.json", **values)
    refused(folder, said)


def test_a_one_step_generator_is_no_teacher(tmp_path):
    parts = text_parts()
    generator = OneStepGenerator(load_text_denoiser(parts, TEXTS), 2.5)
    save_text_generator(generator, parts, tmp_path / "bare")
    refused(tmp_path / "bare", r"its schedule ends at noise level 2\.5: a one-step generator, not a teacher")
    with sealed_folder(tmp_path / "sealed", "generator") as target:
        save_text_generator(generator, parts, target)
    refused(tmp_path / "sealed", "is a generator, not a teacher", ManifestError)


def test_a_sealed_teacher_opens_under_its_own_digest_and_a_changed_one_does_not(folder, tmp_path):
    with sealed_folder(tmp_path / "sealed", "teacher", facts={"image_shape": [4, 8, 8]}) as target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    sealed = open_text_teacher(tmp_path / "sealed")
    assert (sealed.name, sealed.facts) == ("sealed", {"image_shape": [4, 8, 8]})
    with (tmp_path / "sealed" / "tokenizer" / "merges.txt").open("a") as file:
        file.write("a b\n")
    refused(tmp_path / "sealed", r"merges\.txt: sha256", DigestError)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A hub that has somebody/pictures; what it was asked for."""
    return pretend_hub(monkeypatch, folder, "somebody/pictures")


def test_a_hub_pipeline_is_downloaded_without_pickles_and_remembers_its_commit(hub):
    sealed = open_text_teacher("somebody/pictures@main")
    assert (sealed.name, sealed.facts["reference"]) == ("somebody/pictures", f"somebody/pictures@{COMMIT}")
    assert hub == [{"repository": "somebody/pictures", "revision": "main", "patterns": list(READ)}]
    assert not [pattern for pattern in READ if pattern.endswith((".bin", ".pt", ".ckpt", ".py"))]


def test_what_is_downloaded_is_what_is_read_and_no_variant(hub, folder):
    snapshot = folder.with_name(COMMIT)
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
                 "safety_checker/model.safetensors", "v1-5-pruned.safetensors"):  # fmt: skip
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_bytes(b"")
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    wanted = set(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=list(READ)))
    assert wanted == set(open_text_teacher("somebody/pictures").manifest.files)


def test_a_pipeline_that_the_hub_does_not_give_is_one_line(hub):
    with pytest.raises(RunError, match="somebody/else: no such folder, and the model hub did not give it"):
        open_text_teacher("somebody/else")
    with pytest.raises(RunError, match="no such teacher"):
        open_text_teacher("./missing")


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    sealed = open_text_teacher(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendError, match=r"pip install 'sfd-deploy\[t2i\]'"):
        load_parts(sealed)
