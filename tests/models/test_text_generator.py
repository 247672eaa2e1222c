from __future__ import annotations

import copy
import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from sfd_deploy.errors import ModelError
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.models.denoiser import DiscreteDenoiser, EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.folder import load_parts, open_text_teacher
from sfd_deploy.models.text.generator import (
    OneStepTextGenerator,
    load_text_generator,
    save_text_generator,
    save_text_teacher,
)
from sfd_deploy.models.text.network import text_denoiser
from sfd_deploy.models.text.schedule import one_step_scheduler
from sfd_deploy.runs import sealed_folder
from tests.text_world import TEXTS, Layout, text_parts, text_pipeline

LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
ASKED = torch.tensor([1, 2, 4, 0])


def generator_of(layout: Layout) -> OneStepTextGenerator:
    """Another network than the teacher's, as after training."""
    parts = text_parts(layout)
    denoiser = copy.deepcopy(text_denoiser(parts, TEXTS))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return OneStepTextGenerator(denoiser, 2.5, parts.vae).eval()


def sealed_generator(folder: Path, layout: Layout) -> Sealed:
    with sealed_folder(folder, "generator") as target:
        save_text_generator(generator_of(layout), text_parts(layout), target)
    return verify(folder, "generator")


@torch.no_grad()
def stock_images(folder: Path, prompts: list[str], latents: Tensor) -> Tensor:
    """What stock diffusers draws in one unguided step, in [-1, 1]; nothing of ours takes part."""
    pipeline = DiffusionPipeline.from_pretrained(folder, requires_safety_checker=False)
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompts, num_inference_steps=1, guidance_scale=1.0, latents=latents, height=16, width=16, output_type="pt"
    )
    images: Tensor = drawn.images
    return images * 2 - 1


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_stock_diffusers_draws_the_generators_images_in_one_step(layout, tmp_path):
    sealed = sealed_generator(tmp_path / "generator", layout)
    stock = stock_images(sealed.folder, [TEXTS[number] for number in ASKED], LATENTS)
    ours = load_text_generator(sealed, TEXTS)
    with torch.no_grad():
        images = ours(LATENTS, ASKED)
        trained = generator_of(layout)(LATENTS, ASKED)
    assert images.shape == (4, 3, 16, 16)
    assert images.std() > 0.1
    assert (stock - images).abs().max() < 1e-4
    assert (trained - images).abs().max() < 1e-4
    assert ours.sigma_init == pytest.approx(2.502, abs=1e-3)
    assert ours.image_shape == (4, 8, 8)


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_the_one_step_is_the_closed_form_at_timestep_625(layout):
    generator, parts = generator_of(layout), text_parts(layout)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[625].item()
    a, b = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    with torch.no_grad():
        prompts = generator.denoiser.unet.table[ASKED]
        output = generator.denoiser.unet.unet(b * LATENTS, 625, encoder_hidden_states=prompts).sample
        clean = b / a * (LATENTS - output) if layout == "sd1" else a * b * LATENTS - b * output
        assert generator.unclamped(LATENTS, ASKED) == pytest.approx(clean, abs=1e-4)
        decoded = parts.vae.decode(clean / 0.18215).sample.clamp(-1, 1)
        assert generator(LATENTS, ASKED) == pytest.approx(decoded, abs=1e-4)


def test_training_and_drawing_see_the_same_step():
    generator = generator_of("sd1")
    plain = OneStepGenerator(generator.denoiser, 2.5)
    with torch.no_grad():
        assert torch.equal(plain.unclamped(LATENTS, ASKED), generator.unclamped(LATENTS, ASKED))


