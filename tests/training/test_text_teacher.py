"""The text encoder and its U-Net, and the three parts together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from sfd_deploy.errors import ConfigError, DivergedError, LabelError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import verify
from sfd_deploy.measure.judges import Judge
from sfd_deploy.models.text.folder import load_parts, open_text_teacher
from sfd_deploy.training.text_teacher import stage
from sfd_deploy.training.text_teacher.captions import BACKGROUNDS, COLOURS, OBJECTS, TEMPLATES, caption, captions
from sfd_deploy.training.text_teacher.coloured import Painted, paint
from sfd_deploy.training.text_teacher.config import load_teacher_config
from sfd_deploy.training.text_teacher.pipeline import copy_pipeline, draw_prompts
from sfd_deploy.training.text_teacher.prompted import CaptionTokens, PromptedTraining
from sfd_deploy.training.text_teacher.stage import TextTeacher, prompt_agreement, seal_text_teacher, train_text_teacher
from sfd_deploy.training.text_teacher.tokenizer import train_tokenizer
from sfd_deploy.training.text_teacher.vae import build_vae
from tests.training.text_toy import VALUES, toy_config, toy_wardrobe


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([found.text for found in captions()], 24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TextTeacher:
    return train_text_teacher(toy_config(), toy_wardrobe(), tmp_path_factory.mktemp("work"))


def training_of(tokenizer, **changes) -> PromptedTraining:
    config = toy_config(**changes)
    torch.manual_seed(1)
    return PromptedTraining(config, toy_wardrobe(), tokenizer, build_vae(config.vae).eval(), "cpu")


def weights_of(pipeline: StableDiffusionPipeline) -> list[torch.Tensor]:
    networks = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    return [value for network in networks for value in network.state_dict().values()]


def test_an_image_s_tokens_are_a_caption_that_is_true_of_it(tokenizer):
    tokens, draws = CaptionTokens(tokenizer), torch.Generator().manual_seed(0)
    painted = toy_wardrobe().draw(200, draws)
    read = tokenizer.batch_decode(tokens.draw(painted, 0.0, draws), skip_special_tokens=True)
    words = zip(read, painted.objects, painted.colours, painted.backgrounds, strict=True)
    used = set()
    for text, name, colour, background in words:
        true = {caption(template, OBJECTS[name], list(COLOURS)[colour], list(BACKGROUNDS)[background]).text: template
                for template in TEMPLATES}  # fmt: skip
        used.add(true[text.strip()])
    assert used == set(TEMPLATES)


def test_dropped_prompts_are_the_empty_one_and_as_many_as_asked(tokenizer):
    tokens, draws = CaptionTokens(tokenizer), torch.Generator().manual_seed(0)
    number = torch.zeros(4000, dtype=torch.int64)
    drawn = tokens.draw(Painted(torch.empty(0), number, number, number), 0.25, draws)
    empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
    share = (drawn == empty).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)


def test_the_network_sees_scaled_latents_on_stable_diffusion_s_schedule_and_owes_the_noise(tokenizer, monkeypatch):
    """A stub that knows the latents solves x_t = a x + b eps for eps, with a and b from the betas in float64."""
    training = training_of(tokenizer)
    training.vae.register_to_config(scaling_factor=0.5)
    constant = lambda vae, images: (torch.full((len(images), 4, 8, 8), 1.4), torch.full((len(images), 4, 8, 8), -60.0))
    monkeypatch.setattr("sfd_deploy.training.text_teacher.prompted.posterior", constant)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar, asked = torch.cumprod(1 - betas, 0), []

    class Solver(torch.nn.Module):
        def forward(self, noisy, timesteps, tokens):
            asked.append(timesteps)
            a, b = (value.sqrt()[timesteps][:, None, None, None] for value in (alpha_bar, 1 - alpha_bar))
            return (noisy.double() - a * 1.4 * 0.5) / b

    training.prompted = Solver()
    assert training.loss(0, 256).item() == pytest.approx(0.0, abs=1e-6)
    steps = torch.cat(asked)
    assert (steps.min() < 20, steps.max() > 979) == (True, True)

    class Silent(torch.nn.Module):
        def forward(self, noisy, timesteps, tokens):
            return torch.zeros_like(noisy)

    training.prompted = Silent()
    assert training.loss(0, 256).item() == pytest.approx(1.0, abs=0.05)  # the noise's own variance


def test_every_weight_of_text_encoder_and_u_net_is_trained_and_none_of_the_autoencoder(tokenizer):
    training = training_of(tokenizer)
    before, vae = ({name: value.clone() for name, value in network.state_dict().items()}
                   for network in (training.prompted, training.vae))  # fmt: skip
    training.iterate(0)
    assert {name for name, value in training.prompted.state_dict().items() if torch.equal(value, before[name])} == set()
    assert all(torch.equal(value, vae[name]) for name, value in training.vae.state_dict().items())
    assert all(parameter.grad is None for parameter in training.vae.parameters())


def test_the_drawing_depends_on_the_prompt_the_guidance_and_the_latents_alone(teacher):
    texts = ["a red dress", "something blue on a grey background"] * 33
    images = draw_prompts(teacher.pipeline, texts, 3.0, 2)
    assert images.shape == (66, 3, 32, 32)
    assert np.abs(images[64:] - draw_prompts(teacher.pipeline, texts[64:], 3.0, 2, first=64)).max() < 1e-5
    assert np.abs(images[:2] - draw_prompts(teacher.pipeline, texts[:2], 1.0, 2)).max() > 1e-4
    assert np.abs(images[:1] - draw_prompts(teacher.pipeline, ["a blue coat"], 3.0, 2)).max() > 1e-4
    assert np.abs(images[0] - images[2]).max() > 1e-3


def test_a_drawing_is_the_decoded_latents_in_minus_one_to_one(teacher):
    latents = torch.from_numpy(Latents.of_stream("select", 0, 0, 2).array((4, 8, 8)))
    texts, pipeline = ["a red dress", "a blue coat"], teacher.pipeline
    with torch.inference_mode():
        last = pipeline(texts, latents=latents, guidance_scale=3.0, num_inference_steps=2, output_type="latent").images
        decoded = pipeline.vae.decode(last / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert np.abs(draw_prompts(pipeline, texts, 3.0, 2) - decoded.numpy()).max() < 1e-5


@pytest.mark.parametrize(("part", "steps"), [("vae", 4), ("text-teacher", 4)])
def test_a_teacher_killed_in_either_part_goes_on_to_the_same_weights(part, steps, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("sfd_deploy.training.text_teacher.vae.CHECKPOINT_EVERY", 2)
    monkeypatch.setattr("sfd_deploy.training.text_teacher.prompted.CHECKPOINT_EVERY", 2)
    calls = iter(range(100))

    class Dying(type(toy_wardrobe())):
        def draw(self, count, draws):
            if next(calls) == (3 if part == "vae" else steps + 1 + 3):  # one draw measures the autoencoder
                raise KeyboardInterrupt
            return super().draw(count, draws)

    with pytest.raises(KeyboardInterrupt):
        train_text_teacher(toy_config(), Dying(toy_wardrobe().grey), tmp_path)
    assert (tmp_path / part / "checkpoint.safetensors").is_file()
    assert (tmp_path / "text-teacher").exists() == (part == "text-teacher")
    # What is watched, and how the result is drawn and saved, is no other training.
    resumed = toy_config(guidance=2.0, weights="fp16", monitor={"every": 4, "previews": 1, "tensorboard": False})
    found = train_text_teacher(resumed, toy_wardrobe(), tmp_path)
    pairs = zip(weights_of(found.pipeline), weights_of(teacher.pipeline), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert found.pipeline.vae.config.scaling_factor == teacher.pipeline.vae.config.scaling_factor
    assert (tmp_path / "text-teacher" / "previews" / "step-000004.png").is_file()


def test_the_result_is_the_average_of_every_part(tmp_path):
    found = train_text_teacher(toy_config(), toy_wardrobe(), tmp_path).pipeline
    for part, networks in (("vae", {"": found.vae}),
                           ("text-teacher", {"text_encoder.": found.text_encoder, "unet.": found.unet})):  # fmt: skip
        saved = load_file(tmp_path / part / "checkpoint.safetensors")
        for prefix, network in networks.items():
            for name, value in network.state_dict().items():
                assert torch.equal(value, saved[f"ema/{prefix}{name}"])
                assert not torch.equal(value, saved[f"net/{prefix}{name}"])


def test_a_part_of_another_config_is_not_resumed(tmp_path):
    train_text_teacher(toy_config(), toy_wardrobe(), tmp_path)
    with pytest.raises(ConfigError, match=r"another config \(kl_weight differ\)"):
        train_text_teacher(toy_config(vae=VALUES["vae"] | {"kl_weight": 0.5}), toy_wardrobe(), tmp_path)
    with pytest.raises(ConfigError, match=r"another config \(prompt_dropout differ\)"):
        train_text_teacher(toy_config(prompt_dropout=0.5), toy_wardrobe(), tmp_path)


@pytest.mark.parametrize(("part", "task"), [("vae", "vae"), (None, "text-teacher")])
def test_a_diverging_part_is_named(part, task, tmp_path):
    wild = {"learning_rate": 1e30}
    config = toy_config(vae=VALUES["vae"] | wild) if part else toy_config(**wild)
    with pytest.raises(DivergedError, match=f"{task} diverged: 3 of 4 steps skipped"):
        train_text_teacher(config, toy_wardrobe(), tmp_path)


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_the_sealed_folder_is_a_stock_pipeline_and_a_teacher_to_ours(weights, teacher, tmp_path):
    config = toy_config(weights=weights)
    sealed = seal_text_teacher(config, teacher, tmp_path / "teacher", data_name="toy")
    assert sealed.facts["image_shape"] == [4, 8, 8]
    assert sealed.facts["images_seen"] == {"vae": 32, "text-teacher": 32}
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    opened.set_progress_bar_config(disable=True)
    texts = ["a photo of a red dress", ""]
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[weights]
    expected = draw_prompts(copy_pipeline(copy_pipeline(teacher.pipeline, dtype), torch.float32), texts, 3.0, 4)
    assert np.abs(draw_prompts(opened, texts, 3.0, 4) - expected).max() < 1e-4
    parts = load_parts(open_text_teacher(tmp_path / "teacher"))
    assert parts.vae.config.scaling_factor == teacher.pipeline.vae.config.scaling_factor
    assert parts.scheduler.config.beta_schedule == "scaled_linear"
    pairs = zip(parts.unet.state_dict().values(), teacher.pipeline.unet.state_dict().values(), strict=True)
    assert all(torch.equal(ours, source.to(dtype).float()) for ours, source in pairs)


def test_nothing_of_the_machine_is_in_the_folder(teacher, tmp_path):
    seal_text_teacher(toy_config(), teacher, tmp_path / "teacher", data_name="toy")
    written = [file for file in (tmp_path / "teacher").rglob("*.json") if file.name != "manifest.json"]
    assert len(written) >= 7
    assert [file.name for file in written if "/tmp" in file.read_text() or str(tmp_path) in file.read_text()] == []
    again = seal_text_teacher(toy_config(), teacher, tmp_path / "again", data_name="toy")
    assert again.manifest.files == verify(tmp_path / "teacher").manifest.files


def judge_of(names: tuple[str, ...], call) -> Judge:
    class Called(Judge):
        def look(self, images, batch=256):
            return call(images), images[:, :1, 0, 0]

    return Called("seer", "", names, None, None, np.zeros((2, 1), np.int64), 1.0)  # type: ignore[arg-type]


def painted_as_asked(pipeline, texts, guidance, steps, first=0):
    """What a perfect teacher draws, the object's number as the share of covered rows."""
    words = [next(found for found in captions() if found.text == text) for text in texts]
    coverage = torch.stack([(torch.arange(32) <= OBJECTS.index(found.object)).float() for found in words])
    colours = torch.tensor([list(COLOURS).index(found.colour) for found in words])
    return paint(coverage[:, None, :, None].expand(-1, 1, 32, 32), colours, torch.zeros_like(colours)).numpy()


