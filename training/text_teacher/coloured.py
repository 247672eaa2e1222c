"""Fashion-MNIST in colour: a grey image says how much of each pixel is the object, the rest is background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfd_deploy.errors import DataError
from sfd_deploy.training.data import LabelledImages, load_images
from sfd_deploy.training.streams import stream
from sfd_deploy.training.text_teacher.captions import BACKGROUNDS, COLOURS, OBJECTS, RGB

SIDE = 32  # Fashion-MNIST's 28 pixels with a margin: three halvings stay whole
# As one-step generators spoil images: patches about a quarter wide, edges of a few pixels, some images nearly whole.
PATCH_GRID, PATCH_EDGE, PATCH_BALANCE = 4, 6.0, 0.5


class Painted(NamedTuple):
    """Images (B, 3, 32, 32) in [-1, 1] and what is on them, each int64 (B,)."""

    images: Tensor
    objects: Tensor
    colours: Tensor
    backgrounds: Tensor


def paint(coverage: Tensor, colours: Tensor, backgrounds: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of ``coverage`` (B, 1, H, W) in [0, 1], colours and backgrounds by number (B,)."""
    front, back = (_palette(table)[chosen] for table, chosen in ((COLOURS, colours), (BACKGROUNDS, backgrounds)))
    return back + coverage * (front - back)


def _palette(table: Mapping[str, RGB]) -> Tensor:
    return torch.tensor(list(table.values()), dtype=torch.float32)[:, :, None, None] / 127.5 - 1.0


class Wardrobe:
    """Grey objects that are coloured afresh for every batch.

    Args:
        grey: one-channel images of at most 32x32 pixels, labels in the order of ``OBJECTS``.

    Raises:
        DataError: other images, or other classes.
    """

    def __init__(self, grey: LabelledImages) -> None:
        self.grey = padded(grey)

    def draw(self, count: int, draws: torch.Generator) -> Painted:
        """``count`` images of random objects in random colours on random backgrounds."""
        rows = torch.randint(len(self.grey), (count,), generator=draws)
        colours = torch.randint(len(COLOURS), (count,), generator=draws)
        backgrounds = torch.randint(len(BACKGROUNDS), (count,), generator=draws)
        grey, objects = self.grey.batch(rows)
        return Painted(paint((grey + 1) / 2, colours, backgrounds), objects, colours, backgrounds)


def load_wardrobe(source: Path) -> Wardrobe:
    """Fashion-MNIST's training images.

    Raises:
        DataError: missing or damaged, or not such data.
    """
    return Wardrobe(load_images(source, "train", OBJECTS))


@dataclass(frozen=True)
class ColouredImages(LabelledImages):
    """Grey images (N, 1, 32, 32), each with a colour and a background (N,) for good; ``batch`` paints them."""

    colours: NDArray[np.int64]
    backgrounds: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, 32, 32): painted."""
        return (3, *super().shape[1:])

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 in [-1, 1] (B, 3, 32, 32) and labels int64 (B,) at ``rows``."""
        grey, labels = super().batch(rows)
        index = rows.numpy()
        chosen = (torch.from_numpy(values[index]) for values in (self.colours, self.backgrounds))
        return paint((grey + 1) / 2, *chosen), labels

    def patchy_batch(self, rows: Tensor, share: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """As ``batch``, with about ``share`` of the images in patches of two paintings, the second's colours random."""
        images, labels = self.batch(rows)
        coverage = (super().batch(rows)[0] + 1) / 2
        other = (torch.randint(len(table), (len(rows),), generator=draws) for table in (COLOURS, BACKGROUNDS))
        patched = torch.lerp(images, paint(coverage, *other), patches(len(rows), draws))
        chosen = torch.rand(len(rows), generator=draws) < share
        return torch.where(chosen[:, None, None, None], patched, images), labels


def patches(count: int, draws: torch.Generator) -> Tensor:
    """Masks (B, 1, 32, 32) in [0, 1] of a few soft-edged patches each: cubic noise of a 4x4 grid, half of it 1."""
    coarse = torch.randn((count, 1, PATCH_GRID, PATCH_GRID), generator=draws)
    coarse = coarse + PATCH_BALANCE * torch.randn((count, 1, 1, 1), generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic", align_corners=False)
    return torch.sigmoid(PATCH_EDGE * smooth)


def load_coloured(source: Path, split: str, judged: Literal["object", "colour"], seed: int) -> ColouredImages:
    """Fashion-MNIST's ``split`` in random colours, labelled by object or by colour.

    Raises:
        DataError: missing or damaged, or not such data.
    """
    grey = padded(load_images(source, split, OBJECTS))
    draws = stream(seed, f"colouring-{split}", 0)
    colours, backgrounds = (
        torch.randint(len(table), (len(grey),), generator=draws).numpy() for table in (COLOURS, BACKGROUNDS)
    )
    if judged == "object":
        return ColouredImages(grey.images, grey.labels, OBJECTS, colours, backgrounds)
    return ColouredImages(grey.images, colours, tuple(COLOURS), colours, backgrounds)


def padded(grey: LabelledImages) -> LabelledImages:
    """``grey`` in the middle of 32x32 black pixels.

    Raises:
        DataError: other images, or other classes.
    """
    channels, height, width = grey.images.shape[1:]
    if channels != 1 or height > SIDE or width > SIDE:
        raise DataError(
            f"images are {grey.images.shape[1:]}, captions are of one-channel images of at most {SIDE} pixels",
            "give Fashion-MNIST's IDX files",
        )
    if grey.class_names != OBJECTS:
        raise DataError(
            f"classes are {', '.join(grey.class_names[:3])}, …; captions are of {', '.join(OBJECTS[:3])}, …",
            "give Fashion-MNIST's IDX files",
        )
    return grey.padded(SIDE)
