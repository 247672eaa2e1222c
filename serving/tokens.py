"""The tokenizer of a served model of prompts: transformers' own made into what the python back end loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfd_deploy.errors import BackendError, ModelError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.text.tokens import read_tokenizer, token_numbers
from sfd_deploy.prompts import prompts_in

TOKENIZER = "tokenizer.json"


def write_tokenizer(artefact: Sealed, file: Path) -> dict[str, Any]:
    """Write the byte pairs of the artefact's tokenizer; returns what else ``backend.prompts.Tokens`` is made with.

    Raises:
        ModelError: the two give another number for a prompt that the artefact was trained with.
        BackendError: a package is not installed.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # type: ignore[import-untyped]  # it ships no types
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    tokenizer = read_tokenizer(artefact.folder / "tokenizer")
    pairs = convert_slow_tokenizer(tokenizer)
    # Texts are mended and split into words before; what is converted does both in another way.
    pairs.normalizer = None
    pairs.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    pairs.add_special_tokens([tokenizer.bos_token, tokenizer.eos_token])
    pairs.save(str(file))
    facts = {
        "limit": tokenizer.model_max_length, "filler": tokenizer.pad_token_id, "start": tokenizer.bos_token_id,
        "end": tokenizer.eos_token_id, "marks": dict(tokenizer.added_tokens_encoder),
    }  # fmt: skip
    _require_same_numbers(artefact, file, facts)
    return facts


def _require_same_numbers(artefact: Sealed, file: Path, facts: dict[str, Any]) -> None:
    try:
        from sfd_deploy.serving.backend.prompts import Tokens
    except ImportError as error:  # transformers does without ftfy, and then reads some texts otherwise
        raise BackendError(
            f"serving prompts needs {error.name}, which is not installed", "pip install 'sfd-deploy[t2i]'"
        ) from None
    tokens, texts = Tokens(file, **facts), prompts_in(artefact.folder).texts
    expected = token_numbers(read_tokenizer(artefact.folder / "tokenizer"), texts).tolist()
    for text, numbers in zip(texts, expected, strict=True):
        if tokens.filled(text) != numbers:
            raise ModelError(
                f"{artefact.folder / 'tokenizer'}: for {text!r} the served tokenizer gives other tokens",
                "install the packages of constraints/tested.txt",
            )