def test_agreement_is_one_for_a_perfect_teacher_and_its_share_for_another(monkeypatch):
    monkeypatch.setattr(stage, "draw_prompts", painted_as_asked)
    palette = np.array(list(COLOURS.values())) / 127.5 - 1
    by_colour = judge_of(tuple(COLOURS), lambda images: np.abs(images[:, None, :, 0, 0] - palette).sum(2).argmin(1))
    by_object = judge_of(OBJECTS, lambda images: (images[:, :, :, 0].max(1) > -1).sum(1) - 1)
    for judge in (by_colour, by_object):
        assert prompt_agreement(None, toy_config(), [judge], per_prompt=2) == {"seer": 1.0}
    one_colour = judge_of(tuple(COLOURS), lambda images: np.zeros(len(images), np.int64))
    one_object = judge_of(OBJECTS, lambda images: np.zeros(len(images), np.int64))
    assert prompt_agreement(None, toy_config(), [one_colour], 2)["seer"] == pytest.approx(1 / 6)
    assert prompt_agreement(None, toy_config(), [one_object], 2)["seer"] == pytest.approx(1 / 10)


def test_what_judges_measure_is_what_is_saved(teacher, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        stage, "draw_prompts", lambda pipeline, *rest: seen.append(pipeline) or painted_as_asked(pipeline, *rest)
    )
    judge = judge_of(OBJECTS, lambda images: np.zeros(len(images), np.int64))
    sealed = seal_text_teacher(toy_config(weights="fp16"), teacher, tmp_path / "t", data_name="toy", judges=[judge])
    assert sealed.facts["prompt_agreement"] == {"seer": 0.1}
    assert sealed.facts["samples"] == 600
    assert all(torch.equal(value, value.half().float()) for value in weights_of(seen[0]) if value.is_floating_point())


