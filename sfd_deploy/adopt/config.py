"""What ``sfd-deploy adopt`` can be told of a generator that came without a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import LabelError
from sfd_deploy.labels import ClassKey, require_distinct

# In every configuration that the official code ships; it is 2.502 in noise levels of that schedule.
OFFICIAL_TIMESTEP = 440


class SourceConfig(StageConfig):
    """A one-step generator trained elsewhere."""

    source: str = Field(description="a diffusers folder; for a conversion, the checkpoint file")
    teacher: str | None = Field(None, description="what it was distilled from: the yardstick of its audits")
    sigma_init: float | None = Field(None, gt=0, description="noise level of the one step")
    timestep: float | None = Field(None, ge=0, description="or the timestep that has it")

    @model_validator(mode="after")
    def one_level_only(self) -> Self:
        if self.sigma_init is not None and self.timestep is not None:
            raise ValueError("sigma_init and timestep both say the noise level; give one")
        return self


class AdoptConfig(SourceConfig):
    """One that draws from class labels, and what is claimed of it."""

    class_names: tuple[str, ...] = Field((), description="in label order; left out: the teacher's, or numbers")
    forget: dict[ClassKey, ClassKey] = Field(
        {}, description="claimed: forgotten class → its override; the audit tests it"
    )
    image_size: int | None = Field(None, ge=1, description="pixels; asked for where tensors do not tell it")


class TextAdoptConfig(SourceConfig):
    """One that draws from prompts, and what is claimed of it."""

    prompts: str | None = Field(
        None, description="prompts that it still draws, a file or a shipped list; left out: the source's prompts.json"
    )
    forget_prompts: str | None = Field(None, description="claimed to be forgotten: a file or a shipped list")
    concept: str | None = Field(None, min_length=1, description="the phrase that each of those holds")
    substitute: str | None = Field(None, min_length=1, description="what is drawn instead: words for the phrase")

    @model_validator(mode="after")
    def claim_must_be_whole(self) -> Self:
        claim = (self.forget_prompts, self.concept, self.substitute)
        if any(claim) and not all(claim):
            raise ValueError("forget_prompts, concept and substitute make one claim; give all three")
        if any(claim) and self.prompts is None:
            raise ValueError("a claim needs prompts that stay as well; give prompts")
        return self


def read_class_names(text: str | None) -> tuple[str, ...]:
    """Names from ``a,b,c``, or from a file: one a line, a JSON list, or a JSON object of label → name.

    Raises:
        LabelError: a file that is missing, unreadable or empty, a gap in the labels, or a name that is empty or
            there twice.
    """
    if text is None:
        return ()
    names = tuple(part.strip() for part in text.split(",")) if "," in text else _names_in_file(Path(text))
    if not names:
        raise LabelError(f"{text}: names no class", "write one class name a line")
    require_distinct(names, text)
    return names


def _names_in_file(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise LabelError(f"{path}: no such file", "give a file of class names, or at least two with commas") from None
    except (OSError, UnicodeDecodeError):
        raise LabelError(f"{path}: cannot be read as text", "write one class name a line") from None
    if text.lstrip()[:1] not in {"[", "{"}:
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        value = json.loads(text)
        ordered = value if isinstance(value, list) else [value[str(label)] for label in range(len(value))]
    except (ValueError, KeyError):
        raise LabelError(
            f"{path}: neither a JSON list of names nor an object of label → name", "write one class name a line"
        ) from None
    return tuple(str(name).strip() for name in ordered)
