"""``sfd-deploy teacher`` for text: data → tokenizer, autoencoder, text encoder with U-Net → one sealed pipeline folder.

Each part has its own checkpoint and resumes where it stopped; the tokenizer is learned anew, the same, in a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfd_deploy.errors import LabelError
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import Judge, require_distinct_names
from sfd_deploy.progress import progress_bar
from sfd_deploy.runs import sealed_folder
from sfd_deploy.training.frame import total_steps
from sfd_deploy.training.text_teacher.captions import BACKGROUNDS, COLOURS, OBJECTS, captions
from sfd_deploy.training.text_teacher.coloured import SIDE, Wardrobe
from sfd_deploy.training.text_teacher.config import TextTeacherConfig
from sfd_deploy.training.text_teacher.pipeline import copy_pipeline, draw_prompts
from sfd_deploy.training.text_teacher.prompted import train_prompted
from sfd_deploy.training.text_teacher.tokenizer import train_tokenizer
from sfd_deploy.training.text_teacher.vae import train_vae

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

CHECKPOINT = "checkpoint.safetensors"
JUDGED_CAPTION = "a photo of a {1} {0}"  # every object in every colour, the background left open
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class TextTeacher:
    """A trained pipeline, its autoencoder's mean squared error on training images, and which images they were."""

    pipeline: StableDiffusionPipeline
    squared_error: float
    data_digest: str


def train_text_teacher(config: TextTeacherConfig, data: Wardrobe, work: Path, device: str = "cpu") -> TextTeacher:
    """Train every part to its end, resuming from ``work``: ``vae/`` and ``text-teacher/``.

    Raises:
        DivergedError, MemoryLimitError, ConfigError, ManifestError, KeyboardInterrupt: see ``train_to_end``.
    """
    tokenizer = train_tokenizer([found.text for found in captions()], config.prompt_tokens)
    trained = train_vae(config.vae, data, work / "vae" / CHECKPOINT, config.monitor, config.seed, device)
    pipeline = train_prompted(config, data, tokenizer, trained.vae, work / "text-teacher" / CHECKPOINT, device)
    return TextTeacher(pipeline, trained.squared_error, data.grey.digest)


def require_known_classes(judges: Sequence[Judge]) -> None:
    """Refuse judges of anything but the captions' objects or colours, and two of one name.

    Raises:
        LabelError: naming the judge.
    """
    require_distinct_names(judges)
    for judge in judges:
        if judge.class_names not in (OBJECTS, tuple(COLOURS)):
            raise LabelError(
                f"judge {judge.name} knows neither the captions' objects nor their colours",
                "give judges trained with `coloured: object` or `coloured: colour`",
            )


def prompt_agreement(
    pipeline: StableDiffusionPipeline, config: TextTeacherConfig, judges: Sequence[Judge], per_prompt: int
) -> dict[str, float]:
    """Share of the guided samples, ``per_prompt`` of each object in each colour, that a judge calls as asked.

    By the judge's name; drawn on the ``select`` stream, nothing without judges.

    Raises:
        LabelError: a judge knows other classes.
    """
    require_known_classes(judges)
    if not judges:
        return {}
    hits = dict.fromkeys((judge.name for judge in judges), 0)
    asked = [colour for colour in COLOURS for _ in range(per_prompt)]
    with progress_bar("agreement", len(OBJECTS)) as advance:
        for number, name in enumerate(OBJECTS):
            texts = [JUDGED_CAPTION.format(name, colour) for colour in asked]
            images = draw_prompts(pipeline, texts, config.guidance, config.sampler_steps, number * len(asked))
            for judge in judges:
                wanted = [name] * len(asked) if judge.class_names == OBJECTS else asked
                called = [judge.class_names[label] for label in judge.look(images)[0]]
                hits[judge.name] += sum(map(eq, called, wanted))
            advance(1, name)
    return {name: count / (len(OBJECTS) * len(asked)) for name, count in hits.items()}


def seal_text_teacher(
    config: TextTeacherConfig, teacher: TextTeacher, target: Path, *, data_name: str, judges: Sequence[Judge] = (),
    per_prompt: int = 10,
) -> Sealed:  # fmt: skip
    """Measure a trained teacher as it is saved, with ``judges``, if any, and seal it as a stock diffusers pipeline.

    Raises:
        LabelError: a judge knows other classes.
    """
    saved = copy_pipeline(teacher.pipeline, DTYPES[config.weights])
    drawn = copy_pipeline(saved, torch.float32)  # as it is opened again: the rounding of the weights stays
    facts: dict[str, Any] = {
        "image_shape": [config.vae.latent_channels, config.latent_side, config.latent_side],
        "pixels": [3, SIDE, SIDE],
        "prompt_tokens": config.prompt_tokens,
        "objects": list(OBJECTS), "colours": list(COLOURS), "backgrounds": list(BACKGROUNDS),
        "data": data_name, "data_digest": teacher.data_digest,
        "images_seen": {part: total_steps(pace) * pace.batch_size
                        for part, pace in (("vae", config.vae), ("text-teacher", config))},
        "vae_squared_error_on_training_images": teacher.squared_error,
        "guidance": config.guidance, "sampler_steps": config.sampler_steps,
        "prompt_agreement": prompt_agreement(drawn, config, judges, per_prompt),
        "judge_accuracy_on_real_images": {judge.name: judge.accuracy for judge in judges},
        "samples": len(OBJECTS) * len(COLOURS) * per_prompt if judges else 0,
    }  # fmt: skip
    with sealed_folder(target, "teacher", config=config.resolved(), seed=config.seed, facts=facts) as folder:
        saved.save_pretrained(folder, safe_serialization=True)
    return verify(target, "teacher")
