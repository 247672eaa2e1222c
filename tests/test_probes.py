from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sfd_deploy.config import preset_names
from sfd_deploy.errors import ConfigError, LabelError, PromptError, SfdError
from sfd_deploy.labels import MIXTURE
from sfd_deploy.models.text.tokens import require_within_limit
from sfd_deploy.phrases import holds
from sfd_deploy.probes import TRAINING, Families, Probes
from sfd_deploy.prompts import Prompts, negative_prompts, phrase_prompts
from sfd_deploy.training.text_teacher.captions import (
    COLOURS,
    HELD_OUT,
    LONGER,
    OBJECTS,
    PARAPHRASES,
    TEMPLATES,
    caption,
    captions,
    forget_prompts,
    retained_prompts,
)
from sfd_deploy.training.text_teacher.tokenizer import train_tokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "text-to-image.md"
PROMPTS = phrase_prompts(["a bag", "a red coat"], ["a red sandal", "a sandal"], "sandal", "sneaker")
JUDGES = {"one": ("sandal", "sneaker", "bag"), "two": ("bag", "sandal", "sneaker"), "hue": ("red", "blue"),
          "tint": ("red", "blue")}  # fmt: skip
VALUES: dict[str, Any] = {
    "concept": "sandal",
    "families": {"held out": ["the sandal", "one sandal"], "misspelt": ["a sandel"]},
    "override": {"shows": "sneaker", "prompts": ["a sneaker"]},
    "retained": {
        "bags": {"shows": "bag", "prompts": ["a bag", "the bag"]},
        "in red": {"shows": "red", "prompts": ["a red bag"]},
    },
}


def bound(values: dict[str, Any], prompts: Prompts = PROMPTS) -> Families:
    return Probes.from_mapping(values, "probes.yaml").bind(prompts, JUDGES)


def test_a_family_is_a_label_forget_families_first_then_the_override_then_the_retained():
    families = bound(VALUES)
    assert families.class_names == (TRAINING, "held out", "misspelt", "sneaker", "bags", "in red")
    assert families.shows == ("sandal", "sandal", "sandal", "sneaker", "bag", "red")
    assert families.prompts[0] == ("a red sandal", "a sandal")
    assert families.texts[:4] == ("a red sandal", "a sandal", "the sandal", "one sandal")
    assert families.retained == (3, 4, 5)


def test_the_run_s_own_prompts_owe_the_override_and_others_anything_else():
    families = bound(VALUES)
    assert families.forget == {0: 3, 1: MIXTURE, 2: MIXTURE}
    assert [families.override_name(label) for label in range(3)] == ["sneaker", *["anything but sandal"] * 2]
    assert families.overrides == families.overrides_of(1) == (3,)


def test_without_an_override_the_concept_s_judges_decide_which_families_stand_in():
    families = bound({key: value for key, value in VALUES.items() if key != "override"})
    assert families.forget == {0: MIXTURE, 1: MIXTURE, 2: MIXTURE}
    assert [families.class_names[label] for label in families.overrides] == ["bags"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"familes": {}}, "unknown key `familes`; did you mean `families`"),
        ({"families": {"misspelt": []}}, "`families.misspelt`: a family has at least one prompt"),
        ({"families": {"misspelt": [" "]}}, "`families.misspelt`: a prompt is empty"),
        ({"families": {"misspelt": "nowhere"}}, "nowhere: no such prompt list"),
        ({"families": {"bags": ["a sandal"]}}, "two families are named 'bags'"),
        ({"families": {"sneaker": ["a sandal"]}}, "two families are named 'sneaker'"),
        ({"families": {TRAINING: ["a sandal"]}}, "always the run's own forget prompts"),
        ({"override": {"shows": "sandal", "prompts": ["a sneaker"]}}, "'sandal' shows the concept 'sandal'"),
        ({"retained": {}}, "retained"),
        ({"retained": {"x": {"shows": "sandal", "prompts": ["a bag"]}}}, "'x' shows the concept 'sandal'"),
        ({"retained": {"x": {"shows": "bag", "prompts": ["a bag", "two Sandals"]}}}, "'two Sandals' asks for what"),
        ({"retained": {"x": {"shows": "bag", "prompts": ["a sandel"]}}}, "'a sandel' asks for what was forgotten"),
        ({"override": {"shows": "sneaker", "prompts": ["a sandal"]}}, "family 'sneaker': 'a sandal' asks for what"),
        ({"retained": {"x": {"shows": "bag", "prompts": "portraits"}}}, "'a photo of {concept}' asks for what"),
        ({"concept": "sandle"}, "concept: no judge knows the class 'sandle'; did you mean sandal"),
        ({"retained": {"x": {"shows": "blu", "prompts": ["a bag"]}}}, "x: no judge knows .* did you mean blue"),
        ({"teacher": {"guidance": 0.5}}, "teacher.guidance"),
        ({"teacher": {"scale": 2}}, "teacher.scale"),
    ],
)
def test_what_cannot_be_asked_is_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(SfdError, match=message) as error:
        bound(VALUES | changes)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_class_that_one_judge_alone_knows_is_refused():
    with pytest.raises(LabelError, match="in red: judge hue alone knows 'red'"):
        Probes.from_mapping(VALUES, "toy").bind(PROMPTS, {name: JUDGES[name] for name in ("one", "two", "hue")})


