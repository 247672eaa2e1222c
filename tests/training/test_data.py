from __future__ import annotations

import gzip
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfd_deploy.errors import ConfigError, DataError
from sfd_deploy.training.data import ImagesConfig, LabelledImages, load_images
from sfd_deploy.training.judge import JudgeConfig, load_both, load_judged
from sfd_deploy.training.teacher import TeacherConfig


def write_idx(folder: Path, images: np.ndarray, labels: list[int], prefix: str = "train", zipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    suffix, pack = (".gz", gzip.compress) if zipped else ("", bytes)
    header = struct.pack(">4i", 0x803, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(header + images.tobytes()))
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(
        pack(struct.pack(">2i", 0x801, len(labels)) + bytes(labels))
    )


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read(tmp_path: Path, zipped):
    write_idx(tmp_path, IMAGES, [2, 0, 1], zipped=zipped)
    data = load_images(tmp_path, "train")
    assert np.array_equal(data.images[:, 0], IMAGES)
    assert data.labels.tolist() == [2, 0, 1]
    assert data.class_names == ("0", "1", "2")
    images, labels = data.batch(torch.tensor([1]))
    assert images.dtype == torch.float32
    assert images[0, 0, 0, 0].item() == pytest.approx(20 / 127.5 - 1)
    assert labels.tolist() == [0]


def test_fashion_mnist_is_what_its_authors_published(fashion_data: Path):
    data = load_images(fashion_data, "test")
    assert data.images.shape == (10_000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [1000] * 10


def test_class_folders_hold_out_every_tenth_image(tmp_path: Path):
    for name in ("b-cat", "a-dog"):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.fromarray(np.full((6, 6, 3), index, np.uint8)).save(tmp_path / name / f"{index:02}.png")
    train, test = load_images(tmp_path, "train"), load_images(tmp_path, "test")
    assert train.class_names == ("a-dog", "b-cat")
    assert (len(train), len(test)) == (36, 4)
    assert sorted(set(test.images.ravel().tolist())) == [9, 19]
    assert train.images.shape[1:] == (3, 6, 6)


def test_split_folders_are_taken_as_they_are(tmp_path: Path):
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / split / "one").mkdir(parents=True)
        for index in range(count):
            Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / split / "one" / f"{index}.png")
    assert (len(load_images(tmp_path, "train")), len(load_images(tmp_path, "test"))) == (3, 1)


