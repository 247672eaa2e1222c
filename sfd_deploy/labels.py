"""Class labels: names and numbers, which are forgotten, and what is drawn in their place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import LabelError

Override = int | Literal["mixture"]
# In place of one override label: every retained label, weighted by what a classifier sees in the noisy image.
MIXTURE: Final = "mixture"


class Labels(StageConfig):
    """Class names in label order and the map from each forget label to its override label, or to "mixture".

    ``forget`` is empty for a model that has forgotten nothing (a teacher, a plain distillation).
    """

    class_names: tuple[str, ...]
    forget: dict[int, Override] = Field({})

    @property
    def count(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def retained(self) -> tuple[int, ...]:
        """Labels that are still drawn, in order."""
        return tuple(label for label in range(self.count) if label not in self.forget)

    @property
    def overrides(self) -> tuple[int, ...]:
        """Every label that stands for a forgotten one, in order."""
        return tuple(sorted({override for label in self.forget for override in self.overrides_of(label)}))

    def overrides_of(self, label: int) -> tuple[int, ...]:
        """The labels that may be drawn for a forget label: its override, or all retained ones for the mixture."""
        override = self.forget[label]
        return self.retained if override == MIXTURE else (override,)

    def override_name(self, label: int) -> str:
        """What is drawn for a forget label, in words."""
        override = self.forget[label]
        return "a mixture of the retained classes" if override == MIXTURE else self.class_names[override]

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
        """These labels with more of them forgotten, by name or number; what was forgotten before stays so.

        Raises:
            LabelError: forget equals override, an override is forgotten itself (now or earlier), a label is
                named twice or was forgotten earlier with another override, or none is left.
        """
        pairs = [(self.find(key), self._override(value)) for key, value in forget.items()]
        asked = dict(pairs)
        if len(asked) != len(pairs):
            raise LabelError("a forget label is named twice", "name each once, by name or by number")
        for label, override in asked.items():
            if self.forget.get(label, override) != override:
                raise LabelError(
                    f"{self.class_names[label]} was forgotten earlier, {self.override_name(label)} in its place",
                    "leave it out: it stays forgotten, and another override would teach it anew",
                )
        mapping = self.forget | asked
        for label, override in mapping.items():
            self._require_retained(label, override, mapping)
        if len(mapping) == self.count:
            raise LabelError("no label is retained", "forget fewer")
        return Labels(class_names=self.class_names, forget=mapping)

    def _override(self, value: str | int) -> Override:
        is_class = str(value).casefold() in {name.casefold() for name in self.class_names}
        return MIXTURE if value == MIXTURE and not is_class else self.find(value)

    def _require_retained(self, label: int, override: Override, mapping: Mapping[int, Override]) -> None:
        if override == MIXTURE:
            return
        if label == override:
            raise LabelError(
                f"forget label {self.class_names[label]} is its own override", "choose another, retained override"
            )
        if override in mapping:
            when = "was forgotten earlier" if override in self.forget else "is forgotten itself"
            raise LabelError(
                f"override {self.class_names[override]} {when} and cannot stand for {self.class_names[label]}",
                "choose a retained override label",
            )

    def plain(self) -> Labels:
        """The same classes with nothing forgotten."""
        return Labels(class_names=self.class_names)
