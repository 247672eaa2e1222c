"""Images as PNG grids."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfd_deploy.errors import RunError


def grid(images: NDArray[np.uint8], columns: int, gap: int = 1, scale: int = 1) -> Image.Image:
    """Lay images (N, C, H, W) out in rows of ``columns``, each pixel ``scale`` times as large."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically.

    Raises:
        RunError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_bytes(png_bytes(picture))
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})", "choose a writable place") from None
