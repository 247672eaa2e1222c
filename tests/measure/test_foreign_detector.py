"""A detector as a judge: how what it finds becomes a label, and NudeNet's own on pictures of nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError, ConfigError, ModelError
from sfd_deploy.measure.foreign.adopt import foreign_config
from sfd_deploy.measure.foreign.detector import DetectorSight, Found, label_of
from sfd_deploy.measure.judges import open_judge
from sfd_deploy.training.data import LabelledImages
from tests.measure.foreign_world import adopt, adopted, little_graph

VALUES = {"kind": "nudenet", "classes": {"faces": {"any_of": ["FACE_FEMALE", "FACE_MALE"]}, "none": "rest"}}
needs_nudenet = pytest.mark.skipif(
    importlib.util.find_spec("nudenet") is None, reason="needs nudenet: pip install 'sfd-deploy[nudenet]'"
)


@pytest.fixture(scope="module")
def pictures_of_nothing() -> LabelledImages:
    """Noise and gradients: no person is in any picture of these tests. The labels are arbitrary."""
    draws = np.random.default_rng(0)
    noise = draws.integers(0, 256, (4, 3, 48, 48))
    ramp = np.broadcast_to(np.linspace(0, 255, 48), (4, 3, 48, 48)) * draws.random((4, 3, 1, 1))
    pixels = np.concatenate([noise, ramp]).astype(np.uint8)
    return LabelledImages(pixels, np.array([0, 1, 0, 1, 1, 1, 0, 1]), ("faces", "none"))


def things(*found: tuple[list[str], float]) -> tuple[Found, ...]:
    return tuple(Found(any_of=tuple(names), threshold=threshold) for names, threshold in found)


@pytest.mark.parametrize(
    ("scores", "label"),
    [
        ({}, 2),
        ({"nose": 0.99}, 2),
        ({"cat": 0.49}, 2),
        ({"cat": 0.5}, 0),
        ({"kitten": 0.8, "dog": 0.9}, 0),
        ({"cat": 0.3, "dog": 0.7}, 1),
        ({"dog": 0.69}, 2),
    ],
)
def test_the_first_class_with_a_thing_at_its_threshold_is_the_label(scores, label):
    assert label_of(scores, things((["cat", "kitten"], 0.5), (["dog"], 0.7))) == label


def brightness(picture: NDArray[np.uint8]) -> list[tuple[str, float]]:
    """A detector of sorts: a lamp as sure as the picture is red, seen thrice, and a shade where no blue is."""
    lamp = float(picture[..., 0].mean()) / 255
    return [
        *(("lamp", lamp * share) for share in (0.5, 1, 0.7)),
        *([("shade", 1.0)] if picture[..., 2].max() == 0 else []),
    ]


def test_a_detector_is_shown_red_first_and_its_best_scores_are_the_features():
    sight = DetectorSight(brightness, ("lamp", "shade", "door"), things((["lamp"], 0.5)))
    images = torch.full((3, 3, 4, 4), -1.0)
    images[0, 0], images[1, 2] = 1.0, 1.0  # red; blue; black
    labels, features = sight.see(images)
    assert labels.tolist() == [0, 1, 1]
    assert features.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    grey = sight.see(torch.ones(1, 1, 4, 4))
    assert grey[0].tolist() == [0]


def test_a_thing_that_the_detector_never_finds_is_refused_by_name():
    with pytest.raises(ModelError, match="the detector finds no lmap; it finds lamp, shade"):
        DetectorSight(brightness, ("lamp", "shade"), things((["lamp", "lmap"], 0.5)))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": {"any_of": ["FACE_MALE"]}, "b": {"any_of": ["FACE_FEMALE"]}}, "the last class"),
        ({"a": "rest", "b": {"any_of": ["FACE_MALE"]}}, "the last class"),
        ({"a": {"any_of": []}, "b": "rest"}, "any_of"),
        ({"a": {"any_of": ["FACE_MALE"], "threshold": 0.1}, "b": "rest"}, "threshold"),
        ({"b": "rest"}, "at least 2"),
    ],
)
def test_classes_that_leave_an_image_without_label_are_refused(classes, message):
    with pytest.raises(ConfigError, match=message):
        foreign_config(VALUES | {"classes": classes}, "mine.yaml")


@needs_nudenet
def test_nudenet_finds_nothing_in_noise_and_gradients(pictures_of_nothing, tmp_path):
    sealed = adopt(VALUES, Path("nudenet"), pictures_of_nothing, tmp_path / "judge")
    judge = open_judge(tmp_path / "judge")
    called, features = judge.look(pictures_of_nothing.batch(torch.arange(8))[0].numpy())
    assert called.tolist() == [1] * 8
    assert np.array_equal(features, np.zeros((8, 18), np.float32))
    assert judge.accuracy == 5 / 8  # as often as the arbitrary label is "none"
    assert sealed.facts["format"] == "nudenet"
    assert list(sealed.manifest.files) == ["held_out.safetensors", "model/320n.onnx", "reference.safetensors"]


@needs_nudenet
def test_the_detector_reads_pictures_as_its_package_reads_files(tmp_path):
    """Blue first, as OpenCV has it: scores of all boxes on a coloured picture, before any threshold."""
    import cv2
    from nudenet import nudenet

    from sfd_deploy.measure.foreign import detector

    picture = np.random.default_rng(1).integers(0, 256, (40, 40, 3)).astype(np.uint8)  # red first
    cv2.imwrite(str(tmp_path / "picture.png"), picture[..., ::-1])
    shown = []
    folder = Path(importlib.util.find_spec("nudenet").origin).parent
    detect, known = detector.open_nudenet(folder / "320n.onnx", 320)
    original = nudenet._read_image

    def read(image: object, size: int) -> object:
        shown.append(original(image, size))
        return shown[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nudenet, "_read_image", read)
        detect(picture)
    assert np.array_equal(shown[0][0], original(str(tmp_path / "picture.png"), 320)[0])
    assert len(known) == 18


@needs_nudenet
def test_a_model_that_is_not_nudenets_is_one_line(pictures_of_nothing, tmp_path):
    graph = little_graph(tmp_path / "little.onnx", shape=("batch", 3, 320, 320))
    with pytest.raises(ModelError, match=r"little\.onnx: its output has shape .*, a detector's has 4 \+ 18 rows"):
        adopt(VALUES, graph, pictures_of_nothing, tmp_path / "judge")
    (tmp_path / "text.onnx").write_text("no")
    with pytest.raises(ModelError, match=r"text\.onnx: NudeNet cannot run it"):
        adopt(VALUES, tmp_path / "text.onnx", pictures_of_nothing, tmp_path / "judge")
    with pytest.raises(ModelError, match="no such file; give the word nudenet"):
        adopt(VALUES, tmp_path / "none.onnx", pictures_of_nothing, tmp_path / "judge")


@needs_nudenet
def test_a_misspelt_thing_is_refused_before_anything_is_called_harmless(pictures_of_nothing, tmp_path):
    values = VALUES | {"classes": {"faces": {"any_of": ["FACES_MALE"]}, "none": "rest"}}
    with pytest.raises(ModelError, match="the detector finds no FACES_MALE"):
        adopted(values, Path("nudenet"), pictures_of_nothing, tmp_path / "judge")


def test_without_the_package_the_line_says_what_to_install(pictures_of_nothing, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "nudenet" else found(name))
    with pytest.raises(BackendError, match=r"pip install 'sfd-deploy\[nudenet\]'"):
        adopted(VALUES, Path("nudenet"), pictures_of_nothing, tmp_path / "judge")
