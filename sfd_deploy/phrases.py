"""Phrases in prompts: finding one as a tokenizer would read it, and writing another in its place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

from sfd_deploy.errors import PromptError

NAMED: Final = 3  # spoilt prompts that an error names


def rewrite(prompt: str, phrase: str, substitute: str) -> str:
    """``prompt`` with every occurrence of ``phrase`` replaced, as ``holds`` finds it; both are taken literally.

    Raises:
        PromptError: the phrase is empty or absent, or what comes out still holds it.
    """
    prompt, phrase, substitute = (composed(text) for text in (prompt, phrase, substitute))
    if not phrase.strip():
        raise PromptError("the phrase to forget (--concept) is empty", "give the words that name the concept")
    if not holds(prompt, phrase):
        raise PromptError(
            f"prompt {prompt!r} does not hold the phrase {phrase!r}",
            "write the phrase (--concept) as it stands in the forget prompts, or leave that prompt out",
        )
    # A function, since a substitute's backslash would mean something to a regular expression too.
    written = _pattern(phrase).sub(lambda _: substitute, prompt)
    if holds(written, phrase):
        raise PromptError(
            f"{written!r} still holds the phrase {phrase!r}", "give a substitute (--substitute) without it"
        )
    if not written.strip():
        raise PromptError(f"nothing is left of prompt {prompt!r}", "give a substitute (--substitute) for the phrase")
    return written


def holds(prompt: str, phrase: str) -> bool:
    """Whether ``phrase`` stands in ``prompt``: whole words or their plural, in any case, spacing, accents."""
    return _pattern(phrase).search(composed(prompt)) is not None


def require_without(kind: str, texts: Iterable[str], phrases: Iterable[str]) -> None:
    """Refuse ``texts`` that hold what is forgotten: they would teach it anew. ``kind`` says what they are.

    Raises:
        PromptError: how many hold a phrase, and the first few.
    """
    texts = tuple(texts)
    for phrase in phrases:
        pattern = _pattern(phrase)
        if spoilt := [text for text in texts if pattern.search(composed(text))]:
            raise _spoilt(kind, spoilt, phrase)


def composed(text: str) -> str:
    """``text`` as CLIP's tokenizer has it: two spellings of one accent are one."""
    return unicodedata.normalize("NFC", text)


def _spoilt(kind: str, texts: Sequence[str], phrase: str) -> PromptError:
    if len(texts) == 1:
        return PromptError(
            f"{kind} {texts[0]!r} holds the phrase {phrase!r}", "leave it out: it would teach the concept anew"
        )
    named = ", ".join(map(repr, texts[:NAMED])) + (f" and {len(texts) - NAMED} more" if len(texts) > NAMED else "")
    return PromptError(
        f"{len(texts)} {kind}s hold the phrase {phrase!r}: {named}", "leave them out: they would teach the concept anew"
    )


@cache
def _pattern(phrase: str) -> re.Pattern[str]:
    """The phrase's words with any space between them, as a tokenizer has it; of longer words only a plural's."""
    words = composed(phrase).split()
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    # Looked at and not taken: rewritten, a plural stays one.
    behind = r"(?=(?:['\u2019]?s|es)?(?!\w))" if re.search(r"\w$", words[-1]) else ""
    return re.compile(before + r"\s+".join(map(re.escape, words)) + behind, re.IGNORECASE)
