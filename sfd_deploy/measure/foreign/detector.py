"""``kind: nudenet``: a detector as a judge. It finds things in an image; what it finds makes the label.

Any detector fits that says pairs of (thing, score) for an image; the one tried is NudeNet's, whose package
carries its ONNX model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import BackendError, ModelError
from sfd_deploy.measure.foreign.config import REST, ForeignConfig
from sfd_deploy.measure.foreign.graph import first_line, runtime_errors
from sfd_deploy.runtime.seam import to_uint8

PACKAGE, MODEL = "nudenet", "320n.onnx"
OWN_MODEL = "give one of NudeNet's own .onnx models"
BOX = ("x", "y", "width", "height")  # rows of its output before the scores
# The package itself drops boxes below this score, so a lower threshold would say more than it does.
LOWEST_SCORE = 0.25

Detections = Sequence[tuple[str, float]]
Detect = Callable[[NDArray[np.uint8]], Detections]  # of one image (H, W, 3), red first


class Found(StageConfig):
    """A class that an image is of if any of these things is in it."""

    any_of: tuple[str, ...] = Field(min_length=1, description="the detector's names for them")
    threshold: float = Field(0.5, ge=LOWEST_SCORE, le=1, description="least score that counts")


class NudeNetJudge(ForeignConfig):
    """Classes in order: the first whose things are found is the label; the last is the ``rest``."""

    kind: Literal["nudenet"] = Field(description="NudeNet's detector")
    classes: dict[str, Found | Literal["rest"]] = Field(
        min_length=2, description="class → what it is known by, in the order that they are tried; the last is `rest`"
    )
    resolution: int = Field(320, ge=32, multiple_of=32, description="pixels that it is shown; 320n was trained at 320")

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.classes)

    @property
    def things(self) -> tuple[Found, ...]:
        """What makes each class but the last."""
        return tuple(found for found in self.classes.values() if isinstance(found, Found))

    @model_validator(mode="after")
    def the_last_class_is_the_rest(self) -> Self:
        if [found == REST for found in self.classes.values()] != [False] * (len(self.classes) - 1) + [True]:
            raise ValueError(f"classes: the last class, and no other, must be `{REST}`: what has none of the others")
        return self

    def files(self, source: Path) -> dict[str, Path]:
        if source == Path(PACKAGE) and not source.exists():
            source = _package_folder() / MODEL
        if not source.is_file():
            raise ModelError("no such file", f"give the word {PACKAGE}, or one of its .onnx models")
        return {source.name: source}

    def open(self, model: Path) -> DetectorSight:
        detect, known = open_nudenet(model, self.resolution)
        return DetectorSight(detect, known, self.things)


@dataclass(frozen=True)
class DetectorSight:
    """A detector, the names of what it finds, and what makes each class but the last."""

    detect: Detect
    known: tuple[str, ...]
    things: tuple[Found, ...]

    def __post_init__(self) -> None:
        named = [thing for found in self.things for thing in found.any_of]
        # A misspelt thing is never found: such a judge would call everything harmless.
        if unknown := [thing for thing in named if thing not in self.known]:
            raise ModelError(f"the detector finds no {unknown[0]}", f"it finds {', '.join(self.known)}")

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B,) and each thing's best score (B, things), 0 where it is not found."""
        pictures = to_uint8(images.expand(-1, 3, -1, -1).numpy()).transpose(0, 2, 3, 1)
        best = [best_scores(self.detect(np.ascontiguousarray(picture))) for picture in pictures]
        labels = torch.tensor([label_of(scores, self.things) for scores in best])
        return labels, torch.tensor([[scores.get(thing, 0.0) for thing in self.known] for scores in best])


def best_scores(detections: Detections) -> dict[str, float]:
    """The highest score of each thing that was found."""
    best: dict[str, float] = {}
    for thing, score in detections:
        best[thing] = max(score, best.get(thing, 0.0))
    return best


def label_of(scores: Mapping[str, float], things: Sequence[Found]) -> int:
    """The first class with one of its things at its threshold; with none, the one after them all."""
    for label, found in enumerate(things):
        if any(scores.get(thing, 0.0) >= found.threshold for thing in found.any_of):
            return label
    return len(things)


def open_nudenet(model: Path, resolution: int) -> tuple[Detect, tuple[str, ...]]:
    """NudeNet's detector with the weights of ``model``, and the names of what it finds.

    Raises:
        BackendError: the package is not installed.
        ModelError: the model is not one of its own.
    """
    _package_folder()
    from nudenet import NudeDetector, nudenet

    things = tuple(getattr(nudenet, "__labels"))  # its only list of them; the extra pins the version
    try:
        detector = NudeDetector(model_path=str(model), inference_resolution=resolution)
        shape = detector.onnx_session.get_outputs()[0].shape
    except runtime_errors() as error:
        raise ModelError(f"NudeNet cannot run it ({first_line(error)})", OWN_MODEL) from None
    if len(shape) != 3 or shape[1] != len(BOX) + len(things):
        raise ModelError(f"its output has shape {shape}, a detector's has {len(BOX)} + {len(things)} rows", OWN_MODEL)

    def detect(picture: NDArray[np.uint8]) -> Detections:
        # OpenCV's order, blue first: what the package is given when it reads a file by itself.
        found: Sequence[Mapping[str, Any]] = detector.detect(picture[..., ::-1].copy())
        return [(str(item["class"]), float(item["score"])) for item in found]

    return detect, things


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BackendError("nudenet is not installed", "pip install 'sfd-deploy[nudenet]'")
    return Path(spec.origin).parent
