"""Preview grids: a row a label, the same latents every time, so that pictures of different steps compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from sfd_deploy.errors import RunError
from sfd_deploy.latents import Latents
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.pictures import grid, save_png
from sfd_deploy.runtime.seam import Images, Runtime, draw_all, to_uint8

# 15 network evaluations: enough to see a class, and for the spread and accuracy of a yardstick.
QUICK_SAMPLER = SamplerConfig(steps=8)
DRAW_BATCH = 128
PIXELS = DRAW_BATCH * 32 * 32  # drawn at once; of larger images fewer: a look must fit where a step does
MOST_PER_LABEL = 1000
LABELS_SHOWN = 20  # in a grid; of more, forget and override labels first
SMALLEST_ROW = 56  # pixels; smaller images are enlarged


def at_once(shape: tuple[int, int, int], positions: int = PIXELS) -> int:
    """How many images or latents of ``shape`` (C, H, W) are drawn at once: ``DRAW_BATCH``, of large ones fewer."""
    _, height, width = shape
    return min(DRAW_BATCH, max(1, positions // (height * width)))


def draw_by_label(runtime: Runtime, labels: Sequence[int], per_label: int, batch: int | None = None) -> Images:
    """Images (L, N, C, H, W) of ``labels``: N of each, from the ``select`` stream.

    ``batch``: images drawn at once, by default as ``at_once``. The first images of a label do not depend on
    ``per_label`` or on the other labels.

    Raises:
        ValueError: more than ``MOST_PER_LABEL`` of one label.
    """
    if per_label > MOST_PER_LABEL:
        raise ValueError(f"{per_label} images of one label; at most {MOST_PER_LABEL}")
    latents = [Latents.of_stream("select", 0, label * MOST_PER_LABEL, per_label).seeds for label in labels]
    asked = np.repeat(np.array(labels, np.int64), per_label)
    images = draw_all(runtime, Latents(np.concatenate(latents)), asked, batch or at_once(runtime.image_shape))
    return images.reshape(len(labels), per_label, *images.shape[1:])


def save_preview(images: Images, folder: Path, step: int) -> None:
    """Write ``images`` (L, N, C, H, W) as ``folder/step-000050.png``, a row a label; nothing where N is 0.

    Raises:
        RunError: the place cannot be written.
    """
    if not images.shape[1]:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror})", "choose a writable run folder") from None
    scale = max(1, -(-SMALLEST_ROW // images.shape[3]))
    flat = to_uint8(images.reshape(-1, *images.shape[2:]))
    save_png(grid(flat, columns=images.shape[1], scale=scale), folder / f"step-{step:06d}.png")


def device_of(network: nn.Module) -> str:
    """Where a network's weights lie."""
    return str(next(network.parameters()).device)
