"""What a text-to-image training can be told: refusals, recipes, shipped presets and prompt lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDPMScheduler
from torch import nn

from sfd_deploy.errors import ConfigError, PromptError
from sfd_deploy.models.denoiser import DiscreteDenoiser
from sfd_deploy.prompts import Prompts, negative_prompts, phrase_prompts
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.kinds import changed, config_of, load_config
from sfd_deploy.training.text_config import GuidanceConfig, TextTrainConfig
from sfd_deploy.training.text_inputs import prompt_list, prompts_of, still_forgetting
from tests.text_world import SD_BETAS
from tests.training.text_loop import shipped_lists

PHRASE = {"prompts": "portraits", "phrase": "Quux", "substitute": "a plumber"}
SD15 = ("sd15-celebrity", "sd15-nudity")


def config(**changes: object) -> TextTrainConfig:
    values = {"kind": "text-to-image", "teacher": "t", "iterations": 1, "retained": "everyday"} | changes
    return TextTrainConfig.from_mapping(values, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": {"teacher": 0.5}}, "`guidance.teacher`"),
        ({"guidance": {"dropout": 0}}, "its answer to the empty prompt is never fitted"),
        ({"guidance": {"kappa": 2}}, r"unknown key `guidance.kappa`; valid keys: dropout"),
        ({"share_generated": True}, "no prompt is left empty"),
        ({"forget_phrase": PHRASE, "forget_attribute": {"keywords": "nudity-keywords", "subjects": "adults"}}, "both"),
        ({"forget_attribute": {"keywords": "k", "subjects": "s"}, "guidance": {"teacher": 1}}, "no negative prompt"),
        ({"forget_phrase": PHRASE | {"phrase": ""}}, "`forget_phrase.phrase`"),
        ({"forget_phrase": {"prompt": "portraits"}}, r"did you mean `prompts`"),
        ({"retaned": "everyday"}, "did you mean `retained`"),
        ({"kind": "labels"}, "`kind`"),
    ],
)
def test_values_that_the_method_cannot_use_are_one_line_with_the_reason(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_the_key_kind_alone_says_which_training_it_is():
    labelled, prompted = {"teacher": "t", "iterations": 1}, config().resolved()
    assert isinstance(config_of(labelled, "test"), TrainConfig)
    assert isinstance(config_of(prompted, "test"), TextTrainConfig)
    with pytest.raises(ConfigError, match="unknown kind 'text'"):
        config_of(labelled | {"kind": "text"}, "test")


@pytest.mark.parametrize("name", SD15)
def test_presets_hold_the_official_values(name: str):
    """Section by section: README examples 1 and 2, run_sfd.sh."""
    loaded = load_config(name)
    assert isinstance(loaded, TextTrainConfig)
    expected = {
        "retained_rows": 8, "forget_rows": 8, "forget_weight": 1.0, "alpha": 1.0, "fake_score_rate": 3e-6,
        "generator_rate": 1e-6, "clip_value": 1.0, "ema_decay": 0.0, "decay_share": 0.0,
        "init_from": "runs/sd15-distil",
        "guidance": GuidanceConfig(fake_score_fit=4.5, fake_score=4.5, teacher=4.5, dropout=0.1),
        "iterations": 100_000 // 8,
    }  # fmt: skip
    assert {key: getattr(loaded, key) for key in expected} == expected
    assert timesteps(loaded) == [20, 625, 979]


def timesteps(loaded: TextTrainConfig) -> list[int]:
    """Of Stable Diffusion's schedule, without a network."""
    schedule = DiscreteDenoiser(nn.Module(), DDPMScheduler(**SD_BETAS))  # type: ignore[arg-type]
    return [schedule.nearest_timestep(sigma) for sigma in (loaded.sigma_min, loaded.sigma_init, loaded.sigma_max)]


def test_the_first_stage_is_a_plain_distillation_with_the_values_of_sid_lsg():
    """The base method's code: batch 512, rates 1e-6, EMA half-life 50,000 images; images as in the file name."""
    loaded = load_config("sd15-distil")
    assert isinstance(loaded, TextTrainConfig)
    assert (loaded.forget_phrase, loaded.forget_attribute, loaded.init_from) == (None, None, None)
    expected = {
        "retained_rows": 512, "alpha": 1.0, "fake_score_rate": 1e-6, "generator_rate": 1e-6, "iterations": 16367,
        "guidance": GuidanceConfig(fake_score_fit=4.5, fake_score=4.5, teacher=4.5, dropout=0.1),
    }  # fmt: skip
    assert {key: getattr(loaded, key) for key in expected} == expected
    assert loaded.ema_decay ** (50_000 / 512) == pytest.approx(0.5, rel=1e-2)
    assert timesteps(loaded) == [20, 625, 979]
    later = load_config("sd15-nudity")
    assert (loaded.teacher, loaded.sigma_init) == (later.teacher, later.sigma_init)


