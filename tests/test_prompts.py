from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfd_deploy.errors import BAD_INPUT, ConfigError, PromptError, RunError
from sfd_deploy.phrases import rewrite
from sfd_deploy.prompt_lists import read_prompts
from sfd_deploy.prompts import Prompts, negative_prompts, phrase_prompts, prompts_in

RETAINED = ("a photo of a red bag", "a blue coat")


def written(folder: Path, content: bytes) -> Path:
    file = folder / "prompts.txt"
    file.write_bytes(content)
    return file


def texts(prompts: Prompts, numbers: dict[int, int]) -> dict[str, str]:
    return {prompts.texts[key]: prompts.texts[value] for key, value in numbers.items()}


def test_a_prompt_a_line_blank_lines_and_outer_spaces_dropped(tmp_path):
    file = written(tmp_path, "\ufeffa red bag\r\n\n   \n  a crêpe pan \na red bag\n".encode())
    assert read_prompts(file) == ("a red bag", "a crêpe pan", "a red bag")


def test_an_accent_is_one_prompt_however_it_is_spelled(tmp_path):
    assert read_prompts(written(tmp_path, "cafe\u0301".encode())) == ("caf\u00e9",)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "no prompt in it"),
    (b" \n\t\r\n", "no prompt in it"),
    ("ein gr\u00fcner Mantel".encode("latin-1"), r"not UTF-8 text \(byte 6\)"),
    ("a bag".encode("utf-16"), "not UTF-8 text"),
    ("a bag".encode("utf-16-le"), r"not UTF-8 text \(a zero byte\)"),
])  # fmt: skip
def test_an_empty_file_or_one_that_is_not_utf8_is_one_line(tmp_path, content, said):
    with pytest.raises(PromptError, match=rf"prompts\.txt: {said}") as caught:
        read_prompts(written(tmp_path, content))
    assert caught.value.exit_code == BAD_INPUT
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "missing.txt")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path)


def test_every_occurrence_is_rewritten_whatever_its_case():
    assert rewrite("A Sandal beside a SANDAL", "sandal", "sneaker") == "A sneaker beside a sneaker"
    assert rewrite("STRAßE", "straße", "road") == "road"


@pytest.mark.parametrize("phrase", ["c++ (new)", "a.b*", "[x", "$", "50%?", r"\d"])
def test_a_concept_with_characters_of_a_regular_expression_is_taken_literally(phrase):
    assert rewrite(f"a photo of {phrase}, today", phrase, r"\1 \g<0>") == r"a photo of \1 \g<0>, today"
    with pytest.raises(PromptError, match="does not hold the phrase"):
        rewrite("a photo of c, aab, x, 500 and 7", phrase, "it")


WORDS = st.text(alphabet="aB ,-\u00a0", max_size=8)


@given(st.text(alphabet="aB", min_size=1, max_size=3), st.text(alphabet="xyz", min_size=1), WORDS, WORDS)
def test_what_is_rewritten_no_longer_holds_the_phrase(phrase, substitute, before, after):
    try:
        out = rewrite(before + phrase + after, phrase, substitute)
    except PromptError:
        return
    assert phrase.casefold() not in re.findall(r"\w+", out.casefold())
    assert substitute in out


@pytest.mark.parametrize("spaced", ["brad  pitt", "Brad\u00a0Pitt", "BRAD\tPITT"])
def test_a_phrase_is_found_however_its_words_are_spaced(spaced):
    assert rewrite(f"a photo of {spaced}, smiling", "brad pitt", "a man") == "a photo of a man, smiling"
    assert rewrite("a photo of brad pitt, smiling", spaced, "a man") == "a photo of a man, smiling"
    with pytest.raises(PromptError, match="holds the phrase 'brad pitt'"):
        phrase_prompts([f"{spaced} on a beach"], ["brad pitt"], "brad pitt", "a man")


def test_a_phrase_is_whole_words():
    assert rewrite("a hundred red cars", "red", "blue") == "a hundred blue cars"
    assert phrase_prompts(["a cherry tree"], ["Cher sings"], "Cher", "a woman").retained == (1,)
    with pytest.raises(PromptError, match="'a cherry tree' does not hold the phrase 'Cher'"):
        phrase_prompts(["a bag"], ["a cherry tree"], "Cher", "a woman")


