from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from PIL import Image

from sfd_deploy.errors import ConfigError, DataError, DigestError, LimitError, ManifestError, ModelError
from sfd_deploy.measure.foreign.adopt import foreign_config
from sfd_deploy.measure.foreign.config import Pixels
from sfd_deploy.measure.foreign.network import arranged, prepared
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.runs import sealed_folder
from sfd_deploy.training.data import LabelledImages
from tests.audit.toy import NAMES, seal_judge
from tests.measure.foreign_world import (
    LITTLE,
    PIXELS,
    Exported,
    adopt,
    adopted,
    class_folders,
    config,
    grating_pictures,
    labelled,
    little_graph,
    pixel_images,
    save_onnx,
    save_torchscript,
)

SCRIPT = {"trusted": True, "output": 0, "features_output": 1}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return seal_judge(tmp_path_factory.mktemp("toy") / "plain", "plain", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    return labelled(class_folders(tmp_path_factory.mktemp("pictures") / "gratings"))


@pytest.fixture(scope="module")
def graph(original: Judge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onnx(original, tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def archive(original: Judge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("torchscript") / "net.pt"
    return save_torchscript(Exported(original.classifier), file, torch.zeros(2, 1, 12, 12))


@pytest.fixture(params=["onnx", "torchscript"])
def foreign(request: pytest.FixtureRequest, graph: Path, archive: Path) -> tuple[dict, Path]:
    """The same network as both kinds: config and file."""
    return (config("onnx"), graph) if request.param == "onnx" else (config("torchscript", **SCRIPT), archive)


def test_an_adopted_judge_says_what_its_original_says(original, data, foreign, tmp_path):
    values, source = foreign
    judge = adopted(values, source, data, tmp_path / "judge")
    images, labels = grating_pictures(seed=77, count=300)
    called, features = judge.look(images)
    expected = original.look(images)
    assert np.array_equal(called, expected[0])
    assert features == pytest.approx(expected[1], abs=1e-4)
    assert (called == labels).mean() > 0.9
    truth, said = judge.held_out
    pictures = data.batch(torch.arange(len(data)))[0].numpy()
    assert np.array_equal(said, original.look(pictures)[0])
    assert [NAMES[label] for label in truth] == [data.class_names[label] for label in data.labels]
    assert judge.accuracy == (said == truth).mean() > 0.9
    by_hand = expected_mean(original, data, "upright")
    assert judge.reference.mean[NAMES.index("upright")] == pytest.approx(by_hand, abs=1e-4)


def expected_mean(original: Judge, data: LabelledImages, name: str) -> np.ndarray:
    rows = torch.from_numpy(np.flatnonzero(data.labels == data.class_names.index(name)))
    return original.look(data.batch(rows)[0].numpy())[1].mean(0)


def test_a_sealed_judge_opens_to_what_was_measured_and_says_what_it_is(data, foreign, tmp_path):
    values, source = foreign
    sealed = adopt(values, source, data, tmp_path / "judge")
    judge = open_judge(tmp_path / "judge")
    assert judge.digest == sealed.digest
    called, _ = judge.look(data.batch(torch.arange(len(data)))[0].numpy(), batch=7)
    assert np.array_equal(called, judge.held_out[1])
    assert sealed.facts["format"] == values["kind"]
    assert sealed.facts["held_out_images"] == 12 * len(NAMES)
    assert sealed.manifest.config["pixels"]["mean"] == [0.5]
    assert (tmp_path / "judge" / "model" / source.name).read_bytes() == source.read_bytes()


def test_one_changed_byte_of_the_copied_model_is_refused(data, foreign, tmp_path):
    adopt(*foreign, data, tmp_path / "judge")
    file = tmp_path / "judge" / "model" / foreign[1].name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DigestError, match=file.name):
        open_judge(tmp_path / "judge")


def test_a_folder_sealed_by_somebody_else_cannot_name_a_model_outside_it(data, foreign, tmp_path):
    values, source = foreign
    facts = adopt(values, source, data, tmp_path / "judge").facts | {"adopted": {"file": str(source)}}
    with sealed_folder(
        tmp_path / "theirs", "judge", config=foreign_config(values, "").resolved(), facts=facts
    ) as folder:
        for name in ("held_out.safetensors", "reference.safetensors"):
            shutil.copy(tmp_path / "judge" / name, folder / name)
    with pytest.raises(ManifestError, match="holds no model/"):
        open_judge(tmp_path / "theirs")


def test_another_normalisation_is_another_judge(original, data, graph, tmp_path):
    dark = config("onnx", pixels=PIXELS | {"mean": [2.0]})
    judge = adopted(dark, graph, data, tmp_path / "judge")
    images = grating_pictures(seed=77, count=300)[0]
    assert (judge.look(images)[0] != original.look(images)[0]).mean() > 0.2
    with pytest.raises(LimitError, match="judge accuracy is"):
        adopt(dark | {"min_accuracy": 0.9}, graph, data, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_adopted_judge_has_no_network_for_the_mixture(data, graph, tmp_path):
    judge = adopted(config("onnx"), graph, data, tmp_path / "judge")
    with pytest.raises(ModelError, match="judge was adopted"):
        _ = judge.classifier


def test_without_a_features_output_the_scores_are_the_features(data, graph, tmp_path):
    judge = adopted(config("onnx", features_output=None), graph, data, tmp_path / "judge")
    assert judge.reference.mean.shape == (4, len(NAMES))


def test_scores_can_be_gathered_into_fewer_classes(original, data, graph, tmp_path):
    names = ("slanted", "other")
    classes = {"slanted": [NAMES.index("rising"), NAMES.index("falling")], "other": "rest"}
    slanted = np.isin([data.class_names[label] for label in data.labels], ["rising", "falling"])
    two = LabelledImages(data.images, np.where(slanted, 0, 1), names)
    judge = adopted(config("onnx", classes=classes), graph, two, tmp_path / "judge")
    images = grating_pictures(seed=78, count=200)[0]
    expected = np.isin(original.look(images)[0], [1, 3])
    assert np.array_equal(judge.look(images)[0] == 0, expected)
    # A score that no class names never wins.
    only = adopted(config("onnx", classes={"slanted": [1], "other": [0]}), graph, two, tmp_path / "only")
    logits = Exported(original.classifier)(torch.from_numpy(images))[0].detach().numpy()
    assert np.array_equal(only.look(images)[0] == 0, logits[:, 1] > logits[:, 0])


def test_weights_beside_a_graph_are_copied_and_verified_too(data, graph, tmp_path):
    source = tmp_path / "big" / "net.onnx"
    source.parent.mkdir()
    onnx.save(
        onnx.load(graph), source, save_as_external_data=True, location="net.weights", size_threshold=256,
        convert_attribute=False,
    )  # fmt: skip
    judge = adopted(config("onnx"), source, data, tmp_path / "judge")
    assert judge.accuracy == adopted(config("onnx"), graph, data, tmp_path / "whole").accuracy
    weights = tmp_path / "judge" / "model" / "net.weights"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DigestError, match=r"net\.weights"):
        open_judge(tmp_path / "judge")
    (source.parent / "net.weights").unlink()
    with pytest.raises(ModelError, match=r"net\.weights, which holds its weights, is missing"):
        adopt(config("onnx"), source, data, tmp_path / "none")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_a_graph_cannot_have_other_files_of_this_machine_copied(data, graph, tmp_path, location):
    (tmp_path / "secret").write_text("secret")
    model = onnx.load(graph)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    source = tmp_path / "model" / "net.onnx"
    source.parent.mkdir()
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="lie outside its folder"):
        adopt(config("onnx"), source, data, tmp_path / "judge")


@pytest.mark.parametrize(
    ("changes", "graph", "message"),
    [
        ({"output": "logits"}, {}, "no output logits"),
        ({"features_output": "pooled"}, {}, "no output pooled"),
        ({"classes": ["a", "b"]}, {}, "4 scores an image, but 2 classes"),
        ({"classes": {"a": [9], "b": "rest"}}, {}, "4 scores an image, but a class has position 9"),
        ({}, {"inputs": 2}, "2 inputs (image, mask)"),
        ({}, {"kind": TensorProto.INT64}, "input image is a tensor(int64)"),
        ({}, {"shape": ("batch", 2, 2)}, "has shape ['batch', 2, 2]"),
        ({"pixels": {}}, {}, "has shape ['batch', 1, 2, 2], the config says a batch of rgb images, nchw"),
        ({"pixels": {"channels": "grey", "layout": "nhwc"}}, {"shape": ("batch", 2, 2, 3)}, "grey images, nhwc"),
        ({"pixels": {"channels": "grey", "size": [3, 3]}}, {}, "its images are (2, 2), the config says (3, 3)"),
        ({}, {"op": "Conjure", "domain": "magic"}, "ONNX Runtime cannot load it"),
        ({}, {"op": "Det"}, "1 scores an image, but 4 classes"),
        ({}, {"op": "ReduceSum"}, "output scores has shape (1, 1, 1, 1) for 8 images"),
        ({"pixels": {"channels": "grey", "mean": [0.5]}}, {"op": "Sqrt"}, "values that are not numbers"),
        ({}, {"op": "Squeeze", "shape": (1, 1, 2, 2)}, "output scores has shape (2, 2) for 1 images"),
    ],
)
def test_a_graph_that_cannot_judge_is_one_line_and_no_folder(tmp_path, changes, graph, message):
    source = little_graph(tmp_path / "little.onnx", **graph)
    data = pixel_images()
    with pytest.raises(ModelError) as caught:
        adopt(config("onnx") | LITTLE | changes, source, renamed(data, changes.get("classes")), tmp_path / "judge")
    assert message in caught.value.what
    assert caught.value.what.startswith(str(source))
    assert ".writing" not in str(caught.value).replace(str(source), "")
    assert not (tmp_path / "judge").exists()


def renamed(data: LabelledImages, classes: object) -> LabelledImages:
    names = tuple(classes) if isinstance(classes, list | dict) else data.class_names
    return LabelledImages(data.images, data.labels % len(names), names)


def test_a_graph_of_a_fixed_batch_is_filled_up(tmp_path):
    data = pixel_images()
    source = little_graph(tmp_path / "little.onnx", shape=(3, 1, 2, 2))
    judge = adopted(config("onnx") | LITTLE, source, data, tmp_path / "judge")
    assert judge.accuracy == 1.0
    called, features = judge.look(data.batch(torch.arange(7))[0].numpy())
    assert called.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert features[2] == pytest.approx(np.array([10, 10, 200, 10]) / 255)


def test_a_file_that_is_no_graph_or_not_there_is_one_line(data, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"\x00\x01 not a graph")
    for source in (tmp_path / "net.onnx", tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError, match="not a readable ONNX graph"):
            adopt(config("onnx"), source, data, tmp_path / "judge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pickle"}, "`kind` is pickle"),
        ({"clases": ["a", "b"]}, "did you mean `classes`"),
        ({"classes": ["a"]}, "at least two classes"),
        ({"classes": ["a", "a"]}, "at least two classes"),
        ({"classes": {"a": [1], "b": [1]}}, "positions of its own"),
        ({"classes": {"a": [], "b": [1]}}, "positions of its own"),
        ({"classes": {"a": [-1], "b": [1]}}, "positions of its own"),
        ({"classes": {"a": "rest", "b": "rest"}}, "only one class"),
        ({"pixels": {"mean": [0.5, 0.5]}}, "mean has 2 values for 3 channels"),
        ({"pixels": {"std": [0.0]}}, "std must be above 0"),
        ({"pixels": {"size": [0, 8]}}, "size must be at least 1 by 1"),
        ({"pixels": {"chanels": "rgb"}}, "did you mean `channels`"),
    ],
)
def test_a_config_that_contradicts_itself_is_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        foreign_config(config("onnx") | changes, "mine.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")


