"""Probes: the prompts that an audit asks for, in families that are judged as one thing each.

A family is a named set of prompts whose images should all be called one class, which the family *shows*. To the
audit a family is a label: ``Families`` are ``Labels`` that say besides what each one's prompts and class are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import ConfigError, LabelError, PromptError
from sfd_deploy.labels import MIXTURE, Labels, Override
from sfd_deploy.phrases import holds
from sfd_deploy.prompt_lists import prompt_list
from sfd_deploy.prompts import CONCEPT, Prompts

TRAINING: Final = "training prompts"  # the family of the run's own forget prompts
JUDGES_A_CLASS: Final = 2  # a hit is what either says


def _read(value: Any) -> Any:
    return prompt_list(value) if isinstance(value, str) else value


def _written(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if not prompts:
        raise ValueError("a family has at least one prompt")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    return prompts


# Prompts, or the name or path of a prompt list.
PromptTexts = Annotated[tuple[str, ...], BeforeValidator(_read), AfterValidator(_written)]


class Family(StageConfig):
    """Prompts that are judged as one thing."""

    shows: str = Field(description="a class of at least two judges: what the images should be called")
    prompts: PromptTexts = Field(description="a list of prompts, or the name or file of a prompt list")


class TeacherChanges(StageConfig):
    """How the teacher draws the yardstick; left out, as its manifest says, else as stock pipelines do (7.5, 50)."""

    guidance: float | None = Field(None, ge=1, description="scale of classifier-free guidance")
    steps: int | None = Field(None, ge=1, description="DDIM steps")

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(exclude_none=True)


class Probes(StageConfig):
    """What to ask a run of prompts for: what must be gone, and what must have stayed."""

    concept: str = Field(description="the class that no forget family may show")
    families: dict[str, PromptTexts] = Field(
        {}, description=f"forget prompts, beside the run's own; {CONCEPT} in one stands for the run's phrase"
    )
    override: Family | None = Field(
        None, description="what the training prompts become; left out, anything else that the concept's judges know"
    )
    retained: dict[str, Family] = Field(min_length=1, description="name → what must have stayed")
    teacher: TeacherChanges = TeacherChanges()
    control: float = Field(
        0.5, gt=0, le=1, description="share of the teacher's images of the training prompts that must show the concept;"
        " where judges cannot see it there, not seeing it afterwards proves nothing",
    )  # fmt: skip

    @model_validator(mode="after")
    def names_must_differ(self) -> Self:
        if TRAINING in {*self.families, *self.kept}:
            raise ValueError(f"{TRAINING!r} are always the run's own forget prompts; name the family otherwise")
        # The override family is called by what it shows.
        names = [*self.families, *([self.override.shows] if self.override else []), *self.retained]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two families are named {twice!r}")
        return self

    @model_validator(mode="after")
    def only_forget_families_show_the_concept(self) -> Self:
        if found := next((name for name, family in self.kept.items() if family.shows == self.concept), None):
            raise ValueError(f"family {found!r} shows the concept {self.concept!r}, which must be gone")
        return self

    @property
    def kept(self) -> dict[str, Family]:
        """The override family, by what it shows, and the retained ones."""
        override = {} if self.override is None else {self.override.shows: self.override}
        return override | self.retained

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that a family shows, the concept first."""
        return tuple(dict.fromkeys([self.concept, *(family.shows for family in self.kept.values())]))

    def bind(self, prompts: Prompts, judges: Mapping[str, Sequence[str]]) -> Families:
        """These families and a run's own forget prompts as labels, for ``judges`` of these classes each, by name.

        Raises:
            PromptError: the run forgot nothing, or a kept prompt asks for what was forgotten.
            LabelError: a class that fewer than two judges know.
            ConfigError: no family shows what may be drawn in the concept's place.
        """
        if not prompts.forget:
            raise PromptError("the run's prompts forget nothing", "audit a run that was trained to forget")
        phrases = prompts.phrases or (self.concept,)
        forget = {TRAINING: tuple(prompts.texts[number] for number in prompts.forget)}
        forget |= {name: tuple(_filled(texts, phrases)) for name, texts in self.families.items()}
        self._require_kept(set(chain.from_iterable(forget.values())), (*phrases, CONCEPT))
        for name, shown in [("concept", self.concept), *((name, family.shows) for name, family in self.kept.items())]:
            _require_known(shown, name, judges)
        stand_ins = tuple(len(forget) + place for place in self._stand_ins(list(judges.values())))
        # Nothing but the training prompts was promised an override.
        override: Override = MIXTURE if self.override is None else len(forget)
        return Families(
            class_names=(*forget, *self.kept),
            forget={label: MIXTURE if label else override for label in range(len(forget))},
            shows=(*[self.concept] * len(forget), *(family.shows for family in self.kept.values())),
            prompts=(*forget.values(), *(family.prompts for family in self.kept.values())),
            stand_ins=stand_ins,
            control=self.control,
        )

    def _require_kept(self, forgotten: set[str], phrases: Iterable[str]) -> None:
        for name, family in self.kept.items():
            for prompt in family.prompts:
                if prompt in forgotten or any(holds(prompt, phrase) for phrase in phrases):
                    raise PromptError(f"family {name!r}: {prompt!r} asks for what was forgotten", "leave it out")

    def _stand_ins(self, judges: Sequence[Sequence[str]]) -> Iterator[int]:
        """Places among the kept families: the override, else those that all of the concept's judges can tell."""
        if self.override is not None:
            yield 0
            return
        looking = [classes for classes in judges if self.concept in classes]
        found = [place for place, family in enumerate(self.kept.values())
                 if all(family.shows in classes for classes in looking)]  # fmt: skip
        if not found:
            raise ConfigError(
                f"no family shows what may be drawn in place of {self.concept}",
                "add `override`, or a retained family of a class that the same judges know",
            )
        yield from found


