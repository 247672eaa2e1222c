from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sfd_deploy.training.text_teacher.captions import HELD_OUT, captions
from sfd_deploy.training.text_teacher.tokenizer import learn_merges, train_tokenizer, words_of

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXTS = tuple(found.text for found in captions())


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(TEXTS, 24)


def test_merges_are_those_of_the_paper_s_example():
    """Sennrich et al., arXiv 1508.07909, section 3.2: es, est, lo, low; the end of word is part of the last letter."""
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    merges = learn_merges(words)
    assert merges[:3] == [("e", "s"), ("es", "t</w>"), ("l", "o")]
    assert ("lo", "w</w>") in merges


def test_equally_frequent_pairs_are_merged_by_spelling_whatever_their_order():
    assert learn_merges(["cd", "ab"]) == learn_merges(["ab", "cd"]) == [("a", "b</w>"), ("c", "d</w>")]


def test_each_word_of_a_caption_is_one_token(tokenizer):
    for text in TEXTS:
        assert tokenizer.tokenize(text) == [f"{word}</w>" for word in words_of(text)]


def test_a_prompt_is_framed_and_filled_up_as_clip_s(tokenizer):
    tokens = tokenizer("", padding="max_length").input_ids
    assert (len(tokens), tokens[0], set(tokens[1:])) == (24, tokenizer.bos_token_id, {tokenizer.eos_token_id})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)


@given(st.text())
def test_any_text_has_tokens_and_none_is_unknown(tokenizer, text):
    # What stands for unknown is the end's token, as in CLIP: a text that spells it, in any case, has it.
    assume(tokenizer.unk_token not in text.lower())
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


def test_misspelt_and_foreign_words_come_back_from_their_tokens(tokenizer):
    for text in ("a read drress", "ein rotes kleid", "красное платье", "naïve"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_held_out_prompts_fit(tokenizer):
    longest = max((found.text for found in captions(HELD_OUT)), key=lambda text: len(tokenizer(text).input_ids))
    assert len(tokenizer(longest).input_ids) <= 24, longest


def test_the_saved_tokenizer_is_the_same_to_both_of_transformers_readers(tokenizer, tmp_path: Path):
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    tokenizer.save_pretrained(tmp_path)
    texts = [*TEXTS[:40], *(found.text for found in captions(HELD_OUT)[::40]), "Sandals, 12!"]
    for reader in (CLIPTokenizer, CLIPTokenizerFast):
        opened = reader.from_pretrained(tmp_path)
        assert opened.model_max_length == 24
        assert opened(texts, padding="max_length").input_ids == tokenizer(texts, padding="max_length").input_ids