def test_a_teacher_from_the_command_line_is_trained_in_place_of_the_presets():
    assert changed(load_config("sd15-nudity"), teacher="mine/sd").teacher == "mine/sd"
    assert changed(load_config("cifar10"), teacher="mine/ddpm").teacher == "mine/ddpm"


@pytest.mark.parametrize("option", ["concept", "substitute"])
def test_what_is_wrong_with_a_concept_is_said_in_the_words_of_the_command_line(option: str):
    with pytest.raises(ConfigError, match=f"--{option} is empty"):
        changed(load_config("sd15-celebrity"), **{option: " "})
    said = {"concept": ("Quux", "Quux Zog"), "substitute": ("Quux", "a Quux")}[option]
    named = changed(load_config("sd15-celebrity"), concept=said[0], substitute=said[1])
    assert isinstance(named, TextTrainConfig)
    with pytest.raises(PromptError, match="--substitute"):
        prompts_of(named)


@pytest.mark.parametrize("name", [*SD15, "sd15-distil"])
def test_presets_name_every_value_of_the_method(name: str):
    loaded = load_config(name)
    optional = {"teacher_digest", "init_from", "share_generated", "accumulate", "compile", "forget_phrase",
                "forget_attribute", "lora", "watch"}  # fmt: skip
    if name == "sd15-distil":
        optional |= {"forget_rows", "forget_weight"}
    assert set(TextTrainConfig.model_fields) - loaded.model_fields_set <= optional


def test_defaults_draw_the_official_timesteps_too():
    schedule = DiscreteDenoiser(nn.Module(), DDPMScheduler(**SD_BETAS))  # type: ignore[arg-type]
    defaults = config()
    assert [schedule.nearest_timestep(s) for s in (defaults.sigma_min, defaults.sigma_max)] == [20, 979]


def test_the_preset_names_nobody_and_says_how_to():
    preset = load_config("sd15-celebrity")
    assert isinstance(preset, TextTrainConfig)
    with pytest.raises(ConfigError, match="--concept"):
        prompts_of(preset)


def test_a_concept_from_the_command_line_is_put_into_the_shipped_prompts():
    named = changed(load_config("sd15-celebrity"), concept="Quux Zog", substitute="a tall plumber")
    assert isinstance(named, TextTrainConfig)
    prompts = prompts_of(named)
    assert len(prompts.forget) == 50
    asked = {prompts.texts[prompt]: prompts.texts[override] for prompt, override in prompts.forget.items()}
    assert asked["a photo of Quux Zog"] == "a photo of a tall plumber"
    assert not any("{" in text for text in prompts.texts)
    assert not any("Quux" in prompts.texts[prompt] for prompt in (*prompts.retained, *prompts.forget.values()))


