"""Served prompts have the token numbers that stock pipelines give them, whatever is in the text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import CLIPTokenizer, CLIPTokenizerFast

from sfd_deploy.errors import BackendError, ModelError
from sfd_deploy.runs import write_json
from sfd_deploy.serving import tokens as served_tokens
from sfd_deploy.serving.backend import prompts as backend
from sfd_deploy.serving.install import REQUIREMENTS
from sfd_deploy.training.text_teacher.tokenizer import train_tokenizer
from tests.export.text_runs import PROMPTS, exported_text_run
from tests.serving.fixtures import REPOSITORY_ROOT
from tests.text_world import TOKENS, WORDS, clip_tokenizer


def byte_pairs(folder: Path) -> None:
    clip_tokenizer(folder)


def filled_up_with_a_mark_of_its_own(folder: Path) -> None:
    """As SD 2.x has it: "!" is one token wherever it stands."""
    clip_tokenizer(folder)
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPTokenizer(*files, model_max_length=TOKENS, pad_token="!").save_pretrained(folder)


def of_a_small_teacher(folder: Path) -> None:
    train_tokenizer(WORDS, TOKENS).save_pretrained(folder)


MAKERS = (byte_pairs, filled_up_with_a_mark_of_its_own, of_a_small_teacher)


@cache
def both(make: Callable[[Path], None]) -> tuple[CLIPTokenizer, backend.Tokens]:
    """A stock tokenizer, and the served one that was made from its folder."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        make(folder / "tokenizer")
        write_json(folder / "prompts.json", PROMPTS.resolved())
        facts = served_tokens.write_tokenizer(SimpleNamespace(folder=folder), folder / "tokenizer.json")  # type: ignore[arg-type]
        stock = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        return stock, backend.Tokens(folder / "tokenizer.json", **facts)


ODD = (
    "", " ", "a\t RED\n\u00a0 Sandal ", "café", "cafe\u0301", "ÀÉÎØ", "ΣΊΣΥΦΟΣ", "İstanbul", "it's, they'RE; a dog!!!",
    "wow! ！", "“curly” ‘quotes’", "ﬁne", "Ｆｕｌｌ", "schÃ¶n", "&lt;b&gt; &amp;", "👩‍🚀🚀", "x\u200by", "漢字 12345",
    "½ ² ٣", "\0a", "'ſ", "\u0345b", "!<|startoftext|>!", "a <|ENDOFTEXT|>b", "&lt;|endoftext|&gt;", "x" * 300,
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_the_numbers_that_transformers_gives(make: Callable[[Path], None], text: str):
    stock, served = both(make)
    assert served.of(text) == stock(text, verbose=False).input_ids


@pytest.mark.parametrize("make", MAKERS)
@given(text=st.lists(st.one_of(st.characters(codec="utf-8"), st.sampled_from(["<|endoftext|>", "'s", "red", " "]))))
@example(text=["\u209f", "b"])  # a splitter with an older Unicode table parts these
def test_any_text_has_the_numbers_that_transformers_gives(make: Callable[[Path], None], text: list[str]):
    stock, served = both(make)
    assert served.of("".join(text)) == stock("".join(text), verbose=False).input_ids


@pytest.mark.parametrize("make", MAKERS)
def test_a_short_text_is_filled_up_and_the_longest_is_whole(make: Callable[[Path], None]):
    stock, served = both(make)
    for text in ("", "a red bag", "red " * (TOKENS - 2)):
        assert served.filled(text) == stock(text, padding="max_length", max_length=TOKENS).input_ids
    assert len(served.of("red " * (TOKENS - 2))) == TOKENS


def test_the_fast_tokenizer_of_transformers_would_not_do():
    with TemporaryDirectory() as place:
        clip_tokenizer(Path(place))
        fast = CLIPTokenizerFast.from_pretrained(place, from_slow=True)
    stock, served = both(byte_pairs)
    assert fast("“a”").input_ids != stock("“a”").input_ids == served.of("“a”")


def test_a_served_tokenizer_that_parts_words_otherwise_is_refused_naming_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backend, "WORD", regex.compile(r"\S"))
    artefact = exported_text_run("sd2")[1]["onnx-cpu-fp32"]
    with pytest.raises(ModelError, match=r"tokenizer: for 'a green bag' the served tokenizer gives other tokens"):
        served_tokens.write_tokenizer(artefact, tmp_path / "tokenizer.json")


def test_a_missing_package_is_one_line_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, backend.__name__)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    artefact = exported_text_run("sd2")[1]["onnx-cpu-fp32"]
    with pytest.raises(BackendError, match=r"needs ftfy, which is not installed; pip install 'sfd-deploy\[t2i\]'"):
        served_tokens.write_tokenizer(artefact, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("package", ["tokenizers", "regex", "ftfy", "wcwidth"])
def test_the_server_has_the_versions_that_were_tested(package: str):
    pins = [
        re.findall(rf"^{package}==(\S+)$", file.read_text(), re.MULTILINE)
        for file in (REQUIREMENTS, REPOSITORY_ROOT / "constraints" / "tested.txt")
    ]
    assert len(pins[0]) == 1
    assert pins[0] == pins[1]