def test_a_judge_of_something_else_is_refused(teacher, tmp_path):
    with pytest.raises(LabelError, match="judge seer knows neither"):
        seal_text_teacher(toy_config(), teacher, tmp_path / "t", data_name="toy", judges=[judge_of(("a", "b"), None)])
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "text-to-video"}, "`kind`"),
        ({"unet": {"block_channels": [4, 6], "norm_groups": 4}}, "norm_groups 4 do not divide 6 channels"),
        ({"unet": {"block_channels": [4, 6], "norm_groups": 2, "heads": 4}}, "4 heads do not divide 6 channels"),
        ({"unet": {"block_channels": [4], "norm_groups": 2, "attention_levels": [1]}}, "attention level 1"),
        ({"unet": {"block_channels": [4] * 5, "norm_groups": 2}}, "32 pixels cannot be halved 6 times"),
        ({"text_encoder": {"width": 9, "layers": 1, "heads": 2, "hidden": 8}}, "2 heads do not divide the width 9"),
        ({"prompt_droput": 0.1}, "did you mean `prompt_dropout`"),
        ({"vae": VALUES["vae"] | {"image": 3}}, "did you mean `images`"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(changes, message, tmp_path):
    (tmp_path / "teacher.yaml").write_text(json.dumps(VALUES | changes))
    with pytest.raises(ConfigError) as caught:
        load_teacher_config(str(tmp_path / "teacher.yaml"))
    assert message in str(caught.value)


def test_the_shipped_config_fits_the_data_and_is_small_enough_to_ship(tokenizer):
    """24 MiB is the limit; two bytes a weight."""
    config = load_teacher_config("fashion-t2i")
    training = PromptedTraining(config, toy_wardrobe(), tokenizer, build_vae(config.vae), "cpu")
    count = sum(value.numel() for network in (training.prompted, training.vae) for value in network.parameters())
    assert 7e6 < count < 9e6
    assert (config.weights, config.latent_side) == ("fp16", 8)


def test_a_label_teacher_s_config_is_still_one(tmp_path):
    assert load_teacher_config("digits").network.image_size == 8
