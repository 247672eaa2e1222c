"""What coloured Fashion-MNIST is called: objects, colours, backgrounds, and the sentences that name them.

``TEMPLATES`` are what a teacher is trained on and what forgetting may train on; ``HELD_OUT`` says the same
in other words, is trained on by nothing, and is what forgetting is measured with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

RGB = tuple[int, int, int]

# In the label order of Fashion-MNIST. No name holds another, or rewriting "shirt" would hit "t-shirt" too.
OBJECTS = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COLOURS: Mapping[str, RGB] = {
    "red": (225, 35, 35), "green": (40, 175, 70), "blue": (50, 90, 235), "yellow": (245, 220, 50),
    "purple": (160, 60, 200), "white": (255, 255, 255),
}  # fmt: skip
BACKGROUNDS: Mapping[str, RGB] = {"black": (0, 0, 0), "grey": (105, 105, 105)}

# Some are silent on the colour or the object: a subject without its attribute, and an attribute by itself,
# are what forgetting by negative prompt asks a teacher for.
TEMPLATES = (
    "{colour} {object}",
    "a {colour} {object}",
    "a photo of a {colour} {object}",
    "a {colour} {object} on a {background} background",
    "a photo of a {colour} {object} on a {background} background",
    "a {object} in {colour}",
    "a {object}",
    "a photo of a {object}",
    "a {object} on a {background} background",
    "something {colour} on a {background} background",
)
# Other wordings, which the teacher was not trained on: the shipped recipes ask for these too, so that what a
# generator forgets is the word and not the caption.
PARAPHRASES = (
    "her {object}",
    "some {object}",
    "look at a {object}",
    "a sketch of a {object}",
    "we see a {object}",
    "that {colour} {object}",
    "his {colour} {object}",
    "give me a {colour} {object}",
    "a drawing of a {colour} {object}",
    "there is a {colour} {object}",
    "an all {colour} {object}",
    "a {object} which is {colour}",
    "a {object} dyed {colour}",
    "the {object}, all {colour}",
    "{colour}: a {object}",
    "her {object} is {colour}",
    "a {colour} {object}, {background} behind it",
    "on {background}, a {colour} {object}",
)
# Longer ones, for the recipes too: a concept hides among other words.
LONGER = (
    "a {object}, a {colour} {object}",
    "a photo of a {colour} {object}, a {object} on a {background} background",
    "a {background} background, a {colour} {object}",
    "something {colour}: a photo of a {colour} {object}",
    "a {colour} {object} and a {colour} {object} on a {background} background",
    "a photo in {colour}, a photo of a {object}",
    "a {object}, something in {colour}, a {background} background",
    "a photo of a photo of a {colour} {object}",
    "{colour} on {background}, a {object} in {colour} on {background}",
    "a photo of a {object} in {colour}, a photo on a {background} background",
    "a {object} and a {object} and a {colour} {object}",
    "a photo of something {colour} and of a {object}",
)
# Wordings that neither a teacher nor a recipe ever asks for: the measurement's.
HELD_OUT = (
    "{object}",
    "the {object}",
    "show me a {object}",
    "a picture of one {object}",
    "an image of a {object}",
    "i want a {object}",
    "one {object} please",
    "here is my {object}",
    "this is a {object}",
    "the photo shows a {object}",
    "the {colour} {object}",
    "this {colour} {object}",
    "my {colour} {object}",
    "one {colour} {object} please",
    "show me a {colour} {object}",
    "i want a {colour} {object}",
    "draw a {colour} {object}",
    "an image of a {colour} {object}",
    "a picture of one {colour} {object}",
    "this is a {colour} {object}",
    "a {colour} toned {object}",
    "a very {colour} {object}",
    "the {object} is {colour}",
    "my {object} is {colour}",
    "a {object} that is {colour}",
    "a {object} painted {colour}",
    "a {object} of {colour} cloth",
    "{object}, {colour}",
    "{colour}, a {object}",
    "a photo of the {object} in {colour}",
    "a {colour} {object} by a {background} wall",
    "in front of {background}, a {colour} {object}",
    "all {colour}",
    "a {colour} thing",
)


class Caption(NamedTuple):
    """A sentence and the words in it; None where it is silent."""

    text: str
    object: str | None
    colour: str | None
    background: str | None

    def names(self, concept: str) -> bool:
        """Whether it names ``concept``, an object or a colour."""
        return concept in (self.object, self.colour)


def caption(template: str, object_name: str, colour: str, background: str) -> Caption:
    """``template`` with its words filled in, "a" become "an" where it must."""
    words = {"object": object_name, "colour": colour, "background": background}
    said = {name: word for name, word in words.items() if f"{{{name}}}" in template}
    text = re.sub(r"\ba (?=[aeiou])", "an ", template.format(**words))
    return Caption(text, said.get("object"), said.get("colour"), said.get("background"))


def captions(templates: tuple[str, ...] = TEMPLATES) -> tuple[Caption, ...]:
    """Every caption that ``templates`` make, each once."""
    return tuple(dict.fromkeys(caption(*words) for words in product(templates, OBJECTS, COLOURS, BACKGROUNDS)))


def forget_prompts(concept: str, templates: tuple[str, ...] = TEMPLATES) -> tuple[str, ...]:
    """The prompts of ``templates`` that name ``concept``: training's, or with ``HELD_OUT`` the measurement's.

    Raises:
        ValueError: no such object or colour.
    """
    _kind_of(concept)
    return tuple(found.text for found in captions(templates) if found.names(concept))


def retained_prompts(concept: str, templates: tuple[str, ...] = TEMPLATES) -> tuple[str, ...]:
    """The prompts of ``templates`` that name another object than the object ``concept``, or another colour.

    One that names neither may be drawn with the concept in it, so it is in neither list.

    Raises:
        ValueError: no such object or colour.
    """
    kind = _kind_of(concept)
    return tuple(found.text for found in captions(templates) if getattr(found, kind) not in (None, concept))


def _kind_of(concept: str) -> str:
    if concept in OBJECTS:
        return "object"
    if concept in COLOURS:
        return "colour"
    raise ValueError(f"{concept!r} is neither an object nor a colour of these captions")
