"""Labelled images from IDX files, a folder of class sub-folders or scikit-learn's digits, as tensors in [-1, 1].

Only teachers and judges read data; score forgetting distillation reads none.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field, field_validator
from torch import Tensor

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import DataError
from sfd_deploy.labels import require_distinct

IDX_IMAGES, IDX_LABELS = 0x803, 0x801
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
DIGITS = "digits"
DIGITS_MAX = 16  # grey levels of the 8x8 digits are counts of set pixels in 4x4 blocks
DIGITS_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 (N, C, H, W), labels int64 (N,), and the class names in label order."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of what ``batch`` gives."""
        return self.images.shape[1:]

    @property
    def digest(self) -> str:
        """Hex sha256 of images, labels and class names: which data a checkpoint and a sealed folder belong to."""
        found = hashlib.sha256(json.dumps([self.class_names, self.images.shape]).encode())
        for values in (self.images, self.labels):
            found.update(np.ascontiguousarray(values).data)
        return found.hexdigest()

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 in [-1, 1] (B, C, H, W) and labels int64 (B,) at ``rows``."""
        index = rows.numpy()
        images = torch.from_numpy(self.images[index]).to(torch.float32) / 127.5 - 1.0
        return images, torch.from_numpy(self.labels[index])

    def padded(self, side: int) -> Self:
        """The images in the middle of ``side`` x ``side`` black pixels.

        Raises:
            DataError: they are larger.
        """
        height, width = self.images.shape[2:]
        if max(height, width) > side:
            raise DataError(f"images are {height}x{width}, larger than {side}x{side}", "pad to a larger side")
        above, left = (side - height) // 2, (side - width) // 2
        edges = ((0, 0), (0, 0), (above, side - height - above), (left, side - width - left))
        return replace(self, images=np.pad(self.images, edges))


class ImagesConfig(StageConfig):
    """How labelled images are read, for what is trained on them."""

    class_names: tuple[str, ...] = Field(
        (), description="names in label order, of class folders too; empty: the folders' in order, or numbers"
    )
    pad_to: int | None = Field(
        None, ge=8, description="images are centred on black pixels of this height and width first"
    )

    @field_validator("class_names")
    @classmethod
    def names_must_tell_classes_apart(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        require_distinct(value)
        return value

    def resolved(self) -> dict[str, Any]:
        """As of any config, but without a ``pad_to`` of None: what was bound to older configs is still of this one."""
        values = super().resolved()
        return values if self.pad_to is not None else {key: value for key, value in values.items() if key != "pad_to"}

    def read(self, source: Path, split: str) -> LabelledImages:
        """``split`` ("train" or "test") of a data set, as ``load_images`` reads it, padded if asked for.

        Raises:
            DataError: as ``load_images``, or the images are larger than ``pad_to``.
        """
        data = load_images(source, split, self.class_names)
        return data if self.pad_to is None else data.padded(self.pad_to)


def load_images(source: Path, split: str, class_names: tuple[str, ...] = ()) -> LabelledImages:
    """Read ``split`` ("train" or "test") of a data set.

    ``source`` holds the four IDX files (``train-images-idx3-ubyte[.gz]``, ``t10k-…``), or
    ``source/<split>/<class name>/*.png``, or class sub-folders alone, of which every tenth image
    (by name) is the test split. Folders are labelled in the order of ``class_names``, or of their own names.
    ``digits``, where no folder has that name, is scikit-learn's own copy of the 8x8 digits, of which every
    fifth image of each class is the test split.

    Raises:
        DataError: naming the missing, truncated or contradictory file, or the package that is missing.
    """
    if source == Path(DIGITS) and not source.is_dir():
        return _read_digits(split, class_names)
    if not source.is_dir():
        raise DataError(f"{source}: no such data folder", "give IDX files, class folders, or the word digits")
    prefix = {"train": "train", "test": "t10k"}[split]
    if (images_file := _idx_file(source, f"{prefix}-images-idx3-ubyte")) is not None:
        labels_file = _idx_file(source, f"{prefix}-labels-idx1-ubyte")
        if labels_file is None:
            raise DataError(f"{source}: {prefix}-labels-idx1-ubyte is missing", "add the label file beside the images")
        return _read_idx(images_file, labels_file, class_names)
    return _read_folders(source, split, class_names)


def load_held_out(source: Path, class_names: tuple[str, ...] = ()) -> LabelledImages:
    """What somebody else's judge is measured on: the test split; of class sub-folders without splits, every image.

    Raises:
        DataError: as ``load_images``.
    """
    if source.is_dir() and not (source / "test").is_dir() and _idx_file(source, "t10k-images-idx3-ubyte") is None:
        return _read_folders(source, None, ())
    return load_images(source, "test", class_names)


def _read_digits(split: str, class_names: tuple[str, ...]) -> LabelledImages:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it ships no types
    except ImportError:
        raise DataError("data digits: scikit-learn is not installed", "pip install 'sfd-deploy[digits]'") from None
    found = load_digits()
    labels = found.target.astype(np.int64)
    names = class_names or tuple(str(name) for name in found.target_names)
    if len(names) != len(found.target_names):
        raise DataError(f"data digits: {len(found.target_names)} classes but {len(names)} names", "name every class")
    # Counted within each class: the collection repeats 0, 1, …, 9, so every fifth of all would be fours and nines.
    place = np.empty(len(labels), np.int64)
    for label in range(len(names)):
        rows = labels == label
        place[rows] = np.arange(rows.sum())
    held_out = place % DIGITS_HELD_OUT_EVERY == DIGITS_HELD_OUT_EVERY - 1
    rows = held_out if split == "test" else ~held_out
    images = np.rint(found.images[rows, None] * (255 / DIGITS_MAX)).astype(np.uint8)
    return LabelledImages(images, labels[rows], names)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_idx(images_file: Path, labels_file: Path, class_names: tuple[str, ...]) -> LabelledImages:
    images = _idx_array(images_file, IDX_IMAGES, dimensions=3)[:, None]
    labels = _idx_array(labels_file, IDX_LABELS, dimensions=1).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{images_file}: {len(images)} images but {len(labels)} labels", "use files of one split")
    if not images.size:
        raise DataError(f"{images_file}: holds no pixel", "give a file with images")
    names = class_names or tuple(str(label) for label in range(int(labels.max()) + 1))
    if int(labels.max()) >= len(names):
        raise DataError(f"{labels_file}: label {labels.max()} but {len(names)} class names", "name every class")
    return LabelledImages(images, labels, names)


def _idx_array(path: Path, magic: int, dimensions: int) -> NDArray[np.uint8]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error):
        raise DataError(f"{path}: unreadable or truncated", "fetch the file again") from None
    header = 4 + 4 * dimensions
    if len(raw) < header or struct.unpack(">i", raw[:4])[0] != magic:
        raise DataError(f"{path}: not an IDX file of magic {magic:#x}", "give the original IDX file")
    shape = struct.unpack(f">{dimensions}i", raw[4:header])
    if len(raw) - header != int(np.prod(shape)):
        raise DataError(f"{path}: {len(raw) - header} bytes of data, its header says {shape}", "fetch the file again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _class_folders(root: Path, class_names: tuple[str, ...]) -> list[Path]:
    """The sub-folders in label order."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if not folders:
        raise DataError(
            f"{root}: neither IDX files nor class sub-folders", "lay images out as <class name>/<image>.png"
        )
    if not class_names:
        return folders
    names = {folder.name for folder in folders}
    for what, missing in (("is no class", names - set(class_names)), ("has no folder", set(class_names) - names)):
        if missing:
            raise DataError(f"{root}: {min(missing)} {what}", "name every class folder as it is spelt, and no other")
    return [root / name for name in class_names]


def _read_folders(source: Path, split: str | None, class_names: tuple[str, ...]) -> LabelledImages:
    has_splits = split is not None and (source / split).is_dir()
    folders = _class_folders(source / str(split) if has_splits else source, class_names)
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if split is not None and not has_splits:
            files = [path for i, path in enumerate(files) if (i % 10 == 9) == (split == "test")]
        if not files:
            raise DataError(f"{folder}: no images{f' for the {split} split' if split else ''}", "put images there")
        for path in files:
            images.append(_read_image(path))
            if images[-1].shape != images[0].shape:
                raise DataError(f"{path}: shape {images[-1].shape}, others {images[0].shape}", "resize to one shape")
            labels.append(label)
    return LabelledImages(np.stack(images), np.array(labels, np.int64), tuple(folder.name for folder in folders))


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip their values to 255: white
                raise DataError(f"{path}: more than 8 bits a channel", "save it with 8 bits a channel")
            pixels = np.asarray(image.convert("L" if image.mode in {"L", "1"} else "RGB"))
    except (OSError, UnidentifiedImageError):
        raise DataError(f"{path}: not a readable image", "replace or remove the file") from None
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
