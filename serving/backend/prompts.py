"""A served model of prompts: tokens, then three graphs in a chain. Copied into model repositories as ``drawing.py``.

Tokens are those of transformers' ``CLIPTokenizer``, which stock pipelines use, without transformers. Its
``CLIPTokenizerFast`` gives others where ftfy mends a text: curly quotes, ligatures, full width, wrong encodings.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex  # type: ignore[import-untyped]  # it ships no types
from numpy.typing import NDArray
from tokenizers import Tokenizer  # type: ignore[import-untyped]  # it ships no types

PARTS = ("text_encoder", "unet", "vae_decoder")
# CLIP's words. Not left to the tokenizer's own splitter, whose tables are of an older Unicode.
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


class Drawing:
    """Draws prompts; ``open_graph`` makes a session of a graph's file."""

    asked_for = "prompt"

    def __init__(self, folder: Path, facts: dict[str, Any], open_graph: Callable[[Path], Any]) -> None:
        self.tokens = Tokens(folder / "tokenizer.json", **facts["tokens"])
        self.latent_shape = tuple(facts["latent_shape"])
        self.graphs = {part: open_graph(folder / part / "model.onnx") for part in PARTS}

    def fault(self, prompts: NDArray[np.object_]) -> str | None:
        """What is wrong with a request's prompts, in one sentence, or None."""
        for prompt in prompts:
            try:
                text = prompt.decode()
            except UnicodeDecodeError as error:
                return f"prompt: {prompt[:40]!r} is not UTF-8 (byte {error.start})"
            if (count := len(self.tokens.of(text))) > self.tokens.limit:
                named = textwrap.shorten(text, 80, placeholder="…")
                return (
                    f"prompt: {named!r} has {count} tokens, start and end included; "
                    f"the text encoder reads {self.tokens.limit}"
                )
        return None

    def draw(self, prompts: NDArray[np.object_], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (B, 3, H, W) in [-1, 1]; each distinct prompt is encoded once."""
        distinct, places = np.unique(prompts, return_inverse=True)
        numbers = np.array([self.tokens.filled(prompt.decode()) for prompt in distinct], np.int32)
        encoded = self._run("text_encoder", input_ids=numbers)[places]
        # The U-Net's noise level is a constant: it reads no timestep.
        clean = self._run("unet", sample=noise, timestep=np.array(0, np.float32), encoder_hidden_states=encoded)
        return self._run("vae_decoder", latent_sample=clean)

    def _run(self, part: str, **feeds: NDArray[Any]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = self.graphs[part].run(None, feeds)[0]
        return output


class Tokens:
    """Token numbers of texts. ``file`` holds the byte pairs; the rest is what they do not say.

    Args:
        limit: how many numbers the text encoder reads; ``filler`` fills up a shorter text.
        start: the first number of every text; ``end`` is the last.
        marks: texts that are one token wherever they stand, before anything is mended.
    """

    def __init__(self, file: Path, limit: int, filler: int, start: int, end: int, marks: dict[str, int]) -> None:
        self.limit, self.filler, self.start, self.end, self.marks = limit, filler, start, end, marks
        self.pairs = Tokenizer.from_file(str(file))
        self.at_marks = re.compile(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})")

    def of(self, text: str) -> list[int]:
        """All of a text's token numbers, start and end included."""
        parts = (
            [self.marks[part]] if part in self.marks else self._of_words(part) for part in self.at_marks.split(text)
        )
        return [self.start, *chain.from_iterable(parts), self.end]

    def filled(self, text: str) -> list[int]:
        """The ``limit`` numbers that the text encoder is given."""
        numbers = self.of(text)
        return numbers + [self.filler] * (self.limit - len(numbers))

    def _of_words(self, text: str) -> list[int]:
        words = WORD.findall(" ".join(ftfy.fix_text(text).split()).lower())
        numbers: list[int] = self.pairs.encode(words, is_pretokenized=True, add_special_tokens=False).ids
        return numbers
