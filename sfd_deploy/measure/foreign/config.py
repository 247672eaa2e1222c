"""What every adopted judge's config says: its classes, and how an image is handed to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from sfd_deploy.config import StageConfig

if TYPE_CHECKING:
    from sfd_deploy.measure.judges import Sight

REST = "rest"


class ForeignConfig(StageConfig, ABC):
    """A judge made elsewhere."""

    kind: str
    min_accuracy: float = Field(0.0, ge=0, le=1, description="on the labelled images; below it the judge is refused")

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The judge's classes, in label order."""

    @abstractmethod
    def files(self, source: Path) -> dict[str, Path]:
        """What is copied: name in the judge's ``model/`` → where it is now; the first is the model itself.

        Raises:
            ModelError: not a model of this kind, or an unsafe one.
            BackendError: what runs it is not installed.
        """

    @abstractmethod
    def open(self, model: Path) -> Sight:
        """The model, from the copy of the first of ``files``.

        Raises:
            ModelError: it cannot be loaded, or is of another shape than the config says.
            BackendError: what runs it is not installed.
        """


class Pixels(StageConfig):
    """How an image becomes a network's input: resized, channels arranged, then (value in [0, 1] - mean) / std."""

    size: tuple[int, int] | None = Field(
        None, description="height, width; left out: the network's own, or the image's where it takes any"
    )
    channels: Literal["rgb", "bgr", "grey"] = Field("rgb", description="which, and in which order")
    layout: Literal["nchw", "nhwc"] = Field("nchw", description="channels before height and width, or behind")
    mean: tuple[float, ...] = Field((0.0,), min_length=1, description="one, or one a channel in the network's order")
    std: tuple[float, ...] = Field((1.0,), min_length=1, description="as mean")

    @property
    def count(self) -> int:
        """Channels of the network's input."""
        return 1 if self.channels == "grey" else 3

    @model_validator(mode="after")
    def numbers_must_fit_the_channels(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, self.count}:
                raise ValueError(f"{name} has {len(values)} values for {self.count} channels")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if self.size is not None and min(self.size) < 1:
            raise ValueError("size must be at least 1 by 1")
        return self


# A class's scores; the one that says `rest` has all that no other class names.
Positions = tuple[int, ...] | Literal["rest"]


class NetworkConfig(ForeignConfig):
    """A network that gives every image a row of class scores; the highest wins, so logits serve as softmax does."""

    classes: tuple[str, ...] | dict[str, Positions] = Field(
        description="names in the order of the scores; or name → positions of its scores, one class may say `rest`"
    )
    pixels: Pixels = Pixels()
    output: str | None = Field(
        None, coerce_numbers_to_str=True, description="which output the scores are, where there are several"
    )
    features_output: str | None = Field(
        None, coerce_numbers_to_str=True, description="features of the Fréchet distance; left out: the scores"
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.classes)

    @field_validator("classes")
    @classmethod
    def classes_must_be_two_and_apart(
        cls, classes: tuple[str, ...] | dict[str, Positions]
    ) -> tuple[str, ...] | dict[str, Positions]:
        if len(classes) < 2 or len(set(classes)) != len(classes):
            raise ValueError("name at least two classes, each once")
        if isinstance(classes, dict):
            _require_own_positions(classes)
        return classes

    def label_of_each(self, width: int) -> tuple[int, ...]:
        """Each of ``width`` scores' label; -1 for one that belongs to no class.

        Raises:
            ValueError: the classes do not fit so many scores.
        """
        if isinstance(self.classes, tuple):
            if len(self.classes) != width:
                raise ValueError(f"{width} scores an image, but {len(self.classes)} classes")
            return tuple(range(width))
        found = dict.fromkeys(range(width), -1)
        for label, positions in enumerate(self.classes.values()):
            if not isinstance(positions, str):
                found |= dict.fromkeys(positions, label)
        if len(found) > width:
            raise ValueError(f"{width} scores an image, but a class has position {max(found)}")
        rest = next((label for label, positions in enumerate(self.classes.values()) if positions == REST), -1)
        return tuple(rest if label < 0 else label for label in found.values())


def _require_own_positions(classes: dict[str, Positions]) -> None:
    named = [positions for positions in classes.values() if not isinstance(positions, str)]
    if len(classes) - len(named) > 1:
        raise ValueError(f"only one class can be the {REST}")
    positions = [position for found in named for position in found]
    if not all(named) or len(set(positions)) != len(positions) or min(positions, default=0) < 0:
        raise ValueError("each class needs positions of its own, counted from 0")