@pytest.mark.parametrize(
    ("names", "drop", "message"),
    [
        (("flat", "rising", "upright", "sideways"), None, "images of falling"),
        (NAMES, "flat", "0 labelled images of flat"),
    ],
)
def test_data_of_other_classes_is_refused(data, graph, tmp_path, names, drop, message):
    keep = np.ones(len(data), bool) if drop is None else data.labels != data.class_names.index(drop)
    some = LabelledImages(data.images[keep], data.labels[keep], data.class_names)
    with pytest.raises(DataError, match=message):
        adopt(config("onnx", classes=list(names)), graph, some, tmp_path / "judge")


def test_pixels_reach_the_network_as_its_config_says():
    image = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    found = prepared(image, Pixels(channels="bgr", layout="nhwc", mean=mean, std=std))
    assert found.shape == (1, 4, 4, 3)
    assert found[0, 2, 1].tolist() == pytest.approx([(1 - 0.1) / 0.5, (0.5 - 0.2) / 0.25, (0 - 0.3) / 2])
    assert prepared(image[:, :1], Pixels()).tolist() == torch.zeros(1, 3, 4, 4).tolist()
    with pytest.raises(ModelError, match="not 4"):
        prepared(torch.zeros(1, 4, 8, 8), Pixels())


def test_a_coloured_picture_turns_as_grey_as_pillow_makes_it():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 255
    found = arranged(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, Pixels(channels="grey"))
    assert found[0, 0].numpy() == pytest.approx(expected, abs=1 / 255)


@pytest.mark.parametrize("size", [(5, 7), (24, 32)])
def test_a_picture_is_resized_as_pillow_does(size):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.uint8)
    wide = Image.fromarray(pixels.astype(np.float32), "F").resize(size[::-1], Image.Resampling.BILINEAR)
    image = torch.from_numpy(pixels)[None, None] / 127.5 - 1
    found = prepared(image, Pixels(channels="grey"), size)
    assert found[0, 0].numpy() == pytest.approx(np.asarray(wide) / 255, abs=1e-3)
