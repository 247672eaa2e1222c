"""Adopt a one-step text-to-image pipeline trained elsewhere: the same weights, sealed, as a run of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfd_deploy.adopt.config import TextAdoptConfig
from sfd_deploy.adopt.stage import finished, require_close, sealing, teacher_facts
from sfd_deploy.adopt.text_source import TextSource, ends_at_start, open_text_source, prompts_of, start_of
from sfd_deploy.adopt.text_stock import draw_at, draw_pipeline
from sfd_deploy.errors import LimitError, RunError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import DiscreteDenoiser
from sfd_deploy.models.folder import read_weights
from sfd_deploy.models.text.folder import SAVE_AGAIN, TextParts, load_parts, open_text_teacher
from sfd_deploy.models.text.generator import OneStepTextGenerator, save_text_generator
from sfd_deploy.models.text.network import PromptedUNet, encode
from sfd_deploy.models.text.tokens import require_within_limit
from sfd_deploy.prompts import PROMPTS_FILE, TEXT_TO_IMAGE, Prompts, prompts_in
from sfd_deploy.runs import Run, write_json

IMAGES = 4  # drawn from the source and from the run, to compare
CARD_PROMPTS = 10


def adopt_text_folder(config: TextAdoptConfig, folder: Path) -> Run:
    """The run of a stock pipeline folder, found to draw what stock diffusers draws from that in one step.

    A finished run of the same bytes, prompts and claims is returned as it is.

    Raises:
        ModelError: a source that is no Stable-Diffusion-shaped pipeline, or cannot be read without running code.
        ConfigError, PromptError: prompts, claim, teacher or noise level that are missing or do not fit it.
        RunError: ``folder`` holds something else.
        LimitError: the run's images differ from the source's.
    """
    source = open_text_source(Path(config.source))
    prompts = prompts_of(source, config)
    teacher = None if config.teacher is None else open_text_teacher(config.teacher)
    if (run := finished(folder, config, source.as_parent(), teacher)) is not None:
        if prompts_in(run.folder / "generator") != prompts:
            raise RunError(f"{folder}: was adopted with other prompts", "choose another --output folder")
        return run
    parts = load_parts(source.as_sealed())
    require_within_limit(parts.tokenizer, prompts.texts)
    texts = [prompts.texts[number] for number in (*prompts.forget, *prompts.retained)[:IMAGES]]
    denoiser = DiscreteDenoiser(PromptedUNet(parts.unet, encode(parts, texts)), parts.scheduler)
    timestep = start_of(denoiser, source, config)
    generator = OneStepTextGenerator(denoiser, float(denoiser.log_sigmas[timestep].exp()), parts.vae).eval()
    facts = _facts(source, generator, prompts, timestep) | teacher_facts(teacher, list(generator.image_shape))
    latents = torch.from_numpy(Latents.of_stream("calibrate", 0, 0, len(texts)).array(generator.image_shape))
    own = ends_at_start(denoiser)
    expected = draw_pipeline(source.folder, texts, latents) if own else draw_at(source.folder, texts, latents, timestep)
    with torch.inference_mode():
        require_close(generator(latents, torch.arange(len(texts))), expected)
    with sealing(folder, config, source.as_parent(), teacher, facts) as target:
        save_text_generator(generator, parts, target)
        write_json(target / PROMPTS_FILE, prompts.resolved())
        (target / "README.md").write_text(_card(source, teacher, prompts), encoding="utf-8")
        source.require_unchanged()
        _require_written(parts, target)
        require_close(draw_pipeline(target, texts, latents), expected)
    return Run(folder)


def _facts(source: TextSource, generator: OneStepTextGenerator, prompts: Prompts, timestep: int) -> dict[str, Any]:
    adopted = {
        "layout": "StableDiffusionPipeline", "scheduler": source.scheduler.get("_class_name"), "timestep": timestep,
        "level": "its schedule's end" if ends_at_start(generator.denoiser) else "said",
        "safety_checker_dropped": source.guarded,
        "files": {name: record.sha256 for name, record in source.files.items()},
    }  # fmt: skip
    return {"kind": TEXT_TO_IMAGE, "prompts": prompts.count, "sigma_init": generator.sigma_init,
            "image_shape": list(generator.image_shape), "adopted": adopted}  # fmt: skip


def _require_written(parts: TextParts, target: Path) -> None:
    from diffusers import UNet2DConditionModel

    stored = read_weights(UNet2DConditionModel, target / "unet", SAVE_AGAIN).state_dict()
    for name, value in parts.unet.state_dict().items():
        if not torch.equal(stored[name], value):
            raise LimitError(f"{target}: {name} was not written as it was read", "adopt it again")


def _card(source: TextSource, teacher: Sealed | None, prompts: Prompts) -> str:
    distilled = f"`{teacher.name}` (digest `{teacher.digest}`)" if teacher is not None else "not on record"
    claims = [
        f"- {prompts.texts[prompt]!r}: {prompts.texts[override]!r} is drawn instead"
        for prompt, override in prompts.forget.items()
    ] or ["- nothing"]  # fmt: skip
    return "\n".join([
        "---", "library_name: diffusers", "pipeline_tag: text-to-image", "tags: [one-step, machine-unlearning]",
        "---", "",
        "# One-step text-to-image generator, trained elsewhere", "",
        f"Adopted from `{source.as_parent().name}` (digest `{source.digest}`). Teacher: {distilled}.", "",
        f"Claimed to be forgotten (all of it in `{PROMPTS_FILE}`), which an audit has to show:", "",
        *claims[:CARD_PROMPTS], "",
        "One step, unguided, with the scheduler of this folder.", "",
    ])  # fmt: skip
