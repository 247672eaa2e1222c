"""``docs/keys.md`` says what the code says, of every key that a user writes."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import pytest
import yaml
from pydantic import Field

from sfd_deploy.config import PRESETS, StageConfig, preset_names
from tests.keys import PAGE, SECTIONS, Section, keys_of, page, table


class Pace(StageConfig):
    """How fast."""

    rate: float = Field(1 / 9, gt=0, le=1, description="of learning")


class Made(StageConfig):
    """All that the table has words for."""

    kind: Literal["a|b"] = Field(description="which")
    names: tuple[str, ...] = Field(("x",), min_length=1, description="in\n order")
    size: tuple[int, int] | None = Field(None, description="height, width")
    pace: Pace = Pace()
    many: dict[str, Pace] = Field({}, description="by name")
    usual: Pace = Field(Pace(rate=0.5), description="another default")
    bare: bool = False


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_every_key_says_what_it_is(section: Section):
    assert [key.name for key in keys_of(section.config) if not key.what] == []


def test_a_table_has_defaults_ranges_descriptions_and_the_keys_of_configs_within():
    assert table(Made).splitlines() == [
        "| key | default | range or kind | what it is |",
        "| --- | --- | --- | --- |",
        r"| `kind` | **required** | `a\|b` | which |",
        '| `names` | `["x"]` | list (≥ 1 items) of text | in order |',
        "| `size` | `null` | list (≥ 2 items, ≤ 2 items) of integer or null | height, width |",
        "| `pace` | as below | mapping | How fast. |",
        "| `pace.rate` | `0.111111` | number (> 0, ≤ 1) | of learning |",
        "| `many` | `{}` | mapping to mapping | by name |",
        "| `many.<name>.rate` | `0.111111` | number (> 0, ≤ 1) | of learning |",
        '| `usual` | `{"rate": 0.5}` | mapping | another default. How fast. |',
        "| `usual.rate` | `0.111111` | number (> 0, ≤ 1) | of learning |",
        "| `bare` | `false` | true or false |  |",
    ]


def test_a_range_that_there_are_no_words_for_is_not_left_out():
    class Short(StageConfig):
        name: str = Field(max_length=3, description="at most three letters")

    with pytest.raises(ValueError, match="maxLength"):
        table(Short)


@pytest.mark.parametrize("stage", ["train", "teacher", "judge", "policy", "probes"])
def test_each_shipped_preset_is_of_one_section(stage: str):
    known = [{key.name for key in keys_of(section.config)} for section in SECTIONS]
    folder = resources.files(PRESETS) / stage
    for name in preset_names(stage):
        written = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        assert any(written.keys() <= keys for keys in known), name
