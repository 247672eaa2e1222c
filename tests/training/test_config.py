"""What a training config refuses, and that every preset is complete."""

from __future__ import annotations

import pytest

from sfd_deploy.config import preset_names
from sfd_deploy.errors import ConfigError
from sfd_deploy.labels import Labels
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.kinds import load_config

LABELS = Labels(class_names=("circle", "square", "star"))


def config(**changes: object) -> TrainConfig:
    return TrainConfig.from_mapping({"teacher": "t", "iterations": 1} | changes, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.3}, "`alpha`"),
        ({"alpha": 0.4}, "`alpha`"),
        ({"sigma_min": 13.0}, "sigma_min 13.0 is not below sigma_max 13.0"),
        ({"generator_rate": 1e-3}, "fake score would lag"),
        ({"forget_weight": 0}, "`forget_weight`"),
        ({"ema_decay": 1.0}, "`ema_decay`"),
        ({"forget_rows": 0}, "`forget_rows`"),
        ({"accumulate": 0}, "`accumulate`"),
        ({"share_generated": True, "accumulate": 2}, "keeps the graphs of all parts"),
        ({"teacher_digest": "abc"}, "`teacher_digest`"),
        ({"monitor": {"judge": "plain", "every": 0}}, "`judge` is set, but `every: 0` never looks"),
        # YAML reads an unquoted `no` as False.
        ({"forget": {False: "star"}}, "False is neither a class name nor a label; put a name in quotes"),
        ({"forget": {"square": True}}, "True is neither"),
        ({"forget": {"square": 1.0}}, "1.0 is neither"),
        ({"forget": {"square": None}}, "override null of square: the unconditional teacher still draws"),
        ({"forget": {"square": "random"}}, "override random of square: a random label per row averages scores"),
    ],
)
def test_values_that_the_method_cannot_use_are_refused_with_the_reason(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_a_mixture_needs_a_classifier_and_a_classifier_a_mixture():
    mixed = LABELS.forgetting({"square": "mixture"})
    config(classifier="judge").require_classifier(mixed)
    config().require_classifier(LABELS.forgetting({"square": "star"}))
    with pytest.raises(ConfigError, match="mixture of square needs a classifier"):
        config().require_classifier(mixed)
    with pytest.raises(ConfigError, match="no override is `mixture`"):
        config(classifier="judge").require_classifier(LABELS)


OFFICIAL = {
    "objective": "sid", "iterations": 50_000, "retained_rows": 128, "alpha": 1.2, "sigma_init": 2.5, "sigma_min": 0.137,
    "sigma_max": 13.0, "generator_rate": 1e-5, "clip_value": 1.0, "ema_decay": 0.9999, "ema_ramp": False,
    "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cifar10", {"fake_score_rate": 1e-5, "forget_rows": 128, "forget_weight": 0.01, "forget": {"0": "1"}}),
        ("cifar10-distil", {"fake_score_rate": 3e-5, "forget": {}, "init_from": None}),
        ("cifar10-two-stage", {"fake_score_rate": 3e-5, "forget_rows": 128, "forget_weight": 0.01}),
        ("stl10", {"fake_score_rate": 3e-5, "forget_weight": 0.01, "forget": {"0": "1"}, "retained_rows": 64,
                   "forget_rows": 64}),
    ],
)  # fmt: skip
def test_published_presets_hold_the_official_configurations_values(name, values):
    loaded = TrainConfig.load(name, "train")
    for key, value in (OFFICIAL | values).items():
        assert getattr(loaded, key) == value, key


def test_the_second_stage_starts_from_the_firsts_run():
    assert TrainConfig.load("cifar10-two-stage", "train").init_from == "runs/cifar10-distil"


@pytest.mark.parametrize("name", [name for name in preset_names("train") if isinstance(load_config(name), TrainConfig)])
def test_every_preset_loads_and_names_every_value_of_the_method(name):
    loaded = TrainConfig.load(name, "train")
    left_out = set(TrainConfig.model_fields) - loaded.model_fields_set
    optional = {"teacher_digest", "class_names", "init_from", "classifier", "share_generated", "accumulate", "compile",
                "monitor", "checkpoint_every", "ema_ramp"}  # fmt: skip
    assert left_out <= optional | ({"forget_rows", "forget_weight"} if not loaded.forget else set())


def test_the_demo_keeps_the_values_that_its_published_figures_were_made_with():
    loaded = TrainConfig.load("fashion-mnist", "train")
    assert (loaded.iterations, loaded.retained_rows, loaded.forget_rows, loaded.forget_weight) == (600, 28, 8, 0.5)
    assert (loaded.fake_score_rate, loaded.generator_rate, loaded.ema_decay, loaded.decay_share) == (
        1e-3,
        4e-4,
        0.99,
        0,
    )
    assert (loaded.objective, loaded.sigma_min, loaded.sigma_max, loaded.precision) == (
        "diff-instruct",
        0.02,
        13,
        "auto",
    )
    assert (loaded.ema_ramp, loaded.share_generated, loaded.monitor.judge) == (True, False, None)


def test_a_checkpoint_belongs_to_what_changes_weights_or_their_choice():
    plain, watched = config(), config(monitor={"judge": "plain", "every": 5})
    assert config(accumulate=2, monitor={"every": 7, "previews": 2, "tensorboard": False}).bound() == plain.bound()
    assert config(monitor={"judge": "moved", "every": 5, "previews": 2}).bound() == watched.bound()
    assert config(monitor={"judge": "plain", "every": 7}).bound() != watched.bound() != plain.bound()
    assert config(teacher="moved").bound() == plain.bound()  # it counts by its digest
    assert config(alpha=1.1).bound() != plain.bound()
