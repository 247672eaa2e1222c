"""Train on prompts: a Stable-Diffusion-shaped teacher + config → a run folder whose generator is a stock pipeline.

The loop, its losses, checkpoints and the run folder are those of class labels; a condition is a prompt's number.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from sfd_deploy.errors import ConfigError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.card import base_model
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.folder import TextParts, load_parts
from sfd_deploy.models.text.generator import save_text_generator, save_text_teacher
from sfd_deploy.models.text.network import load_text_denoiser
from sfd_deploy.prompts import PROMPTS_FILE, TEXT_TO_IMAGE, Prompts
from sfd_deploy.runs import Run, write_json
from sfd_deploy.runtime.pytorch import torch_device
from sfd_deploy.training.course import Course
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.loop import SfdLoop, Start
from sfd_deploy.training.lora import adapted_start, merged, require_peft, save_adapter
from sfd_deploy.training.precision import settled
from sfd_deploy.training.stage import (
    CHECKPOINT,
    Outcome,
    carry_out,
    scalars_of,
    sealing_fake_score,
    sealing_generator,
)
from sfd_deploy.training.text_config import TextTrainConfig
from sfd_deploy.training.text_inputs import TextInputs, load_text_start, open_text_inputs
from sfd_deploy.training.text_previews import TextPreviews
from sfd_deploy.training.text_watch import TextOnlooker, TextWatch

CPU = torch.device("cpu")
ADAPTER = "lora"  # in a generator's folder: its adapter alone
CARD_PROMPTS = 10  # forget prompts that the model card shows; all are in prompts.json


def train_text(config: TextTrainConfig, folder: Path, device: str = "auto") -> Run:
    """Distil and forget; a killed call resumes from ``folder/work`` to the same weights.

    Raises:
        As ``open_text_inputs`` and ``stage.train``; PromptError where a prompt is longer than the text encoder reads;
        ConfigError where LoRA has a target that the U-Net has not; BackendError where it lacks peft.
    """
    if config.lora is not None:
        require_peft()
    config = settled(config, torch_device(device))
    run = Run(folder)
    inputs = open_text_inputs(config, run.work)
    parts = cache(lambda: load_parts(inputs.teacher))  # not before it is known that there is something to train
    return carry_out(
        run, config, inputs, device,
        prepare=lambda workers: _course(config, inputs, parts(), run, workers),
        seal=lambda outcome: _seal(run, config, inputs, parts(), outcome),
    )  # fmt: skip


def _course(config: TextTrainConfig, inputs: TextInputs, parts: TextParts, run: Run, workers: Workers) -> Course:
    # Moved before it is copied: a table of encoded prompts on the device is shared by all networks.
    teacher = text_teacher(config, inputs.prompts, parts, workers.device).to(workers.device)
    loop = SfdLoop(
        config, inputs.prompts, teacher, _start(config, inputs, teacher, workers), workers=workers,
        guidance=config.guidance.bind(inputs.prompts),
    )  # fmt: skip
    course = Course(
        loop, run.work / CHECKPOINT, identity=inputs.digests,
        watch=_onlooker(config, inputs, parts, run, loop.teacher),
        scalars=scalars_of(run, workers, True), bounded=False,
    )  # fmt: skip
    if workers.is_main:  # as with the config: not before it is known to be this checkpoint's
        write_json(run.work / PROMPTS_FILE, inputs.prompts.resolved())
    return course


def _onlooker(
    config: TextTrainConfig, inputs: TextInputs, parts: TextParts, run: Run, teacher: Denoiser
) -> TextOnlooker:
    watch = None
    if config.watch is not None:
        watch = TextWatch(config.watch, inputs.prompts, parts, teacher, inputs.teacher)
    previews = TextPreviews(config.previews, inputs.prompts, parts.vae, run.work / "previews")
    return TextOnlooker(previews, watch, config.iterations)


def _start(config: TextTrainConfig, inputs: TextInputs, teacher: Denoiser, workers: Workers) -> Start:
    start = load_text_start(inputs, config, teacher)
    if config.lora is None:
        return start
    if workers.is_sharded:
        raise ConfigError("lora with FSDP2, which cannot shard weights that networks share", "use DDP, or leave one")
    return adapted_start(teacher, start, config.lora, config.seed)


def text_teacher(config: TextTrainConfig, prompts: Prompts, parts: TextParts, device: torch.device = CPU) -> Denoiser:
    """The teacher over ``prompts``, every one encoded once on ``device``; copies of it share what is set here.

    Raises:
        ModelError: it does not predict what its scheduler says, or what is not finite.
        PromptError: a prompt is longer than the text encoder reads.
    """
    parts.text_encoder.to(device)
    teacher = load_text_denoiser(parts, prompts.texts)
    parts.text_encoder.to(CPU)  # its part is done, and memory is the training's
    if config.gradient_checkpointing:
        # The frozen teacher too: gradients pass through it, so its activations would be kept as well.
        teacher.unet.unet.enable_gradient_checkpointing()
    return teacher


def _seal(run: Run, config: TextTrainConfig, inputs: TextInputs, parts: TextParts, outcome: Outcome) -> None:
    """The fake score first: a run is finished when its generator is there."""
    facts = {"kind": TEXT_TO_IMAGE, "prompts": inputs.prompts.count}
    with sealing_fake_score(run, config, inputs, outcome, facts) as target:
        save_text_teacher(merged(outcome.fake_score), parts, target)
    trained = outcome.generator
    with sealing_generator(run, config, inputs, outcome, facts) as target:
        save_text_generator(OneStepGenerator(merged(trained.denoiser), trained.sigma_init), parts, target)
        if config.lora is not None:
            save_adapter(trained.denoiser, target / ADAPTER)
        write_json(target / PROMPTS_FILE, inputs.prompts.resolved())
        (target / "README.md").write_text(model_card(inputs.prompts, inputs.teacher, config), encoding="utf-8")


def model_card(prompts: Prompts, teacher: Sealed, config: TextTrainConfig) -> str:
    """The generator's README.md with the fields that model hubs read."""
    forgotten = [
        f"- {prompts.texts[prompt]!r}: {prompts.texts[override]!r} is drawn instead"
        for prompt, override in prompts.forget.items()
    ]  # fmt: skip
    more = [f"- and {len(forgotten) - CARD_PROMPTS} more"] if len(forgotten) > CARD_PROMPTS else []
    return "\n".join([
        "---", "library_name: diffusers", "pipeline_tag: text-to-image", "tags: [one-step, machine-unlearning]",
        *base_model(teacher.name), "---", "",
        "# One-step text-to-image generator by score forgetting distillation", "",
        f"Distilled from teacher `{teacher.name}` (digest `{teacher.digest}`) in {config.iterations} iterations, the",
        f"teacher guided by {config.guidance.teacher:g}. The teacher's licence applies.", "",
        f"Forgotten, in the prompts of `{PROMPTS_FILE}`:",
        *(forgotten[:CARD_PROMPTS] or ["- nothing: a plain distillation"]), *more, "",
        "One step, unguided, with the scheduler of this folder:", "",
        "```python", "from diffusers import DiffusionPipeline", "",
        "pipe = DiffusionPipeline.from_pretrained(FOLDER)",
        "image = pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0).images[0]", "```", "",
    ])  # fmt: skip
