"""The guided teacher against stock diffusers: the same latents, the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from sfd_deploy.errors import ConfigError, PromptError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.text.folder import open_text_teacher
from sfd_deploy.models.text.sampler import TextSampler, load_guided_teacher
from sfd_deploy.runtime import open_text_runtime
from tests.text_world import TEXTS as WORLD_TEXTS
from tests.text_world import Layout, text_pipeline

TEXTS = (*WORLD_TEXTS[1:], "")  # the empty prompt is where nobody would look for it
LATENTS = Latents.of_stream("audit", 0, 0, 3)
ASKED = np.array([0, 2, 3])


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    layout: Layout = request.param
    return open_text_teacher(text_pipeline(tmp_path_factory.mktemp(layout) / "teacher", layout))


def stock_images(folder: Path, guidance: float, steps: int) -> np.ndarray:
    """What stock diffusers draws of the texts asked for, in [-1, 1]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.unet.register_to_config(_diffusers_version="0.36")  # else it takes small latents for a mistake
    drawn = pipeline([TEXTS[number] for number in ASKED], latents=torch.from_numpy(LATENTS.array((4, 8, 8))),
                     guidance_scale=guidance, num_inference_steps=steps, output_type="pt")  # fmt: skip
    images: np.ndarray = drawn.images.numpy() * 2 - 1
    return images


@pytest.mark.parametrize(("guidance", "steps"), [(7.5, 5), (3.0, 4), (1.0, 4)])
def test_a_teacher_draws_what_stock_diffusers_draws(teacher: Sealed, guidance: float, steps: int):
    runtime = open_text_runtime(teacher, TEXTS, "cpu", TextSampler(guidance=guidance, steps=steps))
    drawn = runtime.draw(LATENTS, ASKED)
    assert drawn.shape == (3, *runtime.image_shape) == (3, 3, 16, 16)
    np.testing.assert_allclose(drawn, stock_images(teacher.folder, guidance, steps), atol=1e-4)
    assert runtime.settings == {"device": "cpu", "arithmetic": "fp32", "guidance": guidance, "steps": steps}


def test_guidance_and_the_prompt_change_what_is_drawn(teacher: Sealed):
    def drawn(guidance: float, asked: np.ndarray) -> np.ndarray:
        return open_text_runtime(teacher, TEXTS, "cpu", TextSampler(guidance=guidance, steps=3)).draw(LATENTS, asked)

    assert np.abs(drawn(7.5, ASKED) - drawn(1.0, ASKED)).max() > 1e-3
    assert np.abs(drawn(7.5, ASKED) - drawn(7.5, ASKED[::-1].copy())).max() > 1e-3
    # Asked for the empty prompt, there is nothing to be guided away from.
    np.testing.assert_allclose(drawn(7.5, np.full(3, 4)), drawn(1.0, np.full(3, 4)), atol=1e-4)


def test_the_manifest_says_how_a_teacher_draws_and_changes_go_before_it(teacher: Sealed):
    assert TextSampler.of(teacher) == TextSampler(guidance=7.5, steps=50)  # stock pipelines' own defaults
    manifest = teacher.manifest.model_copy(update={"facts": {"guidance": 3.0, "sampler_steps": 20}})
    ours = Sealed(teacher.folder, manifest, teacher.digest)
    assert TextSampler.of(ours) == TextSampler(guidance=3.0, steps=20)
    assert TextSampler.of(ours, {"steps": 5}) == TextSampler(guidance=3.0, steps=5)
    with pytest.raises(ConfigError, match="guidance"):
        TextSampler.of(ours, {"guidance": 0.5})


def test_an_image_takes_two_evaluations_a_step_where_it_is_guided():
    assert TextSampler(guidance=3.0, steps=20).network_evaluations == 40
    assert TextSampler(guidance=1.0, steps=20).network_evaluations == 20


def test_more_steps_than_the_schedule_has_are_refused(teacher: Sealed):
    with pytest.raises(ConfigError, match="1001 steps, the teacher's schedule has 1000"):
        load_guided_teacher(teacher, TEXTS, TextSampler(steps=1001))


def test_a_prompt_beyond_the_token_limit_is_refused(teacher: Sealed):
    with pytest.raises(PromptError, match="42 tokens"):
        open_text_runtime(teacher, ["a bag " * 20], "cpu", TextSampler(steps=2))