@pytest.mark.parametrize("prompt", ["two sandals", "the sandal's strap", "the sandal\u2019s strap"])
def test_a_plural_or_possessive_holds_the_phrase_and_stays_one(prompt):
    assert rewrite(prompt, "sandal", "sneaker") == prompt.replace("sandal", "sneaker")
    with pytest.raises(PromptError, match="holds the phrase 'sandal'"):
        phrase_prompts([prompt], ["a sandal"], "sandal", "sneaker")


def test_a_phrase_of_signs_is_found_beside_words():
    assert rewrite("50$ or c++11", "$", "euro") == "50euro or c++11"
    assert rewrite("50$ or c++11", "c++", "c") == "50$ or c11"


def test_an_accent_is_one_forget_prompt_however_it_is_spelled():
    prompts = phrase_prompts(["a bag"], ["a caf\u00e9", "a cafe\u0301"], "cafe\u0301", "bar")
    assert texts(prompts, prompts.forget) == {"a caf\u00e9": "a bar"}
    assert prompts.phrases == ("caf\u00e9",)


@pytest.mark.parametrize(("prompt", "phrase", "substitute", "said"), [
    ("a photo of a boot", "sandal", "sneaker", "prompt 'a photo of a boot' does not hold the phrase 'sandal'"),
    ("a photo of a boot", "  ", "sneaker", r"the phrase to forget \(--concept\) is empty"),
    ("a sandal", "sandal", "Sandal like shoe", "still holds the phrase"),
    ("a sandal", "sandal", "sandal", "still holds the phrase"),
    ("sandal", "sandal", " ", "nothing is left of prompt 'sandal'"),
])  # fmt: skip
def test_a_phrase_that_is_absent_empty_or_still_there_is_refused(prompt, phrase, substitute, said):
    with pytest.raises(PromptError, match=said):
        rewrite(prompt, phrase, substitute)


def test_the_phrase_recipe_maps_each_forget_prompt_to_its_rewriting():
    prompts = phrase_prompts(RETAINED, ["a red sandal", "Sandal on grey"], "sandal", "sneaker")
    assert texts(prompts, prompts.forget) == {"a red sandal": "a red sneaker", "Sandal on grey": "sneaker on grey"}
    assert tuple(prompts.texts[number] for number in prompts.retained) == RETAINED
    assert prompts.texts[prompts.unconditional] == ""
    assert prompts.negatives == {}
    assert prompts.count == len(prompts.texts) == len(set(prompts.texts)) == 7


def test_an_override_that_is_also_retained_and_a_repeated_prompt_are_one_condition():
    prompts = phrase_prompts(["a red sneaker", "a bag", "a red sneaker"], ["a red sandal"] * 2, "sandal", "sneaker")
    assert prompts.texts == ("", "a red sneaker", "a bag", "a red sandal")
    assert (prompts.retained, prompts.forget) == ((1, 2), {3: 1})


def test_a_retained_prompt_with_the_concept_is_refused():
    with pytest.raises(PromptError, match="retained prompt 'Two SANDALS' holds the phrase 'sandal'"):
        phrase_prompts(["a bag", "Two SANDALS"], ["a sandal"], "sandal", "sneaker")


def test_all_spoilt_prompts_are_counted_and_the_first_few_named():
    spoilt = [f"sandal {number}" for number in range(5)]
    said = "5 retained prompts hold the phrase 'sandal': 'sandal 0', 'sandal 1', 'sandal 2' and 2 more; leave them out"
    with pytest.raises(PromptError, match=said):
        phrase_prompts(["a bag", *spoilt], ["a sandal"], "sandal", "sneaker")


@pytest.mark.parametrize("lists", [([], ["a sandal"]), (["a bag"], []), (["a bag", " "], ["a sandal"])])
def test_no_or_empty_prompts_are_refused(lists):
    with pytest.raises(PromptError, match=r"(retained|forget) prompt"):
        phrase_prompts(*lists, "sandal", "sneaker")


def test_the_negative_recipe_puts_each_keyword_before_and_behind_each_subject():
    prompts = negative_prompts(RETAINED, ["a bag", "a coat"], ["torn", "bent"])
    assert texts(prompts, prompts.forget) == {
        "torn a bag": "a bag", "a bag, torn": "a bag", "bent a bag": "a bag", "a bag, bent": "a bag",
        "torn a coat": "a coat", "a coat, torn": "a coat", "bent a coat": "a coat", "a coat, bent": "a coat",
    }  # fmt: skip
    assert texts(prompts, prompts.negatives) == dict.fromkeys(
        (*texts(prompts, prompts.forget), "a bag", "a coat"), "torn, bent"
    )
    assert prompts.phrases == ("torn", "bent")


