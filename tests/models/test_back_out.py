"""Generators back in stock diffusers, by the very lines of their cards and of docs/teachers.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sfd_deploy.labels import Labels
from sfd_deploy.manifest import verify
from sfd_deploy.models.card import LOOPS, model_card
from sfd_deploy.models.generator import load_generator, save_generator
from sfd_deploy.runs import sealed_folder
from tests.conftest import TINY_LABELS
from tests.models.tiny import tiny_generator_of

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
CASES = [("epsilon", "linear"), ("epsilon", "sigmoid"), ("v_prediction", "scaled_linear"), ("edm", "linear"),
         ("sample", "squaredcos_cap_v2"), ("edm-euler", "linear"), ("flow", "linear")]  # fmt: skip


def code_in(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_page_shows_every_loop_of_the_cards():
    assert code_in(PAGE.read_text(encoding="utf-8"))[1:] == list(LOOPS.values())


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_the_cards_lines_in_stock_diffusers_draw_the_generators_images(kind, schedule, tmp_path, monkeypatch):
    generator = tiny_generator_of(kind, schedule)
    facts = {"labels": TINY_LABELS.resolved(), "sigma_init": generator.sigma_init}
    with sealed_folder(tmp_path / "generator", "generator", facts=facts) as target:
        save_generator(generator, target)
        (target / "README.md").write_text(model_card("Title", "From.", "Forgotten:", TINY_LABELS, generator))
    folder = tmp_path / "generator"
    (code,) = code_in((folder / "README.md").read_text())
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        exec(code, names)
    stock, latents, labels = (names[name] for name in ("images", "latents", "labels"))
    assert labels.tolist() == list(TINY_LABELS.retained)
    loaded = load_generator(verify(folder, "generator"))
    ours = loaded(latents, labels)
    assert ours.std() > 0.1
    assert (stock - ours).abs().max() < 1e-4
    assert loaded.sigma_init == generator.sigma_init
    assert ours == pytest.approx(generator(latents, labels), abs=1e-5)


def test_a_card_says_what_is_drawn_for_what():
    labels = Labels(class_names=("bag", "coat", "shirt"), forget={0: 2, 1: "mixture"})
    card = model_card("Title", "From.", "Forgotten:", labels, tiny_generator_of("edm"))
    assert "Forgotten:\n- bag (label 0): shirt is drawn instead (label 2)\n- coat (label 1): a mixture of the" in card
    assert "Forgotten:\n- nothing\n" in model_card("T", "F", "Forgotten:", labels.plain(), tiny_generator_of("edm"))


def test_a_hub_reads_the_cards_header():
    header = model_card("T", "F", "Forgotten:", TINY_LABELS, tiny_generator_of("edm"), "lab: [7]").split("---\n")[1]
    assert yaml.safe_load(header) == {
        "library_name": "diffusers", "pipeline_tag": "unconditional-image-generation",
        "tags": ["one-step", "machine-unlearning"], "base_model": "lab: [7]", "base_model_relation": "finetune",
    }  # fmt: skip
    assert "base_model" not in model_card("T", "F", "Forgotten:", TINY_LABELS, tiny_generator_of("edm"))


def test_the_noise_level_is_one_that_the_network_was_trained_at():
    assert tiny_generator_of("epsilon").sigma_init == pytest.approx(2.502, abs=1e-3)
    assert tiny_generator_of("edm").sigma_init == tiny_generator_of("flow").sigma_init == 2.5
