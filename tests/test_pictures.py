from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfd_deploy.errors import RunError
from sfd_deploy.pictures import grid, png_bytes, save_png


def test_a_grid_places_images_row_by_row():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((3, 1, 2, 2), np.uint8)
    pixels = np.asarray(grid(images, columns=2))
    assert pixels.tolist() == [
        [0, 0, 255, 1, 1],
        [0, 0, 255, 1, 1],
        [255, 255, 255, 255, 255],
        [2, 2, 255, 255, 255],
        [2, 2, 255, 255, 255],
    ]


def test_colour_and_scale_survive_png():
    images = np.zeros((1, 3, 2, 2), np.uint8)
    images[0, 0] = 200
    with Image.open(io.BytesIO(png_bytes(grid(images, columns=1, scale=3)))) as picture:
        assert picture.size == (6, 6)
        assert picture.getpixel((5, 5)) == (200, 0, 0)


def test_a_picture_is_written_whole_or_one_line_says_why(tmp_path: Path):
    picture = grid(np.zeros((1, 1, 2, 2), np.uint8), columns=1)
    save_png(picture, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(RunError, match="cannot be written"):
        save_png(picture, tmp_path / "none" / "a.png")