def class_folders(root: Path, *names: str, channels: int = 1) -> Path:
    """A folder a class, three 6x6 images in each, all of the value 10, 20, … in the order of ``names``."""
    for number, name in enumerate(names, 1):
        (root / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.full((6, 6, channels), 10 * number, np.uint8).squeeze()
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_class_names_give_folders_their_labels(tmp_path: Path):
    """As a teacher that came without its folders counts them: 10 after 2."""
    class_folders(tmp_path / "train", "1", "2", "10")
    assert load_images(tmp_path, "train").class_names == ("1", "10", "2")
    found = load_images(tmp_path, "train", ("1", "2", "10"))
    assert found.class_names == ("1", "2", "10")
    assert [found.images[found.labels == label].max() for label in range(3)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("names", "message"), [(("cat",), "dog is no class"), (("cat", "dog", "elk"), "elk has no folder")]
)
def test_class_names_that_are_not_the_folders_are_refused(tmp_path: Path, names, message):
    with pytest.raises(DataError, match=message):
        load_images(class_folders(tmp_path, "cat", "dog"), "train", names)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_refused_where_pillow_would_make_them_white(tmp_path: Path, dtype):
    (tmp_path / "train" / "one").mkdir(parents=True)
    suffix = "png" if dtype == np.uint16 else "tiff"
    Image.fromarray(np.full((6, 6), 300, dtype)).save(tmp_path / f"image.{suffix}")
    (tmp_path / f"image.{suffix}").rename(tmp_path / "train" / "one" / "image.png")
    with pytest.raises(DataError, match=r"image\.png: more than 8 bits a channel"):
        load_images(tmp_path, "train")


def test_the_digest_is_of_images_labels_and_names():
    data = LabelledImages(IMAGES[:, None], np.array([0, 1, 2]), ("a", "b", "c"))
    others = (
        replace(data, images=data.images + 1), replace(data, labels=np.array([0, 2, 1])),
        replace(data, class_names=("a", "b", "d")), replace(data, images=data.images.reshape(3, 1, 5, 4)),
    )  # fmt: skip
    assert data.digest == replace(data, images=data.images.copy()).digest
    assert len({data.digest, *(other.digest for other in others)}) == 5


CLASSIFIER = {"architecture": "plain", "channels": 1, "widths": [4]}


@pytest.mark.parametrize(
    ("held_out", "channels", "classifier", "message"),
    [
        (("cat", "elk"), 1, {}, "classes to train on are cat, dog, held-out ones cat, elk"),
        (("cat",), 1, {}, "classes to train on are cat, dog, held-out ones cat"),
        (("cat", "dog"), 1, {"channels": 3}, "images have 1 channels, the classifier 3; set `classifier.channels`"),
        (("cat", "dog"), 3, {}, "images have 3 channels, the classifier 1"),
        (("cat", "dog"), 1, {"widths": [4, 4, 4, 4]}, "6 pixels cannot be halved 3 times; give fewer `widths`"),
    ],
)
def test_a_judges_images_must_fit_one_another_and_the_classifier(tmp_path, held_out, channels, classifier, message):
    class_folders(tmp_path / "train", "cat", "dog", channels=channels)
    class_folders(tmp_path / "test", *held_out, channels=channels)
    config = JudgeConfig.from_mapping({"classifier": CLASSIFIER | classifier}, "test")
    with pytest.raises(DataError, match=message):
        load_both(config, tmp_path)


def damaged(tmp_path: Path, fault: str) -> Path:
    write_idx(tmp_path, IMAGES, [0, 1, 2])
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    if fault == "cut":
        images.write_bytes(images.read_bytes()[:-9])
    elif fault == "short":
        images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1]))
    elif fault == "magic":
        images.write_bytes(labels.read_bytes())
    elif fault == "count":
        write_idx(tmp_path / "other", IMAGES[:2], [0, 1])
        labels.write_bytes((tmp_path / "other" / labels.name).read_bytes())
    elif fault == "none":
        write_idx(tmp_path, IMAGES[:0], [])
    elif fault == "no labels":
        labels.unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut", "images-idx3-ubyte.gz: unreadable or truncated"),
        ("short", "59 bytes of data, its header says"),
        ("magic", "not an IDX file"),
        ("count", "3 images but 2 labels"),
        ("none", "holds no pixel"),
        ("no labels", "labels-idx1-ubyte is missing"),
    ],
)
def test_damaged_idx_files_are_one_line(tmp_path: Path, fault, message):
    with pytest.raises(DataError, match=message) as caught:
        load_images(damaged(tmp_path, fault), "train")
    assert "\n" not in str(caught.value)


