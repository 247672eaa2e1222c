"""From somebody else's folder to a sealed run and back into stock diffusers, whatever the teacher predicts."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file
from torch import Tensor

from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.models.card import LOOPS
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.stage import train
from tests.training.test_stages import CLASSES, WEIGHTS, seal_blind_judge

Shape = tuple[int, int, int]


def foreign_teacher(folder: Path, scheduler: Any, shape: Shape = (1, 16, 16)) -> Path:
    """What stock diffusers saves: a network of three labels with random weights, a scheduler, no manifest."""
    channels, height, width = shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=height if height == width else (height, width), in_channels=channels, out_channels=channels,
            block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=4, add_attention=False, num_class_embeds=3,
        )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def three_steps(teacher: Path, run: Path, **changes: object) -> Run:
    values = {
        "teacher": str(teacher), "class_names": CLASSES.class_names, "forget": {"square": "star"}, "iterations": 3,
        "retained_rows": 3, "forget_rows": 1, "precision": "fp32", "monitor": {"every": 0, "tensorboard": False},
    } | changes  # fmt: skip
    return train(TrainConfig.from_mapping(values, "test"), run, "cpu")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def has_moved(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """Every tensor of the network, and to a finite place."""
    assert before.keys() == now.keys()
    return all(not torch.equal(before[name], value) and value.isfinite().all() for name, value in now.items())


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], value) for name, value in other.items())


def drawn_by_stock_diffusers(generator: Sealed, latents: Tensor, labels: Tensor) -> Tensor:
    """By the loop that the generator's card shows."""
    scheduler = json.loads((generator.folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    assert LOOPS[scheduler] in (generator.folder / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"torch": torch, "folder": str(generator.folder), "latents": latents, "labels": labels}
    with torch.no_grad():
        exec(LOOPS[scheduler], names)
    return names["images"]


# Which noise level is the one step's: on a DDPM schedule it is that of the timestep nearest to 2.5.
CASES = [
    pytest.param(DDPMScheduler(), (3, 16, 16), 2.502, id="epsilon"),
    pytest.param(DDIMScheduler(prediction_type="v_prediction"), (1, 16, 16), 2.502, id="v"),
    pytest.param(DDPMScheduler(prediction_type="sample"), (3, 16, 24), 2.502, id="sample"),
    pytest.param(FlowMatchEulerDiscreteScheduler(shift=3.0), (3, 16, 24), 2.5, id="flow"),
    pytest.param(EDMEulerScheduler(), (3, 16, 16), 2.5, id="edm"),
    pytest.param(CMStochasticIterativeScheduler(), (1, 16, 16), 2.5, id="edm-consistency"),
]


@pytest.mark.parametrize(("scheduler", "shape", "sigma_init"), CASES)
def test_a_foreign_teacher_is_trained_sealed_and_drawn_from_as_stock_diffusers_does(
    scheduler: Any, shape: Shape, sigma_init: float, tmp_path: Path
):
    folder = foreign_teacher(tmp_path / "teacher", scheduler, shape)
    run = three_steps(folder, tmp_path / "run")
    generator, fake_score = run.generator(), verify(run.folder / "fake-score", "fake-score")
    teacher = open_teacher(folder, class_names=CLASSES.class_names)

    facts = generator.facts
    assert facts["labels"] == {"class_names": ["circle", "square", "star"], "forget": {"1": 2}}
    assert facts["sigma_init"] == pytest.approx(sigma_init, abs=1e-3)
    assert facts["image_shape"] == fake_score.facts["image_shape"] == list(shape)
    assert facts["exported"] == {"step": 3, "rule": "the last step's average"}
    assert (facts["iterations"], facts["skipped_steps"], facts["teacher"]) == (3, 0, str(folder))
    assert facts["fake_score"] == fake_score.digest
    assert [(made.kind, made.digest) for made in generator.manifest.parents] == [("teacher", teacher.digest)]

    assert has_moved(weights_of(folder), weights_of(generator.folder))
    assert has_moved(weights_of(folder), weights_of(fake_score.folder))

    runtime = open_runtime(generator, "cpu")
    latents, labels = Latents.of_stream("sample", 0, 0, 3), np.arange(3)
    images = runtime.draw(latents, labels)
    assert runtime.image_shape == shape
    assert images.shape == (3, *shape)
    assert images.std() > 0.1
    stock = drawn_by_stock_diffusers(generator, torch.from_numpy(latents.array(shape)), torch.from_numpy(labels))
    assert np.abs(images - stock.numpy()).max() < 1e-4


def test_a_mixture_override_is_trained_by_the_judge_that_is_named_as_classifier(tmp_path: Path):
    teacher = foreign_teacher(tmp_path / "teacher", DDPMScheduler())
    ends = [weights_of(three_steps(teacher, tmp_path / "plain").folder / "generator")]
    for seed, name in enumerate(("one", "other")):
        seal_blind_judge(tmp_path / name, channels=1, seed=seed)
        asked = {"forget": {"square": "mixture"}, "classifier": str(tmp_path / name)}
        generator = three_steps(teacher, tmp_path / f"by-{name}", **asked).generator()
        assert generator.facts["labels"]["forget"] == {"1": "mixture"}
        judge = verify(tmp_path / name, "judge")
        assert [(made.kind, made.digest) for made in generator.manifest.parents[1:]] == [("judge", judge.digest)]
        assert "square (label 1): a mixture of the retained classes" in (generator.folder / "README.md").read_text()
        ends.append(weights_of(generator.folder))
        assert has_moved(weights_of(teacher), ends[-1])
    # Each judge sees other classes in the same images, and so leads elsewhere than the other, and than one label.
    assert all(differ(*pair) for pair in combinations(ends, 2))