@pytest.mark.parametrize("config", [
    {}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction"}, {"prediction_type": "sample"},
])  # fmt: skip
def test_the_schedule_is_cut_where_the_step_starts(config, tmp_path):
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, **({"beta_schedule": "scaled_linear"} | config))
    denoiser = DiscreteDenoiser(text_denoiser(text_parts(), TEXTS).unet, schedule)
    one_step_scheduler(denoiser, 2.5).save_pretrained(tmp_path)
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [denoiser.nearest_timestep(2.5)]
    assert float(scheduler.init_noise_sigma) == pytest.approx(denoiser.nearest_sigma(2.5), rel=1e-5)
    sigma = denoiser.nearest_sigma(2.5)
    output = torch.randn_like(LATENTS)
    drawn = scheduler.step(output, scheduler.timesteps[0], LATENTS * scheduler.init_noise_sigma, return_dict=False)[0]
    skip, gain = denoiser.coefficients(torch.tensor(sigma))[1:]
    assert drawn == pytest.approx(skip * sigma * LATENTS + gain * output, abs=1e-4)


def test_a_stable_diffusion_generators_scheduler_is_the_one_of_the_formula():
    config = one_step_scheduler(text_denoiser(text_parts(), TEXTS), 2.5).config
    end = (math.sqrt(0.00085) + 625 / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
    assert (config.num_train_timesteps, config.beta_schedule, config.beta_start) == (626, "scaled_linear", 0.00085)
    assert config.beta_end == pytest.approx(end, rel=1e-12)
    assert (config.timestep_spacing, config.trained_betas) == ("trailing", None)


def test_a_parameterisation_without_timesteps_has_no_stock_pipeline():
    with pytest.raises(ModelError, match="no stock pipeline"):
        one_step_scheduler(EdmDenoiser(text_denoiser(text_parts(), TEXTS).unet, 0.5), 2.5)


def test_the_folder_names_no_path_of_the_machine_and_wherever_the_teacher_lay_has_the_same_bytes(tmp_path):
    files: list[dict[str, bytes]] = []
    for place in ("one", "two"):
        folder = text_pipeline(tmp_path / place / "teacher")
        parts = load_parts(open_text_teacher(folder))
        generator = OneStepGenerator(text_denoiser(parts, TEXTS), 2.5)
        save_text_generator(generator, parts, tmp_path / place / "generator")
        written = tmp_path / place / "generator"
        files.append({p.relative_to(written).as_posix(): p.read_bytes() for p in written.rglob("*") if p.is_file()})
    assert files[0] == files[1]
    assert [name for name, content in files[0].items() if str(tmp_path).encode() in content] == []


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_a_teacher_or_fake_score_is_written_as_the_pipeline_that_it_was(layout, tmp_path):
    parts = text_parts(layout)
    changed = generator_of(layout).denoiser
    save_text_teacher(changed, parts, tmp_path / "teacher")
    loaded = load_parts(open_text_teacher(tmp_path / "teacher"))
    ours, theirs = changed.unet.unet.state_dict(), loaded.unet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(loaded.scheduler.alphas_cumprod, parts.scheduler.alphas_cumprod)
    assert loaded.scheduler.config.prediction_type == parts.scheduler.config.prediction_type
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher", requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a bag", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_a_pipeline_of_diffusers_infancy_keeps_its_small_latents(tmp_path):
    config = text_pipeline(tmp_path / "teacher") / "unet" / "config.json"
    config.write_text(config.read_text().replace(diffusers.__version__, "0.6.0"))
    parts = load_parts(open_text_teacher(tmp_path / "teacher"))
    denoiser = text_denoiser(parts, TEXTS)
    save_text_teacher(denoiser, parts, tmp_path / "again")
    assert (
        parts.unet.config.sample_size == load_parts(open_text_teacher(tmp_path / "again")).unet.config.sample_size == 8
    )


def test_saving_leaves_the_parts_of_the_teacher_as_they_were(tmp_path):
    parts = text_parts()
    before = copy.deepcopy(parts.unet.state_dict())
    save_text_generator(generator_of("sd1"), parts, tmp_path / "generator")
    after = parts.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
