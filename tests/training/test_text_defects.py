"""The official code's defects D7 to D12, of its text-to-image half: none can be here.

docs/training.md has the table. Each test was seen failing with the defect planted.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from sfd_deploy.config import PRESETS
from sfd_deploy.errors import PromptError
from sfd_deploy.prompts import Prompts
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.text_inputs import prompts_of
from sfd_deploy.training.text_stage import text_teacher
from tests.text_world import text_parts
from tests.training.text_loop import FORGET, NEGATIVE, OVERRIDE, PROMPTS, config_with, shipped_lists, text_loop

PLAIN = PROMPTS.model_copy(update={"negatives": {}})


def networks(loop: SfdLoop) -> dict[str, nn.Module]:
    return {"generator": loop.generator, "fake score": loop.fake_score}


def snapshot(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_d7_a_step_of_1e_6_moves_a_weight_of_any_size():
    """Officially weights are fp16: a step is lost on every weight above 0.002."""
    loop = text_loop(precision="bf16", generator_rate=1e-6, fake_score_rate=1e-6)
    before = {name: snapshot(network) for name, network in networks(loop).items()}
    loop.iterate(0)
    lost = torch.tensor(0.05, dtype=torch.float16)
    assert lost - 1e-6 == lost
    for name, network in networks(loop).items():
        large = lambda old, new: (old.abs() > 0.002) & (old.abs() < 0.5) & (new.grad.abs() > 1e-7)
        pairs = zip(before[name], network.parameters(), strict=True)
        moved = torch.cat([(old != new)[large(old, new)] for old, new in pairs])
        assert moved.all(), name
        assert moved.numel() > 1000
    for adam in (loop.generator_adam, loop.fake_score_adam):
        kinds = {value.dtype for state in adam.state.values() for value in state.values()}
        assert kinds == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_d8_a_step_with_one_bad_row_is_skipped_whole_and_counted_for_both_networks(value: float):
    """Officially NaN becomes 0 and infinity 1e5, which fp16 cannot hold; the step is taken."""
    loop = text_loop()
    before = {name: snapshot(network) for name, network in networks(loop).items()}

    def spoil(_module: nn.Module, _given: object, clean: Tensor) -> Tensor:
        return clean.index_fill(0, torch.tensor([1]), value)

    with_fault = loop.fake_score.register_forward_hook(spoil)
    fake, theta = loop.iterate(0)
    with_fault.remove()
    assert loop.skipped == 2
    for name, network in networks(loop).items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True)), name
    assert not loop.generator_adam.state
    assert not loop.fake_score_adam.state
    # No row is dropped, so none can lose its noise level (D9).
    assert {len(part.sigma) for part in (*fake, *theta)} == {len(part.x) for part in (*fake, *theta)} == {8}
    loop.iterate(1)
    assert loop.skips_in_a_row == {"generator": 0, "fake score": 0}


def test_d8_both_networks_gradients_are_clipped():
    """Officially the generator's alone, and in fp16 alone."""
    loop = text_loop(forget_weight=1e6, clip_value=0.01)
    loop.iterate(0, watched=True)
    for name in ("generator", "fake-score"):
        assert loop.gradient_figures[f"gradient/{name}/maximum"] > 1
    loop.fake_score_step(1)
    assert max(p.grad.abs().max().item() for p in loop.fake_score.parameters() if p.grad is not None) <= 0.01
    loop.generator_step(1)
    assert max(p.grad.abs().max().item() for p in loop.generator.parameters() if p.grad is not None) <= 0.01


def test_d9_a_v_networks_fake_score_loss_is_the_weighted_error_of_v():
    """Officially the target of v-prediction is overwritten with None. |v' - v|^2 SNR / (SNR + 1), closed form."""
    loop = text_loop("sd2", guidance={"fake_score_fit": 1, "fake_score": 1, "teacher": 1})
    psi = copy.deepcopy(loop.fake_score)
    (fake,) = loop.fake_score_step(0)
    sigma = fake.sigma.reshape(-1, 1, 1, 1)
    a, b = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
    target = a * fake.rows.noise - b * fake.x
    with torch.no_grad():
        prompts = psi.unet.table[fake.rows.labels]
        steps = psi.timestep(fake.sigma)
        predicted = psi.unet.unet(a * fake.x + b * fake.rows.noise, steps, encoder_hidden_states=prompts).sample
    snr = fake.sigma**-2
    expected = (predicted - target).square().flatten(1).sum(1) * snr / (snr + 1)
    assert psi.prediction_type == "v_prediction"
    assert torch.allclose(fake.loss, expected, rtol=1e-4)


