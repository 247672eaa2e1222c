"""Ten made-up grey objects and a text-to-image teacher of a few thousand weights: mechanics, never quality."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.text_teacher.captions import OBJECTS
from sfd_deploy.training.text_teacher.coloured import Wardrobe
from sfd_deploy.training.text_teacher.config import TextTeacherConfig

PACE = {"images": 8 * 4, "batch_size": 8, "warmup_steps": 0, "precision": "fp32"}
VALUES: dict[str, Any] = PACE | {
    "kind": "text-to-image",
    "vae": PACE | {"levels": {"block_channels": [4, 4, 4], "norm_groups": 2}},
    "text_encoder": {"width": 8, "layers": 1, "heads": 2, "hidden": 8},
    "unet": {"block_channels": [4, 8], "norm_groups": 2, "heads": 2},
    "sampler_steps": 2,
    "monitor": {"every": 0, "tensorboard": False},
}


def toy_config(**changes: Any) -> TextTeacherConfig:
    return TextTeacherConfig.from_mapping(VALUES | changes, "toy")


def toy_objects(count: int = 40, seed: int = 0, side: int = 8) -> LabelledImages:
    """Images of ``side`` pixels, as many of each label: half grey, with the label's column as bright as can be."""
    draws = np.random.default_rng(seed)
    labels = draws.permutation(np.arange(count) % len(OBJECTS))
    images = draws.integers(100, 160, (count, 1, side, side)).astype(np.uint8)
    images[np.arange(count), 0, :, labels % side] = 255
    return LabelledImages(images, labels, OBJECTS)


def toy_wardrobe() -> Wardrobe:
    return Wardrobe(toy_objects())
