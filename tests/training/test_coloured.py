from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sfd_deploy.errors import DataError
from sfd_deploy.training.data import LabelledImages, load_images
from sfd_deploy.training.judge import JudgeConfig, training_batch
from sfd_deploy.training.text_teacher.captions import BACKGROUNDS, COLOURS, OBJECTS
from sfd_deploy.training.text_teacher.coloured import ColouredImages, Wardrobe, load_coloured, padded, paint, patches
from tests.training.text_toy import toy_wardrobe


def levels(images: torch.Tensor) -> torch.Tensor:
    """Back to 0…255."""
    return (images + 1) * 127.5


def test_paint_mixes_background_and_colour_by_coverage():
    coverage = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
    red, grey = list(COLOURS).index("red"), list(BACKGROUNDS).index("grey")
    drawn = levels(paint(coverage, torch.full((3,), red), torch.full((3,), grey)))[:, :, 0, 0]
    assert drawn.tolist() == [
        pytest.approx([105, 105, 105], abs=1e-3), pytest.approx([165, 70, 70], abs=1e-3),
        pytest.approx([225, 35, 35], abs=1e-3),
    ]  # fmt: skip


def test_colours_are_far_apart_on_either_background():
    drawn = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distance = np.linalg.norm(drawn[:, None] - drawn[None], axis=2)
    assert distance[~np.eye(len(drawn), dtype=bool)].min() > 80


def test_a_drawn_batch_says_what_is_on_it_and_a_step_always_draws_the_same():
    first, again = (toy_wardrobe().draw(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pixels = levels(first.images)
    palette, grounds = (torch.tensor(list(table.values()), dtype=torch.float) for table in (COLOURS, BACKGROUNDS))
    assert torch.allclose(pixels[:, :, 0, 0], grounds[first.backgrounds], atol=1e-3)  # the margin is background
    column = 12 + first.objects % 8  # the toy's bar, behind the margin of 12
    assert torch.allclose(pixels[torch.arange(64), :, 16, column], palette[first.colours], atol=1e-3)
    assert {len(first.colours.unique()), len(first.backgrounds.unique())} == {6, 2}


def test_images_are_put_in_the_middle_of_black():
    image = padded(LabelledImages(np.full((1, 1, 28, 28), 9, np.uint8), np.array([0]), OBJECTS)).images
    assert image.shape == (1, 1, 32, 32)
    assert np.argwhere(image[0, 0]).min(0).tolist() == [2, 2]
    assert np.argwhere(image[0, 0]).max(0).tolist() == [29, 29]


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((1, 3, 8, 8), OBJECTS, "one-channel images"),
        ((1, 1, 33, 8), OBJECTS, "at most 32 pixels"),
        ((1, 1, 8, 8), tuple("abcdefghij"), "classes are a, b, c"),
    ],
)
def test_other_images_or_classes_are_refused(shape, names, message):
    with pytest.raises(DataError, match=message):
        Wardrobe(LabelledImages(np.zeros(shape, np.uint8), np.array([0]), names))


def test_judged_images_keep_their_colours_and_are_labelled_by_what_is_asked(fashion_data: Path):
    grey = load_images(fashion_data, "test")
    by_object = load_coloured(fashion_data, "test", "object", seed=0)
    by_colour = load_coloured(fashion_data, "test", "colour", seed=0)
    assert (by_object.class_names, by_colour.class_names) == (OBJECTS, tuple(COLOURS))
    assert np.array_equal(by_object.labels, grey.labels)
    rows = torch.arange(0, 10_000, 100)
    images, objects = by_object.batch(rows)
    same, colours = by_colour.batch(rows)
    assert torch.equal(images, same)
    assert images.shape == (100, 3, 32, 32)
    assert torch.equal(objects, torch.from_numpy(grey.labels[::100]))
    # The brightest pixel is nearly all object: its colour is the label's.
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float)
    brightest = torch.from_numpy(grey.images[::100].copy()).flatten(1).argmax(1)
    pixels = levels(images)[:, :, 2:30, 2:30].flatten(2)[torch.arange(100), :, brightest]
    assert torch.equal(torch.cdist(pixels, palette).argmin(1), colours)
    assert np.bincount(by_colour.labels).min() > 1500


def test_patches_are_soft_masks_of_which_about_half_is_one_and_a_step_always_draws_the_same():
    masks, again = (patches(500, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(masks, again)
    assert masks.shape == (500, 1, 32, 32)
    assert (masks.min(), masks.max()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    assert masks.mean() == pytest.approx(0.5, abs=0.03)
    both = (masks.flatten(1).amax(1) > 0.9) & (masks.flatten(1).amin(1) < 0.1)
    assert both.float().mean() > 0.9  # patches, not two kinds of whole images
    neighbours = (masks[:, :, 1:] - masks[:, :, :-1]).abs()
    assert neighbours.mean() < 0.1  # and not noise


def bare_backgrounds(count: int) -> ColouredImages:
    """Nothing on black, all alike."""
    nothing = np.zeros(count, np.int64)
    return ColouredImages(np.zeros((count, 1, 32, 32), np.uint8), nothing, OBJECTS, nothing, nothing)


def test_the_share_of_images_is_patched_and_the_others_and_all_labels_are_as_they_were():
    data, rows = bare_backgrounds(400), torch.arange(400)
    plain, labels = data.batch(rows)
    images, same = data.patchy_batch(rows, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(labels, same)
    patched = (images - plain).abs().flatten(1).amax(1) > 0.1
    assert patched.float().mean() == pytest.approx(0.125, abs=0.04)  # every second patch is of the same black
    greyest = levels(images[patched]).flatten(2).amax(2)
    assert (greyest > 50).all(), "grey shows through somewhere"
    assert (levels(images[patched]).flatten(2).amin(2) < 50).float().mean() > 0.9, "and black elsewhere"
    assert greyest.max() <= 105 + 1e-3


def test_a_judge_with_patches_is_trained_on_them_and_one_without_is_not():
    data, shape = bare_backgrounds(64), {"architecture": "plain", "channels": 3, "widths": [4]}
    values = {"classifier": shape, "coloured": "object", "batch_size": 64}
    configs = (JudgeConfig.from_mapping(values | more, "test") for more in ({}, {"patches": 1.0}))
    plain, patched = (training_batch(config, data, 0)[0] for config in configs)
    assert (plain == -1).all()
    assert 0.3 < ((patched > -0.5).flatten(1).any(1)).float().mean() < 0.7


def test_no_share_is_the_plain_batch():
    data, rows = bare_backgrounds(50), torch.arange(50)
    assert torch.equal(data.patchy_batch(rows, 0.0, torch.Generator().manual_seed(0))[0], data.batch(rows)[0])
