"""Models made elsewhere, small: a toy judge's network as others would save it, and labelled pictures of its classes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor, nn

from sfd_deploy.export.graph import trace
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.foreign.adopt import adopt_judge, foreign_config
from sfd_deploy.measure.judges import Judge, load_judge
from sfd_deploy.runtime.seam import Images, to_uint8
from sfd_deploy.training.data import LabelledImages, load_held_out
from tests.audit.toy import NAMES, gratings

# Of a network whose scores are the four pixels of a 2x2 image.
LITTLE = {"classes": ["a", "b", "c", "d"], "pixels": {"channels": "grey"}, "output": None, "features_output": None}
PIXELS = {"channels": "grey", "mean": [0.5], "std": [0.5]}  # toy networks read [-1, 1], as ours do


class Exported(nn.Module):
    """Scores and features of one of our networks, read only through its public methods."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.body(images).mean((2, 3))
        return self.classifier.head(features), features


def grating_pictures(seed: int, count: int) -> tuple[Images, np.ndarray]:
    """Gratings (N, 1, 12, 12) as a file holds them, in whole levels, and their labels."""
    z = np.random.default_rng(seed).standard_normal((count, 1, 12, 12)).astype(np.float32)
    labels = np.arange(count) % len(NAMES)
    return to_uint8(gratings(z, labels)).astype(np.float32) / 127.5 - 1, labels


def class_folders(folder: Path, per_class: int = 12, seed: int = 5) -> Path:
    """``folder/CLASS/NUMBER.png``: sorted, the classes stand in another order than the judge's."""
    images, labels = grating_pictures(seed, per_class * len(NAMES))
    for number, (pixels, label) in enumerate(zip(to_uint8(images), labels, strict=True)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(folder / NAMES[label] / f"{number:03}.png")
    return folder


def labelled(folder: Path) -> LabelledImages:
    """Every picture below ``folder``."""
    return load_held_out(folder)


def save_onnx(judge: Judge, file: Path, channels: int = 1, size: int = 12) -> Path:
    """The judge's network as a graph with outputs ``scores`` and ``features``."""
    example = {"images": torch.zeros(2, channels, size, size)}
    onnx.save(trace(Exported(judge.classifier).eval(), example, ["scores", "features"], 20), file)
    return file


def save_torchscript(module: nn.Module, file: Path, example: Tensor | None = None) -> Path:
    """``module`` as a TorchScript archive: traced on ``example``, or compiled where it is a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how others save is none of our business
        script = torch.jit.script(module) if example is None else torch.jit.trace(module.eval(), example)
        script.save(str(file))
    return file


def config(kind: str, **keys: Any) -> dict[str, Any]:
    """A config of the toy's classes."""
    network = {"classes": list(NAMES), "pixels": PIXELS, "output": "scores", "features_output": "features"}
    return {"kind": kind} | (network if kind in {"onnx", "torchscript"} else {}) | keys


def adopt(values: dict[str, Any], source: Path, data: LabelledImages, target: Path) -> Sealed:
    """Adopt ``source`` by a config."""
    return adopt_judge(foreign_config(values, "test.yaml"), source, data, target, "pictures")


def adopted(values: dict[str, Any], source: Path, data: LabelledImages, target: Path) -> Judge:
    """The judge that adopting gave."""
    return load_judge(adopt(values, source, data, target))


def write_yaml(file: Path, values: dict[str, Any]) -> str:
    """JSON is YAML."""
    file.write_text(json.dumps(values))
    return str(file)


def little_graph(
    file: Path, op: str = "Flatten", domain: str = "", kind: int = TensorProto.FLOAT, inputs: int = 1,
    shape: tuple[int | str, ...] = ("batch", 1, 2, 2),
) -> Path:  # fmt: skip
    """A graph of one operator whose scores are its image's own pixels."""
    names = ["image", "mask"][:inputs]
    node = helper.make_node(op, names[:1], ["scores"], domain=domain)
    graph = helper.make_graph(
        [node], "little", [helper.make_tensor_value_info(name, kind, shape) for name in names],
        [helper.make_tensor_value_info("scores", kind, None)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def pixel_images() -> LabelledImages:
    """2x2 grey images whose brightest pixel is their class."""
    labels = np.arange(8) % 4
    images = np.full((8, 4), 10, np.uint8)
    images[np.arange(8), labels] = 200
    return LabelledImages(images.reshape(8, 1, 2, 2), labels, ("a", "b", "c", "d"))
