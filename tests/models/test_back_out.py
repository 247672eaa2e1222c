"""Generators back in stock diffusers, by the very loops of docs/teachers.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_deploy.manifest import verify
from sfd_deploy.models.generator import load_generator, save_generator
from sfd_deploy.runs import sealed_folder
from tests.conftest import TINY_LABELS
from tests.models.tiny import tiny_generator_of

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
CASES = [("epsilon", "linear"), ("epsilon", "sigmoid"), ("v_prediction", "scaled_linear"),
         ("sample", "squaredcos_cap_v2"), ("edm-euler", "linear"), ("flow", "linear")]  # fmt: skip
SCHEDULERS = {"edm-euler": "EDMEulerScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}


def draw_by_the_page(folder: Path, scheduler: str, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Run the page's set-up and the loop that uses ``scheduler``."""
    setup, *loops = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (loop,) = (block for block in loops if scheduler in block)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(setup, names)
        names |= {"folder": str(folder), "latents": latents, "labels": labels}
        exec(loop, names)
    images: torch.Tensor = names["images"]
    return images


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_the_docs_loop_in_stock_diffusers_draws_the_generators_images(kind, schedule, tmp_path):
    generator = tiny_generator_of(kind, schedule)
    facts = {"labels": TINY_LABELS.resolved(), "sigma_init": generator.sigma_init}
    with sealed_folder(tmp_path / "generator", "generator", facts=facts) as target:
        save_generator(generator, target)
    latents = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 1, 2, 1])
    stock = draw_by_the_page(tmp_path / "generator", SCHEDULERS.get(kind, "DDIMScheduler"), latents, labels)
    loaded = load_generator(verify(tmp_path / "generator", "generator"))
    ours = loaded(latents, labels)
    assert ours.std() > 0.1
    assert (stock - ours).abs().max() < 1e-4
    assert loaded.sigma_init == generator.sigma_init
    assert ours == pytest.approx(generator(latents, labels), abs=1e-5)


def test_the_noise_level_is_one_that_the_network_was_trained_at():
    assert tiny_generator_of("epsilon").sigma_init == pytest.approx(2.502, abs=1e-3)
    assert tiny_generator_of("edm").sigma_init == tiny_generator_of("flow").sigma_init == 2.5
