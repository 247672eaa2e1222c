"""What a model can be asked for by number, where nobody says what: all its classes, or a few of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed
from sfd_deploy.prompts import draws_from_prompts, in_utf8, prompts_in
from sfd_deploy.runtime import open_runtime, open_text_runtime
from sfd_deploy.runtime.seam import Runtime

SHOWN_PROMPTS: Final = 4  # of those forgotten, and of those kept


@dataclass(frozen=True)
class Conditions:
    """Class names in the model's order, or ``texts``: any prompts, in the order they are asked for by."""

    names: tuple[str, ...]
    are_prompts: bool

    @classmethod
    def of_prompts(cls, texts: Sequence[str]) -> Conditions:
        """Prompts of one's own.

        Raises:
            PromptError: one that is not UTF-8 text.
        """
        for text in texts:
            in_utf8(text)
        return cls(tuple(texts), are_prompts=True)

    @property
    def texts(self) -> tuple[str, ...] | None:
        """The prompts, or None: it is asked for class labels."""
        return self.names if self.are_prompts else None

    def open(self, sealed: Sealed, device: str = "auto") -> Runtime:
        """The back end of a verified folder, asked for these by position.

        Raises:
            As ``open_runtime`` and ``open_text_runtime``.
        """
        return open_text_runtime(sealed, self.names, device) if self.are_prompts else open_runtime(sealed, device)


def conditions_of(sealed: Sealed) -> Conditions:
    """All classes of a generator or artefact; of one of prompts, the first few that it forgot and that it kept.

    Raises:
        RunError, ConfigError: it records no prompts or labels.
    """
    if not draws_from_prompts(sealed.folder):
        return Conditions(Labels.from_mapping(sealed.facts.get("labels"), str(sealed.folder)).class_names, False)
    prompts = prompts_in(sealed.folder)
    shown = (*islice(prompts.forget, SHOWN_PROMPTS), *prompts.retained[:SHOWN_PROMPTS])
    return Conditions.of_prompts([prompts.texts[number] for number in shown])