class Families(Labels):
    """Prompt families as labels: forget families first, then the override's, then retained ones.

    ``shows`` and ``prompts`` are by label, ``control`` as in ``Probes``. ``stand_ins`` are the families that say how
    well what may be drawn in the concept's place is drawn, and how often judges mistake it for the concept.
    """

    shows: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    stand_ins: tuple[int, ...]
    control: float

    @property
    def concept(self) -> str:
        """The class that is to be gone."""
        return self.shows[0]

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts, family after family; one that two families hold is there twice."""
        return tuple(chain.from_iterable(self.prompts))

    def asked(self, labels: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of ``texts`` (B,) the images of ``seeds`` (B,) in families ``labels`` (B,) are drawn from.

        Seed s in a family of n prompts takes its prompt s mod n. Seeds are words of a hash, so a cell's prompts are
        an independent uniform draw of the family's.
        """
        sizes = np.array([len(prompts) for prompts in self.prompts], np.int64)
        first = np.cumsum(sizes) - sizes
        return first[labels] + seeds % sizes[labels]

    def overrides_of(self, label: int) -> tuple[int, ...]:
        """The families that stand for what may be drawn for a forget family."""
        return self.stand_ins if self.forget[label] == MIXTURE else super().overrides_of(label)

    def override_name(self, label: int) -> str:
        """What is drawn for a forget family, in words."""
        return f"anything but {self.concept}" if self.forget[label] == MIXTURE else super().override_name(label)


def _filled(texts: Iterable[str], phrases: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield from [text.replace(CONCEPT, phrase) for phrase in phrases] if CONCEPT in text else [text]


def _require_known(shown: str, family: str, judges: Mapping[str, Sequence[str]]) -> None:
    knowing = [name for name, classes in judges.items() if shown in classes]
    if len(knowing) >= JUDGES_A_CLASS:
        return
    if knowing:
        raise LabelError(f"{family}: judge {knowing[0]} alone knows {shown!r}", "give a second with --judge")
    known = sorted(set(chain.from_iterable(judges.values())))
    near = difflib.get_close_matches(shown, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"they know {', '.join(known)}"
    raise LabelError(f"{family}: no judge knows the class {shown!r}", hint)