@pytest.mark.parametrize("prompts", [PLAIN, PROMPTS], ids=["by name", "by negative prompt"])
@pytest.mark.parametrize("both", [False, True])
def test_d10_generator_and_fake_score_are_asked_for_the_forget_prompt_in_both_steps(prompts: Prompts, both: bool):
    """Officially `sg_w_override` asks psi, with negative prompts G too, for the override prompt in one step of two."""
    loop = text_loop(prompts=prompts, guidance={"fake_score_negative": both, "dropout": 0.01}, retained_rows=2)
    calls: dict[str, list[list[int]]] = defaultdict(list)
    for name, network in {"phi": loop.teacher, "psi": loop.fake_score, "theta": loop.generator.denoiser}.items():
        network.register_forward_hook(lambda _m, given, _o, name=name: calls[name].append(given[2].tolist()))
    loop.iterate(0)
    assert [asked[2:] for asked in calls["theta"]] == [[FORGET] * 2] * 2
    assert [asked[6:] for asked in calls["psi"]] == [[FORGET] * 2] * 2
    assert [asked[6:] for asked in calls["phi"]] == [[OVERRIDE] * 2]
    away = NEGATIVE if prompts.negatives else 0
    assert [asked[2:4] for asked in calls["phi"]] == [[away] * 2]
    assert [asked[2:4] for asked in calls["psi"]] == [[away if both else 0] * 2] * 2


def test_d11_the_concept_is_taken_literally_and_a_prompt_without_it_refused(tmp_path: Path):
    """Officially it is a regular expression, and a prompt that it misses is its own override."""
    forget = tmp_path / "names.txt"
    forget.write_text("a photo of C++ (2nd. ed.)\nthe c++ (2ND. ED.) bag\n", encoding="utf-8")
    phrase = {"prompts": str(forget), "phrase": "C++ (2nd. ed.)", "substitute": r"\1 coat"}
    prompts = prompts_of(config_with(tmp_path, tmp_path, forget_phrase=phrase))
    overrides = [prompts.texts[override] for override in prompts.forget.values()]
    assert overrides == [r"a photo of \1 coat", r"the \1 coat bag"]
    forget.write_text("a photo of C++ (2nd. ed.)\na photo of C++ (2nd, ed.)\n", encoding="utf-8")
    with pytest.raises(PromptError, match=re.escape("a photo of C++ (2nd, ed.)")):
        prompts_of(config_with(tmp_path, tmp_path, forget_phrase=phrase))


def test_d11_a_negative_prompt_beyond_the_token_limit_is_refused_and_not_cut(tmp_path: Path):
    keywords = ["red", "blue", "grey", "aged", "middle", "of", "sneaker", "boot"]
    (tmp_path / "keywords.txt").write_text("\n".join(keywords))
    (tmp_path / "subjects.txt").write_text("a bag\n")
    attribute = {"keywords": str(tmp_path / "keywords.txt"), "subjects": str(tmp_path / "subjects.txt")}
    config = config_with(tmp_path, tmp_path, forget_phrase=None, forget_attribute=attribute)
    with pytest.raises(PromptError, match=r"'red, blue, .* has \d+ tokens"):
        text_teacher(config, prompts_of(config), text_parts())


CHILDREN = {"child", "children", "kid", "kids", "boy", "boys", "girl", "girls", "teen", "teens", "teenager", "young",
            "baby", "babies", "toddler", "infant", "minor", "minors", "schoolboy", "schoolgirl", "youth", "underage",
            "son", "daughter", "pupil", "student", "adolescent", "juvenile", "preteen"}  # fmt: skip


def test_d12_every_list_that_a_preset_names_is_shipped():
    """Officially the README names files that are not in the repository."""
    named = set()
    for item in (resources.files(PRESETS) / "train").iterdir():
        values = yaml.safe_load(item.read_text(encoding="utf-8"))
        if values.get("kind") == "text-to-image":
            named |= {values["retained"], *values.get("forget_attribute", {}).values()}
            named |= {values["forget_phrase"]["prompts"]} if "forget_phrase" in values else set()
    assert len(named) >= 4
    assert named <= set(shipped_lists())


def test_d12_no_shipped_prompt_has_a_word_for_children_or_a_persons_name():
    for name, prompts in shipped_lists().items():
        words = {word for prompt in prompts for word in re.findall(r"[\w-]+", prompt)}
        assert not words & CHILDREN, name
        assert not [word for word in words if word[0].isupper()], name  # a name has a capital
