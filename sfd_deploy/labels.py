"""Class labels: names and numbers, which are forgotten, and what is drawn in their place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic import Field

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import LabelError


class Labels(StageConfig):
    """Class names in label order and the map from each forget label to its override label.

    ``forget`` is empty for a model that has forgotten nothing (a teacher, a plain distillation).
    """

    class_names: tuple[str, ...]
    forget: dict[int, int] = Field({})

    @property
    def count(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def retained(self) -> tuple[int, ...]:
        """Labels that are still drawn, in order."""
        return tuple(label for label in range(self.count) if label not in self.forget)

    def find(self, name: str | int) -> int:
        """The label of a class name or a number.

        Raises:
            LabelError: unknown name, or a number out of range.
        """
        text = str(name).strip()
        if text.lstrip("-").isdigit():
            if 0 <= int(text) < self.count:
                return int(text)
            raise LabelError(f"label {text} is out of range", f"use 0 to {self.count - 1}")
        folded = {known.casefold(): label for label, known in enumerate(self.class_names)}
        if text.casefold() in folded:
            return folded[text.casefold()]
        near = difflib.get_close_matches(text.casefold(), list(folded), n=1)
        hint = (
            f"did you mean {self.class_names[folded[near[0]]]}?"
            if near
            else f"use one of {', '.join(self.class_names)}"
        )
        raise LabelError(f"unknown class {text!r}", hint)

    def forgetting(self, forget: Mapping[str | int, str | int]) -> Labels:
        """These labels with a forget-to-override map given by name or number.

        Raises:
            LabelError: forget equals override, an override is forgotten itself, or a label is named twice.
        """
        pairs = [(self.find(key), self.find(value)) for key, value in forget.items()]
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise LabelError("a forget label is named twice", "name each once, by name or by number")
        for label, override in pairs:
            if label == override:
                raise LabelError(
                    f"forget label {self.class_names[label]} is its own override", "choose another, retained override"
                )
            if override in mapping:
                raise LabelError(
                    f"override {self.class_names[override]} is forgotten itself", "choose a retained override label"
                )
        return Labels(class_names=self.class_names, forget=mapping)

    def plain(self) -> Labels:
        """The same classes with nothing forgotten."""
        return Labels(class_names=self.class_names)
