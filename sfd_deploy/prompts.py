"""Prompts as conditions: each text once, by number, and what the teacher is asked in place of a forget prompt.

Two recipes. A name goes by rewriting: its forget prompts hold a phrase, their override prompts a substitute
for it. An attribute goes by a negative prompt: the override prompt is the bare subject, and the teacher is
guided away from all the attribute's keywords instead of from the empty prompt.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import PromptError, RunError

PROMPTS_FILE: Final = "prompts.json"  # in a generator's or artefact's folder: the prompts that it was trained with
TEXT_TO_IMAGE: Final = "text-to-image"  # `kind` in configs and in manifests' facts


class Prompts(StageConfig):
    """Every prompt that a network is asked for. A condition is a position in ``texts``.

    ``forget`` maps a forget prompt to its override prompt. ``negatives`` maps an override prompt to the
    prompt that stands in for the empty one where a forget row is guided; without an entry it is the empty one.
    """

    texts: tuple[str, ...] = Field(min_length=2)
    retained: tuple[int, ...] = Field(min_length=1)
    forget: dict[int, int] = Field({})
    negatives: dict[int, int] = Field({})
    unconditional: int = Field(0, ge=0, description="the empty prompt's number")

    @model_validator(mode="after")
    def numbers_must_fit(self) -> Self:
        if len(set(self.texts)) != self.count:
            raise ValueError("a text is there twice")
        mapped = (*self.forget, *self.forget.values(), *self.negatives, *self.negatives.values())
        if unknown := {n for n in (*self.retained, *mapped, self.unconditional) if not 0 <= n < self.count}:
            raise ValueError(f"prompt {min(unknown)} is out of range: there are {self.count}")
        if self.texts[self.unconditional]:
            raise ValueError("`unconditional` is not the empty prompt")
        if both := set(self.forget) & {*self.retained, *self.forget.values(), self.unconditional}:
            raise ValueError(f"forget prompt {self.texts[min(both)]!r} is also retained or an override")
        return self

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.texts)


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line in order; blank lines and spaces around a prompt are dropped.

    Raises:
        PromptError: missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"{file}: no such file", "give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise _not_text(file, f"byte {error.start}") from None
    except OSError as error:
        raise PromptError(f"{file}: cannot be read ({error.strerror})", "give a readable text file") from None
    if "\0" in text:
        raise _not_text(file, "a zero byte")
    # Composed, as CLIP's tokenizer has it: two spellings of one accent are one prompt.
    lines = (_composed(line).strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise PromptError(f"{file}: no prompt in it", "write one prompt a line")
    return prompts


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
    return Prompts.from_mapping(values, str(file))


def rewrite(prompt: str, phrase: str, substitute: str) -> str:
    """``prompt`` with every occurrence of ``phrase`` replaced, whatever its case; both are taken literally.

    Raises:
        PromptError: the phrase is empty or absent, or what comes out still holds it.
    """
    prompt, phrase, substitute = (_composed(text) for text in (prompt, phrase, substitute))
    if not phrase.strip():
        raise PromptError("the phrase to forget is empty", "give the words that name the concept")
    if not _holds(prompt, phrase):
        raise PromptError(
            f"prompt {prompt!r} does not hold the phrase {phrase!r}",
            "write the phrase as it stands in the forget prompts, or leave that prompt out",
        )
    # A function, since a substitute's backslash would mean something to a regular expression too.
    written = re.sub(re.escape(phrase), lambda _: substitute, prompt, flags=re.IGNORECASE)
    if _holds(written, phrase):
        raise PromptError(f"{written!r} still holds the phrase {phrase!r}", "give a substitute without it")
    if not written.strip():
        raise PromptError(f"nothing is left of prompt {prompt!r}", "give a substitute for the phrase")
    return written


def phrase_prompts(retained: Sequence[str], forget: Sequence[str], phrase: str, substitute: str) -> Prompts:
    """Forget a concept by name: each forget prompt's override is itself with ``substitute`` for ``phrase``.

    Raises:
        PromptError: no prompts, a forget prompt without the phrase, or a retained one with it, which would
            teach the concept anew.
    """
    _require_some("retained prompt", retained)
    _require_some("forget prompt", forget)
    overrides = [rewrite(prompt, phrase, substitute) for prompt in forget]
    if spoilt := next((prompt for prompt in retained if _holds(prompt, phrase)), None):
        raise PromptError(
            f"retained prompt {spoilt!r} holds the phrase {phrase!r}", "leave it out: it would teach the concept anew"
        )
    return _number(retained, dict(zip(forget, overrides, strict=True)))


def negative_prompts(retained: Sequence[str], subjects: Sequence[str], keywords: Sequence[str]) -> Prompts:
    """Forget an attribute: every keyword before every subject, and behind it after a comma, becomes the bare subject.

    The override prompts' negative prompt is the line of all keywords.

    Raises:
        PromptError: no prompts, subjects or keywords, or a retained prompt that is one to forget.
    """
    for kind, texts in (("retained prompt", retained), ("subject", subjects), ("keyword", keywords)):
        _require_some(kind, texts)
    keywords = tuple(dict.fromkeys(keywords))
    forget = {
        prompt: subject
        for subject in subjects
        for keyword in keywords
        for prompt in (f"{keyword} {subject}", f"{subject}, {keyword}")
    }
    if spoilt := next((prompt for prompt in (*retained, *subjects) if prompt in forget), None):
        raise PromptError(f"prompt {spoilt!r} is retained and to be forgotten", "leave it out of one of the two")
    return _number(retained, forget, ", ".join(keywords))


def _number(retained: Iterable[str], forget: dict[str, str], negative: str | None = None) -> Prompts:
    """Texts in the order of first mention, the empty prompt first."""
    numbers: dict[str, int] = {"": 0}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    kept = tuple(dict.fromkeys(number(text) for text in retained))
    mapping = {number(text): number(override) for text, override in forget.items()}
    negatives = {} if negative is None else {override: number(negative) for override in mapping.values()}
    return Prompts(texts=tuple(numbers), retained=kept, forget=mapping, negatives=negatives)


def _require_some(kind: str, texts: Sequence[str]) -> None:
    if not texts:
        raise PromptError(f"no {kind} is given", f"give a list of them, one {kind} a line")
    if not all(text.strip() for text in texts):
        raise PromptError(f"a {kind} is empty", "leave it out: the empty prompt is always among the conditions")


def _holds(prompt: str, phrase: str) -> bool:
    return re.search(re.escape(_composed(phrase)), _composed(prompt), re.IGNORECASE) is not None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _not_text(file: Path, where: str) -> PromptError:
    return PromptError(f"{file}: not UTF-8 text ({where})", "save it as UTF-8")
