"""A byte-pair tokenizer in CLIP's layout, learned from captions: any text has tokens, each caption's words have one.

Byte pairs are merged by count (Sennrich et al., arXiv 1508.07909), ties by spelling: the ``tokenizers``
library breaks them by a hash that changes from one process to the next, and a teacher could not be made again.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sfd_deploy.runs import write_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES_HEAD = "#version: 0.2"  # the first line of CLIP's merges.txt, which its reader skips

Pair = tuple[str, str]


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Merges, first to last, until each of ``words``, as often as it is given, is one token."""
    spelled = {(*word[:-1], word[-1] + END_OF_WORD): count for word, count in Counter(words).items()}
    merges: list[Pair] = []
    while pairs := _count_pairs(spelled):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {_merge(word, best): count for word, count in spelled.items()}
    return merges


def _count_pairs(spelled: dict[tuple[str, ...], int]) -> Counter[Pair]:
    pairs: Counter[Pair] = Counter()
    for word, count in spelled.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def _merge(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    merged: list[str] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def vocabulary(merges: list[Pair]) -> dict[str, int]:
    """CLIP's order: every byte, every byte that ends a word, the merges, start and end."""
    from tokenizers.pre_tokenizers import ByteLevel  # type: ignore[import-untyped]  # it ships no types

    letters = sorted(ByteLevel.alphabet())
    ends = [letter + END_OF_WORD for letter in letters]
    tokens = [*letters, *ends, *(first + second for first, second in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def train_tokenizer(captions: Iterable[str], length: int) -> CLIPTokenizer:
    """A stock ``CLIPTokenizer`` whose prompts are ``length`` tokens, start and end included."""
    from transformers import CLIPTokenizer

    merges = learn_merges(word for text in captions for word in words_of(text))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_json(folder / "vocab.json", vocabulary(merges))
        lines = [MERGES_HEAD, *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": CLIPTokenizer.__name__})
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length, pad_token=END)
    return tokenizer


def words_of(text: str) -> list[str]:
    """Lower-case words and marks, as CLIP splits plain ASCII text before it merges anything."""
    return re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower())
