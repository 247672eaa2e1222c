"""The watch over a text-to-image training: families of the toy world, trained toy judges, tiny networks.

Which look wins is ``rank``'s, tested in ``test_monitor``; here: what is asked, who judges, what is exported.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import beta

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.latents import Latents
from sfd_deploy.measure.fidelity import spread, spread_error
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.folder import load_parts, open_text_teacher
from sfd_deploy.models.text.network import load_text_denoiser
from sfd_deploy.models.text.sampler import TextSampler
from sfd_deploy.prompts import phrase_prompts
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_text_runtime
from sfd_deploy.runtime.seam import Images, Runtime
from sfd_deploy.training.previews import draw_by_label
from sfd_deploy.training.text_watch import TextWatch, TextWatchConfig
from tests.audit.text_toy import TextWorld, make_world
from tests.training.text_loop import config_values

SAMPLES = 20
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROBES: dict[str, Any] = {
    "concept": "sandal",
    "families": {"held-out paraphrases": ["this one is asked by an audit alone: red sandal"]},
    "override": {"shows": "sneaker", "prompts": ["a red sneaker", "a photo of a sneaker"]},
    "retained": {
        "bag": {"shows": "bag", "prompts": ["a green bag", "a blue bag", "the red bag"]},
        "in green": {"shows": "green", "prompts": ["a green bag", "a green coat"]},
    },
    "teacher": {"guidance": 2.0, "steps": 3},
}
PROMPTS = phrase_prompts(("a green bag", "a coat on a black background"), ("a red sandal", "the sandal"),
                         "sandal", "sneaker")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TextWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def watch_values(folder: Path, world: TextWorld, **changes: object) -> dict[str, Any]:
    file = folder / "probes.yaml"
    file.write_text(json.dumps(PROBES), encoding="utf-8")
    judges = [str(judge) for judge in world.judge_folders]
    return {"probes": str(file), "judges": judges, "every": 1, "samples": SAMPLES} | changes


def train(folder: Path, world: TextWorld, name: str, **changes: object) -> Run:
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config_values(folder, world.teacher.folder, **changes)), encoding="utf-8")
    assert exit_code_of(["train", "--config", str(file), "-o", str(folder / name)]) == 0
    return Run(folder / name)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_step_that_is_exported_is_the_best_look_not_the_last(world, tmp_path, lora, monkeypatch):
    """Looks are ranked upside down by step, so that the first one wins: its weights are the first step's average."""
    monkeypatch.setattr("sfd_deploy.training.rating.rank", lambda look: -look.step)
    seen = train(tmp_path, world, "seen", watch=watch_values(tmp_path, world), lora=lora)
    alone = train(tmp_path, world, "alone", iterations=1, lora=lora)
    assert seen.generator().facts["exported"]["step"] == 1
    assert "judge" in seen.generator().facts["exported"]["rule"]
    assert alone.generator().facts["exported"] == {"step": 1, "rule": "the last step's average"}
    ours, theirs = (
        load_file(run.folder / "generator/unet/diffusion_pytorch_model.safetensors") for run in (seen, alone)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def watching(folder: Path, world: TextWorld, **changes: object) -> tuple[TextWatch, OneStepGenerator]:
    """A watch over the toy teacher, and a generator that is that teacher at one noise level."""
    parts = load_parts(open_text_teacher(world.teacher.folder))
    teacher = load_text_denoiser(parts, PROMPTS.texts)
    config = TextWatchConfig.from_mapping(watch_values(folder, world, **changes), "test")
    generator = OneStepGenerator(copy.deepcopy(teacher), teacher.nearest_sigma(2.5)).eval()
    return TextWatch(config, PROMPTS, parts, teacher, world.teacher), generator


def drawn(runtime: Runtime, prompts: tuple[str, ...], texts: tuple[str, ...], label: int, count: int) -> Images:
    """What a family's images are, told anew: an image's seed picks one of its prompts."""
    latents = Latents(Latents.of_stream("select", 0, label * 1000, count).seeds)
    asked = [texts.index(prompts[int(seed) % len(prompts)]) for seed in latents.seeds]
    return runtime.draw(latents, np.array(asked, np.int64))


def test_figures_are_what_the_first_judge_of_each_class_says_of_each_family(world, tmp_path):
    watch, generator = watching(tmp_path, world)
    figures = watch.look(1, generator)
    families = {
        "sandal": ("a red sandal", "the sandal"),
        "sneaker": tuple(PROBES["override"]["prompts"]),
        "bag": tuple(PROBES["retained"]["bag"]["prompts"]),
        "green": tuple(PROBES["retained"]["in green"]["prompts"]),
    }
    texts = tuple(dict.fromkeys(text for prompts in families.values() for text in prompts))
    judges = {shown: next(judge for judge in world.judges if shown in judge.class_names) for shown in families}
    teacher = open_text_runtime(world.teacher, texts, "cpu", TextSampler(guidance=2.0, steps=3))
    parts = load_parts(world.teacher)
    table = load_text_denoiser(parts, texts)

    class Ours:
        def draw(self, latents: Latents, labels: np.ndarray) -> Images:
            with torch.no_grad():
                clean = table(
                    torch.from_numpy(latents.array((4, 8, 8))) * generator.sigma_init,
                    torch.full((len(labels),), generator.sigma_init), torch.from_numpy(labels),
                )  # fmt: skip
                return parts.vae.decode(clean / parts.vae.config.scaling_factor).sample.clamp(-1, 1).numpy()

    right, spreads, bounds = {}, {}, {}
    for label, (shown, prompts) in enumerate(families.items()):
        images = drawn(Ours(), prompts, texts, label, SAMPLES)  # type: ignore[arg-type]
        right[shown] = judges[shown].look(images)[0] == judges[shown].class_names.index(shown)
        theirs = drawn(teacher, prompts, texts, label, SAMPLES)
        spreads[shown] = spread(images) / spread(theirs)
        # 1.6449: 95 % of a standard normal lies below it
        bounds[shown] = spreads[shown] * np.exp(1.6449 * np.hypot(spread_error(images), spread_error(theirs)))
    hits = int(right.pop("sandal").sum())
    least = min((shown for shown in spreads if shown != "sandal"), key=lambda shown: bounds[shown])
    assert figures == {
        "watch/forget-rate": hits / SAMPLES,
        "watch/forget-bound": pytest.approx(beta.ppf(0.95, hits + 1, SAMPLES - hits) if hits < SAMPLES else 1.0),
        "watch/retained-accuracy": pytest.approx(np.mean(list(right.values()))),
        "watch/spread": pytest.approx(spreads[least], rel=1e-4),
        "watch/spread-bound": pytest.approx(bounds[least], rel=1e-4),
    }


def test_what_an_audit_alone_asks_takes_no_part(world, tmp_path):
    watch, _ = watching(tmp_path, world)
    assert watch.families.class_names == ("training prompts", "sneaker", "bag", "in green")
    assert not any("audit alone" in text for text in watch.families.texts)


def test_a_look_leaves_no_trace(world, tmp_path):
    watch, generator = watching(tmp_path, world)
    networks = (watch.teacher, generator)
    before = [value.clone() for net in networks for value in net.state_dict().values()]
    tables = [net.unet.table for net in (watch.teacher, generator.denoiser)]
    random_state = torch.get_rng_state()
    again = TextWatch(watch.config, PROMPTS, load_parts(world.teacher), watch.teacher, world.teacher)
    again.look(1, generator)
    assert all(torch.equal(a, b) for a, b in zip(before, [
        value for net in networks for value in net.state_dict().values()
    ], strict=True))  # fmt: skip
    assert all(net.unet.table is table for net, table in zip((watch.teacher, generator.denoiser), tables, strict=True))
    assert torch.equal(random_state, torch.get_rng_state())


def test_images_are_drawn_as_many_at_once_as_four_of_stable_diffusion(world, tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("sfd_deploy.training.text_watch.POSITIONS", 7 * 8 * 8)
    watch, generator = watching(tmp_path, world)
    assert watch.at_once == 7
    real = draw_by_label

    def spying(runtime: Runtime, labels: Any, count: int, batch: int) -> Images:
        asked.append(batch)
        return real(runtime, labels, count, batch)

    monkeypatch.setattr("sfd_deploy.training.text_watch.draw_by_label", spying)
    watch.look(1, generator)
    assert set(asked) == {7}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judges": ["nowhere"]}, "nowhere: no such judge"),
        ({"probes": "nowhere"}, "nowhere"),
        ({"every": 0}, "every"),
    ],
)
def test_a_watch_that_cannot_be_is_refused_in_one_line(world, tmp_path, capsys, changes, said):
    values = config_values(tmp_path, world.teacher.folder, watch=watch_values(tmp_path, world, **changes))
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert exit_code_of(["train", "--config", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_a_class_that_one_judge_alone_knows_is_refused(world, tmp_path, capsys):
    lonely = watch_values(tmp_path, world, judges=[str(world.judge_folders[0]), *map(str, world.judge_folders[2:])])
    values = config_values(tmp_path, world.teacher.folder, watch=lonely)
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert exit_code_of(["train", "--config", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "run")]) == 2
    assert "alone knows 'sandal'" in capsys.readouterr().err
