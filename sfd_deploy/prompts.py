"""Prompts as conditions: each text once, by number, and what the teacher is asked in place of a forget prompt.

Two recipes. A name goes by rewriting: its forget prompts hold a phrase, their override prompts a substitute
for it. An attribute goes by a negative prompt: the override prompt is the bare subject, and the teacher is
guided away from all the attribute's keywords instead of from the empty prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import PromptError, RunError
from sfd_deploy.phrases import composed, require_without, rewrite

PROMPTS_FILE: Final = "prompts.json"  # in a generator's or artefact's folder: the prompts that it was trained with
CONCEPT: Final = "{concept}"  # in a list of forget prompts, where the phrase goes
TEXT_TO_IMAGE: Final = "text-to-image"  # `kind` in configs and in manifests' facts
KEYWORD: Final = "{keyword}"  # in a subject, where its attribute's keyword goes


class Prompts(StageConfig):
    """Every prompt that a network is asked for. A condition is a position in ``texts``.

    ``forget`` maps a forget prompt to its override prompt. ``negatives`` maps a forget or retained prompt to the
    prompt that stands in for the empty one where the teacher is guided; without an entry it is the empty one.
    ``phrases`` are the words that forget prompts are known by: no retained or override prompt, of a later run
    either, holds one.
    """

    texts: tuple[str, ...] = Field(min_length=2)
    retained: tuple[int, ...] = Field(min_length=1)
    forget: dict[int, int] = Field({})
    negatives: dict[int, int] = Field({})
    phrases: tuple[str, ...] = ()
    unconditional: int = Field(0, ge=0, description="the empty prompt's number")

    @model_validator(mode="after")
    def numbers_must_fit(self) -> Self:
        if len(set(self.texts)) != self.count:
            raise ValueError("a text is there twice")
        mapped = (*self.forget, *self.forget.values(), *self.negatives, *self.negatives.values())
        if unknown := {n for n in (*self.retained, *mapped, self.unconditional) if not 0 <= n < self.count}:
            raise ValueError(f"prompt {min(unknown)} is out of range: there are {self.count}")
        if not all(phrase.strip() for phrase in self.phrases):
            raise ValueError("a phrase is empty")
        if self.texts[self.unconditional]:
            raise ValueError("`unconditional` is not the empty prompt")
        if both := set(self.forget) & {*self.retained, *self.forget.values(), self.unconditional}:
            raise ValueError(f"forget prompt {self.texts[min(both)]!r} is also retained or an override")
        if unasked := set(self.negatives) - {*self.forget, *self.retained}:
            raise ValueError(f"prompt {self.texts[min(unasked)]!r} has a negative prompt and is in neither part")
        return self

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.texts)


def in_utf8(text: str) -> bytes:
    """A prompt as a server is sent it.

    Raises:
        PromptError: UTF-8 cannot carry it: a command line's bytes that are none.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt {text!r} is not UTF-8 text (character {error.start})", "write it as UTF-8") from None


def draws_from_prompts(folder: Path) -> bool:
    """Whether a model folder is a text-to-image pipeline's."""
    return (folder / "text_encoder").is_dir()


def prompts_in(folder: Path) -> Prompts:
    """The prompts that a text-to-image generator or artefact was trained with.

    Raises:
        RunError: none are recorded.
        ConfigError: they are malformed.
    """
    file = folder / PROMPTS_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: no {PROMPTS_FILE} in it", "give a text-to-image run") from None
    except (OSError, ValueError):
        raise RunError(f"{file}: not readable JSON", "restore the file, or make the folder again") from None
    return Prompts.from_mapping(values, str(file))


def plain_prompts(retained: Sequence[str]) -> Prompts:
    """Forget nothing.

    Raises:
        PromptError: no prompts.
    """
    _require_some("retained prompt", retained)
    return _number(retained, {}, ())


def phrase_prompts(retained: Sequence[str], forget: Sequence[str], phrase: str, substitute: str) -> Prompts:
    """Forget a concept by name: each forget prompt's override is itself with ``substitute`` for ``phrase``.

    ``{concept}`` in a forget prompt stands for the phrase.

    Raises:
        PromptError: no prompts, a forget prompt without the phrase, or a retained one with it, which would
            teach the concept anew.
    """
    _require_some("retained prompt", retained)
    _require_some("forget prompt", forget)
    forget = [prompt.replace(CONCEPT, phrase) for prompt in forget]
    overrides = [rewrite(prompt, phrase, substitute) for prompt in forget]
    require_without("retained prompt", retained, [phrase])
    return _number(retained, dict(zip(forget, overrides, strict=True)), [phrase])


def negative_prompts(retained: Sequence[str], subjects: Sequence[str], keywords: Sequence[str]) -> Prompts:
    """Forget an attribute: every subject with every keyword becomes the bare subject.

    A keyword goes where a subject has ``{keyword}``, or else before it and, after a comma, behind it. The forget
    prompts' negative prompt is the line of all keywords. The bare subjects are retained with the same negative
    prompt: one that leaves the attribute unsaid is not drawn with it either.

    Raises:
        PromptError: no prompts, subjects or keywords, a subject that is a keyword's place and nothing else, or a
            retained prompt or subject with a keyword in it.
    """
    bare = tuple(map(_bare, subjects))
    for kind, texts in (("retained prompt", retained), ("subject", bare), ("keyword", keywords)):
        _require_some(kind, texts)
    keywords = tuple(dict.fromkeys(keywords))
    require_without("retained prompt", retained, keywords)
    require_without("subject", bare, keywords)
    forget = {
        prompt: left
        for subject, left in zip(subjects, bare, strict=True)
        for keyword in keywords
        for prompt in _with(keyword, subject)
    }
    return _number((*retained, *bare), forget, keywords, negative=", ".join(keywords), silent=bare)


def _with(keyword: str, subject: str) -> tuple[str, ...]:
    if KEYWORD in subject:
        return (subject.replace(KEYWORD, keyword),)
    return f"{keyword} {subject}", f"{subject}, {keyword}"


def _bare(subject: str) -> str:
    return " ".join(subject.replace(KEYWORD, " ").split()) if KEYWORD in subject else subject


def _number(
    retained: Iterable[str], forget: dict[str, str], phrases: Iterable[str], negative: str | None = None,
    silent: Iterable[str] = (),
) -> Prompts:  # fmt: skip
    """Texts in the order of first mention, the empty prompt first; ``negative`` is what ``silent`` ones have too."""
    numbers: dict[str, int] = {"": 0}

    def number(text: str) -> int:
        return numbers.setdefault(composed(text), len(numbers))

    kept = tuple(dict.fromkeys(number(text) for text in retained))
    mapping = {number(text): number(override) for text, override in forget.items()}
    negatives = {} if negative is None else dict.fromkeys((*mapping, *map(number, silent)), number(negative))
    return Prompts(
        texts=tuple(numbers), retained=kept, forget=mapping, negatives=negatives,
        phrases=tuple(composed(phrase) for phrase in phrases),
    )  # fmt: skip


def _require_some(kind: str, texts: Sequence[str]) -> None:
    if not texts:
        raise PromptError(f"no {kind} is given", f"give a list of them, one {kind} a line")
    if not all(text.strip() for text in texts):
        raise PromptError(f"a {kind} is empty", "leave it out: the empty prompt is always among the conditions")
