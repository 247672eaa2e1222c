"""Class labels: names and numbers, which are forgotten, and what is drawn in their place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import LabelError

Override = int | Literal["mixture"]


def _name_or_number(value: object) -> object:
    # YAML reads an unquoted `no` as False, which would pass for class 0.
    if isinstance(value, bool | float):
        # pydantic reports no TypeError.
        raise ValueError(f"{value} is neither a class name nor a label; put a name in quotes")  # noqa: TRY004
    return value


ClassKey = Annotated[int | str, BeforeValidator(_name_or_number)]
# In place of one override label: every retained label, weighted by what a classifier sees in the noisy image.
MIXTURE: Final = "mixture"


def require_distinct(names: Sequence[str], where: str = "class names") -> None:
    """Refuse class names that cannot tell classes apart; upper and lower case are one. ``where`` they stand.

    Raises:
        LabelError: an empty name, or one that is there twice.
    """
    folded = [name.strip().casefold() for name in names]
    for label, name in enumerate(folded):
        if not name:
            raise LabelError(f"{where}: that of class {label} is empty", "name every class")
        if (first := folded.index(name)) != label:
            raise LabelError(f"{where}: {names[label]} is both class {first} and {label}", "give each its own name")


class Labels(StageConfig):
    """Class names in label order and the map from each forget label to its override label, or to "mixture".

    ``forget`` is empty for a model that has forgotten nothing (a teacher, a plain distillation).
    """

    class_names: tuple[str, ...]
    forget: dict[int, Override] = Field({})

    @model_validator(mode="after")
    def names_tell_classes_apart(self) -> Self:
        require_distinct(self.class_names)
        return self

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

    def foremost(self, most: int) -> tuple[int, ...]:
        """The labels to picture, in order: all if they are few, else all forget and override labels and the first."""
        owed = [*self.forget, *self.overrides]
        chosen = dict.fromkeys([*owed, *range(self.count)])
        return tuple(sorted(list(chosen)[: max(most, len(set(owed)))]))

    def overrides_of(self, label: int) -> tuple[int, ...]:
        """The labels that may be drawn for a forget label: its override, or all retained ones for the mixture."""
        override = self.forget[label]
        return self.retained if override == MIXTURE else (override,)

    def override_name(self, label: int) -> str:
        """What is drawn for a forget label, in words."""
        override = self.forget[label]
        return "a mixture of the retained classes" if override == MIXTURE else self.class_names[override]

    def find(self, name: str | int) -> int:
        """The label of a class name or a number; a name is looked for first.

        Classes may be named by numbers that are not their labels: folders 1, 10, 2 are labels 0, 1, 2.

        Raises:
            LabelError: unknown name, or a number out of range.
        """
        text = str(name).strip()
        folded = {known.strip().casefold(): label for label, known in enumerate(self.class_names)}
        if text.casefold() in folded:
            return folded[text.casefold()]
        if text.lstrip("-").isdigit():
            if 0 <= int(text) < self.count:
                return int(text)
            raise LabelError(f"label {text} is out of range", f"use 0 to {self.count - 1}")
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
