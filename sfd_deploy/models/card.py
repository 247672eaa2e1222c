"""A generator's README.md: where it comes from, what it forgot, and the lines by which stock diffusers draws."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sfd_deploy.labels import Labels

if TYPE_CHECKING:
    from sfd_deploy.models.generator import OneStepGenerator

# By the scheduler of the folder. From `folder`, `latents` (B, C, H, W) and `labels` (B,) to `images` in [-1, 1];
# docs/teachers.md shows them all.
LOOPS = {
    "CMStochasticIterativeScheduler": """\
from diffusers import CMStochasticIterativeScheduler, UNet2DModel

unet, scheduler = (part.from_pretrained(f"{folder}/{name}") for part, name in
                   [(UNet2DModel, "unet"), (CMStochasticIterativeScheduler, "scheduler")])
scheduler.set_timesteps(1)
t, noisy = scheduler.timesteps[0], scheduler.init_noise_sigma * latents
output = unet(scheduler.scale_model_input(noisy, t), t, class_labels=labels).sample
images = scheduler.step(output, t, noisy).prev_sample.clamp(-1, 1)
""",
    "DDIMScheduler": """\
from diffusers import DDIMScheduler, UNet2DModel

unet, scheduler = (part.from_pretrained(f"{folder}/{name}") for part, name in
                   [(UNet2DModel, "unet"), (DDIMScheduler, "scheduler")])
scheduler.set_timesteps(1)
t = scheduler.timesteps[0]
noisy = (1 - scheduler.alphas_cumprod[t]).sqrt() * latents
images = scheduler.step(unet(noisy, t, class_labels=labels).sample, t, noisy).prev_sample
""",
    "EDMEulerScheduler": """\
from diffusers import EDMEulerScheduler, UNet2DModel

unet, scheduler = (part.from_pretrained(f"{folder}/{name}") for part, name in
                   [(UNet2DModel, "unet"), (EDMEulerScheduler, "scheduler")])
scheduler.set_timesteps(1)
t, noisy = scheduler.timesteps[0], scheduler.sigmas[0] * latents
output = unet(scheduler.scale_model_input(noisy, t), t, class_labels=labels).sample
images = scheduler.step(output, t, noisy).prev_sample.clamp(-1, 1)
""",
    "FlowMatchEulerDiscreteScheduler": """\
import json
from pathlib import Path
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

unet, scheduler = (part.from_pretrained(f"{folder}/{name}") for part, name in
                   [(UNet2DModel, "unet"), (FlowMatchEulerDiscreteScheduler, "scheduler")])
sigma = json.loads(Path(folder, "manifest.json").read_text())["facts"]["sigma_init"]
scheduler.set_timesteps(sigmas=[sigma / (1 + sigma)])
t, noisy = scheduler.timesteps[0], scheduler.sigmas[0] * latents
images = scheduler.step(unet(noisy, t, class_labels=labels).sample, t, noisy).prev_sample.clamp(-1, 1)
""",
}


def base_model(teacher: str | None) -> list[str]:
    """The header's lines on what a generator was made of; a hub shows its licence with them."""
    return [] if teacher is None else [f"base_model: {json.dumps(teacher)}", "base_model_relation: finetune"]


def model_card(
    title: str, origin: str, claim: str, labels: Labels, generator: OneStepGenerator, teacher: str | None = None
) -> str:
    """The card, with the fields that model hubs read; ``claim`` introduces the list of what is forgotten."""
    names = labels.class_names
    forgotten = [
        f"- {names[label]} (label {label}): {labels.override_name(label)} is drawn instead"
        + (f" (label {override})" if isinstance(override, int) else "")
        for label, override in labels.forget.items()
    ]
    scheduler = type(generator.denoiser.one_step_scheduler(generator.sigma_init)).__name__
    shape, asked = ", ".join(map(str, generator.image_shape)), list(labels.retained[:2])
    return "\n".join([
        "---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation",
        "tags: [one-step, machine-unlearning]", *base_model(teacher), "---", "", f"# {title}", "", origin, "",
        claim, *(forgotten or ["- nothing"]), "",
        "One step, by stock diffusers; images are in [-1, 1]:", "",
        "```python", "import torch", 'folder = "."  # this one',
        f"latents, labels = torch.randn({len(asked)}, {shape}), torch.tensor({asked})", LOOPS[scheduler] + "```", "",
        "Always pass labels: left out, diffusers' pipeline draws random ones.", "",
    ])  # fmt: skip
