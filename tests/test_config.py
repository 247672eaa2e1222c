from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sfd_deploy.config import StageConfig, preset_names, read_named, read_values
from sfd_deploy.errors import ConfigError
from sfd_deploy.policy.plan import Policy
from sfd_deploy.probes import Probes
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.judge import JudgeConfig
from sfd_deploy.training.kinds import load_config
from sfd_deploy.training.teacher import TeacherConfig
from sfd_deploy.training.text_teacher.config import load_teacher_config

STAGES: dict[str, Callable[[str], StageConfig]] = {
    "train": load_config,
    "teacher": load_teacher_config,
    "judge": lambda name: JudgeConfig.load(name, "judge"),
    "policy": lambda name: Policy.load(name, "policy"),
    "probes": lambda name: Probes.load(name, "probes"),
}


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in STAGES for name in preset_names(stage)])
def test_every_preset_loads(stage, name):
    assert STAGES[stage](name).resolved()


def test_every_stage_ships_a_preset():
    assert all(preset_names(stage) for stage in STAGES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: t\niteration: 5", "unknown key `iteration`; did you mean `iterations`"),
        ("teacher: t", "key `iterations` is missing"),
        ("teacher: t\niterations: many", "`iterations`.*found 'many'"),
        ("teacher: t\niterations: 5\nalpha: 3", "`alpha`"),
        ("teacher: t\niterations: 5\nsigma_min: 20", "sigma_min 20.0 is not below sigma_max 13.0"),
        ("teacher: t\niterations: 5\nfake_score_rate: 1.0e-6", "fake_score_rate is below generator_rate"),
        ("- a list", "expected a mapping"),
        ("teacher: [", "line 1 is not valid YAML|line 2 is not valid YAML"),
        ("", "expected a mapping"),
    ],
)
def test_a_bad_config_is_one_line_naming_the_key(tmp_path: Path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.load(str(file), "train")
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_nested_unknown_key_is_named_with_its_path(tmp_path: Path):
    file = tmp_path / "t.yaml"
    file.write_text("images: 5\nnetwork: {image_size: 28, channels: 1, block_channels: [8], norm_group: 4}")
    with pytest.raises(ConfigError, match=r"network\.norm_group`; did you mean `norm_groups`"):
        TeacherConfig.load(str(file), "teacher")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("attention_levels: [0], head_channels: 5", "head_channels 5 do not divide 8 channels"),
        ("attention_levels: [3]", "attention level 3, but the network has 1 levels"),
    ],
)
def test_heads_that_do_not_fit_the_network_are_named(tmp_path: Path, network, message):
    file = tmp_path / "t.yaml"
    file.write_text(
        f"images: 5\nnetwork: {{image_size: 28, channels: 1, block_channels: [8], norm_groups: 4, {network}}}"
    )
    with pytest.raises(ConfigError, match=message):
        TeacherConfig.load(str(file), "teacher")


def test_a_misspelt_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean fashion-mnist"):
        read_named("fashon-mnist", "train")


def test_yaml_cannot_make_objects(tmp_path: Path):
    file = tmp_path / "evil.yaml"
    file.write_text("teacher: !!python/object/apply:os.getcwd []\niterations: 1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        TrainConfig.load(str(file), "train")


def test_a_folder_is_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.load(str(tmp_path), "train")


def test_a_key_that_is_there_twice_is_refused_however_deep(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("name: strict\nparity:\n  fp32: {min_psnr_db: 1, min_agreement: 0.5}\n  fp32: {min_psnr_db: 2}\n")
    with pytest.raises(ConfigError, match=r"policy\.yaml: line 3: key `fp32` is there twice"):
        read_values(str(file), "policy")
    file.write_text("- {a: 1, b: 2}\n- {a: 1, b: 2}\n")
    assert read_values(str(file), "policy")[0] == [{"a": 1, "b": 2}] * 2


def test_an_alias_that_leads_round_is_no_endless_walk(tmp_path):
    file = tmp_path / "round.yaml"
    file.write_text("a: &x {b: *x}\n")
    values, _ = read_values(str(file), "train")
    assert values["a"]["b"] is values["a"]