def test_nothing_to_draw_in_the_concept_s_place_is_refused():
    values = VALUES | {"override": None, "retained": {"in red": VALUES["retained"]["in red"]}}
    with pytest.raises(ConfigError, match="no family shows what may be drawn in place of sandal"):
        bound(values)


def test_a_run_that_forgot_nothing_is_refused():
    with pytest.raises(PromptError, match="forget nothing"):
        bound(VALUES, Prompts(texts=("", "a bag"), retained=(1,)))


def test_a_family_may_be_a_file_of_prompts(tmp_path):
    (tmp_path / "held-out.txt").write_text("the sandal\n\nmy sandal\n")
    families = bound(VALUES | {"families": {"held out": str(tmp_path / "held-out.txt")}})
    assert families.prompts[1] == ("the sandal", "my sandal")


def test_the_documented_example_can_be_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, prompt in (("held-out", "{concept} smiles"), ("others", "a man"), ("things", "a bridge")):
        (tmp_path / f"{name}.txt").write_text(f"{prompt}\n")
    (example,) = re.findall(r"```yaml\n(# first-last.yaml\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "first-last.yaml").write_text(example)
    prompts = phrase_prompts(["a bridge"], ["a photo of FIRST LAST"], "FIRST LAST", "a middle aged man")
    judges = dict.fromkeys(("large", "small"), ("FIRST LAST", "somebody else", "nobody"))
    families = Probes.load("first-last.yaml", "probes").bind(prompts, judges)
    assert families.concept == "FIRST LAST"
    assert [len(family) for family in families.prompts] == [1, 1, 1, 2, 2, 1, 1]
    assert families.prompts[1] == ("FIRST LAST smiles",)


SHIPPED = {"fashion-t2i-sandal": "sandal", "fashion-t2i-red": "red"}


def shipped(name: str) -> tuple[Probes, Families]:
    """Shipped probes, bound to a run of the recipe that they are for."""
    probes, concept = Probes.load(name, "probes"), SHIPPED[name]
    retained = retained_prompts(concept)
    if concept == "sandal":
        prompts = phrase_prompts(retained, forget_prompts(concept), concept, "sneaker")
    else:
        subjects = [caption("a {object}", thing, "red", "black").text for thing in OBJECTS]
        prompts = negative_prompts(retained, subjects, [concept])
    judges = {f"{axis} {number}": names for axis, names in (("object", OBJECTS), ("colour", tuple(COLOURS)))
              for number in (1, 2)}  # fmt: skip
    return probes, probes.bind(prompts, judges)


def test_both_shipped_probes_are_tested_here():
    assert set(SHIPPED) == set(preset_names("probes"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_held_out_prompts_are_all_there_are_and_none_is_a_training_one(name: str):
    probes, concept = Probes.load(name, "probes"), SHIPPED[name]
    held_out = set(probes.families["held-out paraphrases"])
    assert held_out == set(forget_prompts(concept, HELD_OUT))
    assert len(held_out) >= 20
    recipes = {found.text for found in captions((*PARAPHRASES, *LONGER))}
    training = recipes | {found.text for found in captions(TEMPLATES)}
    assert not training & set().union(*map(set, probes.families.values()))
    assert not recipes & set().union(*(family.prompts for family in probes.kept.values()))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_longer_prompts_hold_the_concept_and_misspelt_ones_do_not(name: str):
    families, concept = Probes.load(name, "probes").families, SHIPPED[name]
    assert all(holds(prompt, concept) for prompt in families["inside longer prompts"])
    assert min(len(prompt.split()) for prompt in families["inside longer prompts"]) >= 8
    assert not any(holds(prompt, concept) for prompt in families["misspelt"])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_kept_families_are_every_other_object_and_colour_by_every_wording(name: str):
    probes, families = shipped(name)
    concept = SHIPPED[name]
    shown = [family.shows for family in probes.kept.values()]
    assert sorted(shown) == sorted({*OBJECTS, *COLOURS} - {concept})
    for family in probes.kept.values():
        word = "{object}" if family.shows in OBJECTS else "{colour}"
        assert len(family.prompts) == len(set(family.prompts)) == sum(word in said for said in (*TEMPLATES, *HELD_OUT))
        assert set(family.prompts) <= {found.text for found in captions((*TEMPLATES, *HELD_OUT))
                                       if found.names(family.shows) and not found.names(concept)}  # fmt: skip
    stand_ins = {families.shows[label] for label in families.overrides}
    assert stand_ins == ({"sneaker"} if concept == "sandal" else set(COLOURS) - {"red"})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_prompts_are_within_the_small_teacher_s_limit(name: str):
    tokenizer = train_tokenizer([found.text for found in captions()], 24)
    require_within_limit(tokenizer, shipped(name)[1].texts)
