"""Prompts to token numbers, as stock pipelines make them, but never cut. No torch here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError, ModelError, PromptError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a pipeline's ``tokenizer/``.

    Raises:
        ModelError: it cannot be loaded.
        BackendError: transformers is not installed.
    """
    kind = transformers().CLIPTokenizer
    try:
        tokenizer: CLIPTokenizer = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded ({reason})", "save it with its save_pretrained(FOLDER)"
        ) from None
    return tokenizer


def require_within_limit(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> None:
    """Refuse a text that stock pipelines would cut.

    Raises:
        PromptError: naming it and how many tokens it has.
    """
    limit = tokenizer.model_max_length
    for text, tokens in zip(texts, tokenizer(list(texts), verbose=False).input_ids, strict=True):
        if len(tokens) > limit:
            named = textwrap.shorten(text, 80, placeholder="…")
            raise PromptError(
                f"prompt {named!r} has {len(tokens)} tokens, start and end included; the text encoder reads {limit}",
                "shorten it",
            )


def token_numbers(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> NDArray[np.int32]:
    """What the text encoder is given, (N, L) int32, filled up to its length.

    Raises:
        PromptError: a text is longer than the text encoder reads.
    """
    require_within_limit(tokenizer, texts)
    padded = tokenizer(list(texts), padding="max_length", max_length=tokenizer.model_max_length)
    return np.array(padded.input_ids, dtype=np.int32)


def transformers() -> Any:
    """The transformers package.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import transformers as package
    except ImportError:
        raise BackendError(
            "text-to-image models need transformers, which is not installed", "pip install 'sfd-deploy[t2i]'"
        ) from None
    return package