@pytest.mark.parametrize(
    ("name", "message"), [("cifar10", "is of class labels"), ("sd15-nudity", "forgets nothing by name")]
)
def test_a_concept_is_refused_where_nothing_goes_by_name(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        changed(load_config(name), concept="Quux")


def test_an_attribute_is_forgotten_with_every_subject_by_the_line_of_keywords():
    preset = load_config("sd15-nudity")
    assert isinstance(preset, TextTrainConfig)
    prompts = prompts_of(preset)
    keywords, subjects = prompt_list("nudity-keywords"), prompt_list("adults")
    assert len(prompts.forget) == 2 * len(keywords) * len(subjects)
    assert {prompts.texts[override] for override in prompts.forget.values()} == set(subjects)
    assert {prompts.texts[negative] for negative in prompts.negatives.values()} == {", ".join(keywords)}
    assert set(prompts.negatives) == {*prompts.forget, *prompts.forget.values()}
    assert set(prompts.forget.values()) < set(prompts.retained)
    assert preset.guidance.bind(prompts).away[next(iter(prompts.negatives))] == next(iter(prompts.negatives.values()))


def test_without_a_recipe_it_is_a_plain_distillation(tmp_path: Path):
    file = tmp_path / "mine.txt"
    file.write_text("a bag\na coat\na bag\n", encoding="utf-8")
    prompts = prompts_of(config(retained=str(file)))
    assert prompts == Prompts(texts=("", "a bag", "a coat"), retained=(1, 2))


def test_an_unguided_fake_score_has_no_prompt_dropped():
    """Officially dropout is on whenever kappa_1 or kappa_2 is not 1."""
    prompts = Prompts(texts=("", "a bag"), retained=(1,))
    assert GuidanceConfig(fake_score_fit=1, fake_score=1, teacher=3, dropout=0.1).bind(prompts).dropout == 0
    assert GuidanceConfig(fake_score_fit=1.5, fake_score=1, teacher=3, dropout=0.1).bind(prompts).dropout == 0.1


def test_an_unknown_prompt_list_is_one_line_with_the_shipped_ones():
    with pytest.raises(PromptError, match=r"no such prompt list; give a text file .* adults, everyday"):
        prompt_list("everyday-things")


EARLIER = Prompts(
    texts=("", "a bag", "a red bag", "a coat", "crimson"), retained=(1,), forget={2: 3}, negatives={2: 4},
    phrases=("red", "crimson"),
)  # fmt: skip


def test_what_an_earlier_run_forgot_stays_forgotten_with_its_negative_prompt():
    now = Prompts(texts=("", "a shoe", "an old shoe", "a boot"), retained=(1,), forget={2: 3})
    both = still_forgetting(now, EARLIER)
    named = {both.texts[a]: both.texts[b] for a, b in both.forget.items()}
    assert named == {"an old shoe": "a boot", "a red bag": "a coat"}
    assert {both.texts[a]: both.texts[b] for a, b in both.negatives.items()} == {"a red bag": "crimson"}
    assert [both.texts[prompt] for prompt in both.retained] == ["a shoe"]
    assert both.phrases == ("red", "crimson")


def test_a_subject_that_an_earlier_run_kept_away_from_its_attribute_stays_so():
    now = phrase_prompts(["a shoe"], ["an old shoe"], "old", "new")
    both = still_forgetting(now, negative_prompts(["a bag"], ["a coat"], ["red"]))
    named = {both.texts[a]: both.texts[b] for a, b in both.negatives.items()}
    assert named == {"red a coat": "red", "a coat, red": "red", "a coat": "red"}
    assert [both.texts[prompt] for prompt in both.retained] == ["a shoe", "a coat"]


def test_a_second_attribute_of_the_same_subjects_has_its_own_negative_prompt():
    torn, red = (negative_prompts(["a bag"], ["a coat"], [keyword]) for keyword in ("torn", "red"))
    both = still_forgetting(torn, red)
    named = {both.texts[a]: both.texts[b] for a, b in both.negatives.items()}
    assert named == {
        "red a coat": "red", "a coat, red": "red", "torn a coat": "torn", "a coat, torn": "torn",
        "a coat": "red, torn",
    }  # fmt: skip
    away = GuidanceConfig().bind(both).away
    assert {both.texts[a]: both.texts[b] for a, b in enumerate(away) if b} == named
    assert both.phrases == ("torn", "red")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Prompts(texts=("", "a Red shoe"), retained=(1,)), "retained prompt 'a Red shoe' holds the phrase 'red'"),
        (Prompts(texts=("", "x", "y", "red y"), retained=(1,), forget={2: 3}), "override prompt 'red y' holds"),
        (Prompts(texts=("", "x", "y", "z"), retained=(1,), forget={2: 3}, phrases=("coat",)),
         "override prompt 'a coat' holds the phrase 'coat'"),
    ],
)  # fmt: skip
def test_what_either_run_forgets_is_asked_of_no_teacher_in_other_words(now: Prompts, message: str):
    with pytest.raises(PromptError, match=message):
        still_forgetting(now, EARLIER)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Prompts(texts=("", "a red bag"), retained=(1,)), "retained prompt 'a red bag' holds the phrase 'red'"),
        (Prompts(texts=("", "x", "y", "a red bag"), retained=(1,), forget={2: 3}), "override prompt 'a red bag' holds"),
        (Prompts(texts=("", "x", "a coat", "y"), retained=(1,), forget={2: 3}), "'a coat' is also retained"),
        (Prompts(texts=("", "x", "a red bag", "y"), retained=(1,), forget={2: 3}), "'a coat' in its place"),
    ],
)
def test_what_contradicts_the_earlier_run_is_refused(now: Prompts, message: str):
    with pytest.raises((ConfigError, PromptError), match=message):
        still_forgetting(now, EARLIER)


def test_shipped_lists_repeat_nothing_and_are_ascii():
    for name, prompts in shipped_lists().items():
        assert len(set(prompts)) == len(prompts), name
        assert all(prompt.isascii() for prompt in prompts if name != "portraits"), name


def test_shipped_prompts_never_ask_for_what_is_forgotten():
    """Retained prompts are officially not filtered for the concept."""
    keywords = set(prompt_list("nudity-keywords"))
    for prompt in prompt_list("everyday"):
        assert not any(f" {keyword} " in f" {prompt} " for keyword in keywords), prompt