def test_other_bad_data_is_one_line(tmp_path: Path):
    with pytest.raises(DataError, match="no such data folder"):
        load_images(tmp_path / "none", "train")
    with pytest.raises(DataError, match="neither IDX files nor class sub-folders"):
        load_images(tmp_path, "train")
    write_idx(tmp_path / "idx", IMAGES, [0, 1, 2])
    with pytest.raises(DataError, match="label 2 but 2 class names"):
        load_images(tmp_path / "idx", "train", ("a", "b"))
    (tmp_path / "f" / "train" / "one").mkdir(parents=True)
    with pytest.raises(DataError, match="no images for the train split"):
        load_images(tmp_path / "f", "train")
    (tmp_path / "f" / "train" / "one" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        load_images(tmp_path / "f", "train")


def test_images_of_two_sizes_are_refused_by_name(tmp_path: Path):
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    for size in (6, 7):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(folder / f"{size}.png")
    with pytest.raises(DataError, match=r"7\.png: shape"):
        load_images(tmp_path, "train")


def digits() -> object:
    return pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's digits").load_digits()


def test_the_digits_are_scikit_learn_s_each_once_in_one_of_two_splits():
    expected, parts = digits(), [load_images(Path("digits"), split) for split in ("train", "test")]
    assert sum(len(part) for part in parts) == 1797
    found = sorted(
        (label, image.tobytes()) for part in parts for label, image in zip(part.labels, part.images, strict=True)
    )
    # 16 grey levels and nothing: the largest is white.
    scaled = np.round(expected.images * 255 / 16).astype(np.uint8)
    assert found == sorted((label, image.tobytes()) for label, image in zip(expected.target, scaled, strict=True))
    assert {part.images.shape[1:] for part in parts} == {(1, 8, 8)}
    assert parts[0].class_names == tuple("0123456789")
    assert (parts[0].images.min(), parts[0].images.max()) == (0, 255)


def test_every_fifth_digit_of_each_class_is_held_out():
    counts = np.bincount(digits().target)
    assert np.bincount(load_images(Path("digits"), "test").labels).tolist() == (counts // 5).tolist()
    third = np.flatnonzero(digits().target == 3)[4]
    test = load_images(Path("digits"), "test")
    first_held_out = test.images[test.labels == 3][0, 0]
    assert np.array_equal(first_held_out, np.round(digits().images[third] * 255 / 16))


def test_digits_without_scikit_learn_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn is not installed; pip install 'sfd-deploy\[digits\]'"):
        load_images(Path("digits"), "train")


def test_a_folder_called_digits_is_read_and_not_scikit_learn_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_idx(tmp_path / "digits", IMAGES, [2, 0, 1])
    monkeypatch.chdir(tmp_path)
    assert len(load_images(Path("digits"), "train")) == 3


def test_digits_with_too_few_names_are_refused():
    digits()
    with pytest.raises(DataError, match="10 classes but 2 names"):
        load_images(Path("digits"), "train", ("a", "b"))


def test_padded_images_are_in_the_middle_of_black(tmp_path: Path):
    write_idx(tmp_path, IMAGES + 1, [2, 0, 1])
    data = load_images(tmp_path, "train", ("a", "b", "c"))
    padded = data.padded(9)
    assert padded.images.shape == (3, 1, 9, 9)
    assert padded.images.dtype == np.uint8
    assert np.array_equal(padded.images[:, 0, 2:6, 2:7], IMAGES + 1)  # an odd pixel more goes below and to the right
    assert padded.images.astype(int).sum() == (IMAGES + 1).astype(int).sum()
    assert padded.batch(torch.tensor([0]))[0][0, 0, 0, 0].item() == -1
    assert (padded.labels.tolist(), padded.class_names) == ([2, 0, 1], ("a", "b", "c"))


@pytest.mark.parametrize("shape", [(1, 1, 10, 3), (1, 1, 3, 10)])
def test_images_larger_than_the_padding_are_refused(shape):
    with pytest.raises(DataError, match=rf"images are {shape[2]}x{shape[3]}, larger than 9x9"):
        LabelledImages(np.zeros(shape, np.uint8), np.array([0]), ("a",)).padded(9)


def test_padding_is_asked_for_by_a_key_of_at_least_8(tmp_path: Path):
    write_idx(tmp_path, IMAGES, [2, 0, 1])
    assert ImagesConfig(pad_to=8).read(tmp_path, "train").images.shape == (3, 1, 8, 8)
    assert ImagesConfig().read(tmp_path, "train").images.shape == (3, 1, 4, 5)
    with pytest.raises(ConfigError, match="`pad_to`"):
        ImagesConfig.from_mapping({"pad_to": 7}, "test")


JUDGE = {"classifier": {"architecture": "plain", "channels": 1, "widths": [4]}}
TEACHER = {"network": {"image_size": 8, "channels": 1, "block_channels": [8]}, "images": 1}


@pytest.mark.parametrize(("kind", "values"), [(JudgeConfig, JUDGE), (TeacherConfig, TEACHER)])
def test_a_config_that_pads_nothing_resolves_to_what_it_was_before_there_was_the_key(kind, values):
    """Checkpoints and ledgers compare what a config resolves to."""
    assert "pad_to" not in kind.from_mapping(values, "test").resolved()
    padding = kind.from_mapping(values | {"pad_to": 12}, "test")
    assert padding.resolved()["pad_to"] == 12
    assert kind.from_mapping(padding.resolved(), "test") == padding


def test_a_judge_s_images_are_padded_and_coloured_ones_are_already(tmp_path: Path):
    write_idx(tmp_path, IMAGES, [2, 0, 1], prefix="t10k")
    config = JudgeConfig.from_mapping(JUDGE | {"pad_to": 10}, "test")
    assert load_judged(config, tmp_path, "test").images.shape == (3, 1, 10, 10)
    coloured = {"classifier": JUDGE["classifier"] | {"channels": 3}, "coloured": "object", "pad_to": 32}
    with pytest.raises(ConfigError, match="leave pad_to out"):
        JudgeConfig.from_mapping(coloured, "test")
    for judged in ({}, {"coloured": "colour", "classifier": coloured["classifier"]}):
        with pytest.raises(ConfigError, match="patches are of coloured images, judged by their object"):
            JudgeConfig.from_mapping(JUDGE | judged | {"patches": 0.5}, "test")
