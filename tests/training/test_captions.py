from __future__ import annotations

import pytest

from sfd_deploy.training.kinds import load_config
from sfd_deploy.training.text_config import TextTrainConfig
from sfd_deploy.training.text_inputs import prompts_of
from sfd_deploy.training.text_teacher.captions import (
    COLOURS,
    HELD_OUT,
    LONGER,
    OBJECTS,
    PARAPHRASES,
    TEMPLATES,
    Caption,
    caption,
    captions,
    forget_prompts,
    retained_prompts,
)

CONCEPTS = (*OBJECTS, *COLOURS)
ASKED = (*TEMPLATES, *PARAPHRASES, *LONGER)


def test_a_caption_says_its_words_and_is_silent_on_the_others():
    template = "a photo of a {colour} {object} on a {background} background"
    assert caption(template, "ankle boot", "red", "grey") == Caption(
        "a photo of a red ankle boot on a grey background", "ankle boot", "red", "grey"
    )
    assert caption("a photo of a {object}", "ankle boot", "red", "grey") == Caption(
        "a photo of an ankle boot", "ankle boot", None, None
    )


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_concept_has_twenty_held_out_wordings_and_none_is_a_training_one(concept):
    placeholder = "{object}" if concept in OBJECTS else "{colour}"
    assert sum(placeholder in template for template in HELD_OUT) >= 20
    training, held_out = set(forget_prompts(concept)), set(forget_prompts(concept, HELD_OUT))
    assert len(held_out) >= 20
    assert not held_out & ({found.text for found in captions(ASKED)} | training)


@pytest.mark.parametrize("templates", [TEMPLATES, PARAPHRASES, LONGER, HELD_OUT])
@pytest.mark.parametrize("concept", CONCEPTS)
def test_forget_prompts_hold_the_concept_and_retained_ones_do_not(concept, templates):
    forget, retained = forget_prompts(concept, templates), retained_prompts(concept, templates)
    assert all(concept in prompt for prompt in forget)
    assert not any(concept in prompt for prompt in retained)
    assert len(set(forget)) == len(forget)
    assert len(set(retained)) == len(retained)


def test_prompts_are_counted_as_by_hand():
    # Templates: 4 of object and colour, 2 with the background too, 2 of the object alone, 1 of object and background,
    # 1 of colour and background.
    assert len(forget_prompts("sandal")) == 4 * 6 + 2 * 12 + 2 + 2
    assert len(forget_prompts("red")) == 4 * 10 + 2 * 20 + 2
    assert len(retained_prompts("sandal")) == 9 * len(forget_prompts("sandal"))
    assert len(retained_prompts("red")) == 5 * len(forget_prompts("red"))


def test_what_is_silent_on_the_concept_is_in_neither_list():
    assert "a photo of a dress" not in {*forget_prompts("red"), *retained_prompts("red")}
    silent = "something red on a grey background"
    assert silent in forget_prompts("red")
    assert silent not in {*forget_prompts("sandal"), *retained_prompts("sandal")}


def test_a_word_that_is_neither_object_nor_colour_is_refused():
    for prompts in (forget_prompts, retained_prompts):
        with pytest.raises(ValueError, match="'grey' is neither an object nor a colour"):
            prompts("grey")


def test_the_shipped_object_recipe_forgets_every_caption_of_the_object_and_keeps_every_other_ones():
    preset = load_config("fashion-t2i-sandal")
    assert isinstance(preset, TextTrainConfig)
    by_name = prompts_of(preset)
    asked = {by_name.texts[prompt]: by_name.texts[override] for prompt, override in by_name.forget.items()}
    assert asked["a photo of a red sandal"] == "a photo of a red sneaker"
    assert set(asked) == set(forget_prompts("sandal", ASKED))
    assert {by_name.texts[prompt] for prompt in by_name.retained} == set(retained_prompts("sandal", ASKED))


def test_the_shipped_attribute_recipe_forgets_the_colour_of_every_object_and_keeps_every_other_colour():
    preset = load_config("fashion-t2i-red")
    assert isinstance(preset, TextTrainConfig)
    away = prompts_of(preset)
    asked = {away.texts[prompt]: away.texts[override] for prompt, override in away.forget.items()}
    assert asked["a photo of a red bag on a grey background"] == "a photo of a bag on a grey background"
    assert asked["red dress"] == asked["dress, red"] == "dress"
    # "in red" is the one template whose colour cannot be taken out word by word.
    spoken = {text for text in forget_prompts("red") if not text.endswith("in red")}
    assert {text.replace("a ankle", "an ankle") for text in asked} >= spoken
    assert {away.texts[negative] for negative in away.negatives.values()} == {"red"}
    kept = {away.texts[prompt] for prompt in away.retained}
    assert kept == {*retained_prompts("red", ASKED), *asked.values()}