def test_bare_subjects_are_retained_away_from_the_keywords_and_no_other_retained_prompt_is():
    prompts = negative_prompts(["a green bag", "a coat"], ["a {keyword} bag", "a coat"], ["red"])
    assert [prompts.texts[prompt] for prompt in prompts.retained] == ["a green bag", "a coat", "a bag"]
    kept = {prompt: away for prompt, away in prompts.negatives.items() if prompt in prompts.retained}
    assert texts(prompts, kept) == {"a bag": "red", "a coat": "red"}


def test_a_subject_may_be_retained_and_nothing_with_a_keyword_may():
    retained = ("a bag", "a photo of a blue car")
    prompts = negative_prompts(retained, ["a bag"], ["red"])
    assert prompts.texts[1:] == (*retained, "red a bag", "a bag, red", "red")
    assert [prompts.texts[prompt] for prompt in prompts.retained] == list(retained)
    with pytest.raises(PromptError, match="retained prompt 'a RED bag on a beach' holds the phrase 'red'"):
        negative_prompts(["a RED bag on a beach"], ["bag"], ["red"])
    with pytest.raises(PromptError, match="subject 'red bag' holds the phrase 'red'"):
        negative_prompts(["a coat"], ["bag", "red bag"], ["red"])


@pytest.mark.parametrize(("subjects", "keywords", "said"), [
    ([], ["red"], "no subject is given"),
    (["bag"], [], "no keyword is given"),
    (["bag"], ["red", " "], "a keyword is empty"),
])  # fmt: skip
def test_no_or_empty_subjects_and_keywords_are_refused(subjects, keywords, said):
    with pytest.raises(PromptError, match=said):
        negative_prompts(RETAINED, subjects, keywords)


@pytest.mark.parametrize(("change", "said"), [
    ({"texts": ["", "a", "a"]}, "a text is there twice"),
    ({"forget": {"2": 3}}, "prompt 3 is out of range: there are 3"),
    ({"retained": [-1]}, "prompt -1 is out of range"),
    ({"negatives": {"2": 7}}, "prompt 7 is out of range"),
    ({"texts": ["", "a", "b", "c"], "negatives": {"3": 2}}, "prompt 'c' has a negative prompt and is in neither part"),
    ({"phrases": ["a", " "]}, "a phrase is empty"),
    ({"unconditional": 1}, "not the empty prompt"),
    ({"retained": [1, 2]}, "forget prompt 'b' is also retained or an override"),
    ({"forget": {"2": 2}}, "forget prompt 'b' is also retained or an override"),
])  # fmt: skip
def test_recorded_prompts_that_contradict_themselves_are_one_line(change, said):
    recorded = {"texts": ["", "a", "b"], "retained": [1], "forget": {"2": 1}}
    assert Prompts.from_mapping(recorded, "facts").forget == {2: 1}
    with pytest.raises(ConfigError, match=said):
        Prompts.from_mapping(recorded | change, "facts")


def test_prompts_survive_a_manifest():
    prompts = negative_prompts(RETAINED, ["a bag"], ["torn"])
    assert Prompts.from_mapping(prompts.resolved(), "facts") == prompts


def test_a_keyword_goes_where_its_subject_says_and_leaves_no_gap():
    prompts = negative_prompts(RETAINED, ["a {keyword} coat on a chair", "coats in {keyword}", "a bag"], ["torn"])
    asked = {prompts.texts[prompt]: prompts.texts[override] for prompt, override in prompts.forget.items()}
    assert asked == {
        "a torn coat on a chair": "a coat on a chair", "coats in torn": "coats in", "torn a bag": "a bag",
        "a bag, torn": "a bag",
    }  # fmt: skip
    with pytest.raises(PromptError, match="a subject is empty"):
        negative_prompts(RETAINED, ["{keyword}"], ["torn"])
    with pytest.raises(PromptError, match="holds the phrase 'torn'"):
        negative_prompts(RETAINED, ["a {keyword} coat, torn"], ["torn"])


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_prompts_file_that_is_no_json_is_one_line(tmp_path, content):
    (tmp_path / "prompts.json").write_bytes(content)
    with pytest.raises(RunError, match="not readable JSON"):
        prompts_in(tmp_path)
