"""One training after another: a second stage, a further label, and the inputs that may not be mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from safetensors.torch import load_file

from sfd_deploy.embedded import resolve
from sfd_deploy.errors import ConfigError, LabelError, RunError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import ClassifierConfig
from sfd_deploy.models.generator import save_generator, save_teacher
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.data import LabelledImages
from sfd_deploy.training.inputs import load_start, open_inputs
from sfd_deploy.training.judge import JudgeConfig, seal_judge
from sfd_deploy.training.kinds import resume
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.stage import train
from tests.conftest import tiny_generator
from tests.models.tiny import foreign_folder

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CLASSES = Labels(class_names=("circle", "square", "star"))


def seal_teacher(folder: Path, seed: int = 0) -> Sealed:
    facts = {"labels": CLASSES.resolved(), "sigma_data": 0.5, "image_shape": [1, 16, 16]}
    with sealed_folder(folder, "teacher", facts=facts) as target:
        save_teacher(tiny_generator(seed).denoiser, target)
    return verify(folder, "teacher")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    return seal_teacher(tmp_path_factory.mktemp("teachers") / "tiny")


def config(teacher: Sealed, **changes: object) -> TrainConfig:
    values = {
        "teacher": str(teacher.folder), "iterations": 2, "retained_rows": 3, "forget_rows": 1, "precision": "fp32",
        "monitor": {"every": 0, "tensorboard": False},
    } | changes  # fmt: skip
    return TrainConfig.from_mapping(values, "test")


@pytest.fixture(scope="module")
def distilled(teacher: Sealed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config(teacher), tmp_path_factory.mktemp("runs") / "distilled")


@pytest.fixture(scope="module")
def forgotten(teacher: Sealed, distilled: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    changed = config(teacher, init_from=str(distilled.folder), forget={"square": "star"})
    return train(changed, tmp_path_factory.mktemp("runs") / "forgotten")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def equal(state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(state[name], value) for name, value in weights.items())


def test_distillation_alone_forgets_nothing(distilled: Run):
    facts = distilled.generator().facts
    assert facts["labels"]["forget"] == {}
    assert "Forgotten:\n- nothing" in (distilled.folder / "generator" / "README.md").read_text()
    rows = [json.loads(line) for line in (distilled.folder / "generator" / "training.jsonl").read_text().splitlines()]
    assert "gap_forget" not in rows[-1]


def test_a_second_stage_starts_from_the_firsts_generator_and_fake_score_and_its_own_teacher(
    teacher: Sealed, distilled: Run
):
    """Three different sets of weights, so that none can stand for another."""
    inputs = open_inputs(config(teacher, init_from=str(distilled.folder), forget={"square": "star"}))
    start = load_start(inputs, config(teacher), tiny_generator().denoiser)
    generator, psi = weights_of(distilled.folder / "generator"), weights_of(distilled.folder / "fake-score")
    phi = weights_of(teacher.folder)
    assert not equal(generator, psi)
    assert not equal(generator, phi)
    assert not equal(psi, phi)
    assert equal(start.generator.unet.state_dict(), generator)  # type: ignore[union-attr]
    assert equal(start.fake_score.unet.state_dict(), psi)  # type: ignore[union-attr]
    assert inputs.teacher.digest == teacher.digest


def test_a_second_stages_lineage_names_the_teacher_and_the_first_stage(teacher: Sealed, distilled: Run, forgotten: Run):
    sealed = forgotten.generator()
    assert [(parent.kind, parent.digest) for parent in sealed.manifest.parents] == [
        ("teacher", teacher.digest), ("generator", distilled.generator().digest),
    ]  # fmt: skip
    assert sealed.facts["fake_score"] == verify(forgotten.folder / "fake-score", "fake-score").digest
    assert sealed.facts["exported"] == {"step": 2, "rule": "the last step's average"}


def test_a_further_label_keeps_every_earlier_one_in_the_forget_part(teacher: Sealed, forgotten: Run, tmp_path: Path):
    again = train(config(teacher, init_from=str(forgotten.folder), forget={"circle": "star"}), tmp_path / "two")
    assert again.generator().facts["labels"]["forget"] == {"1": 2, "0": 2}
    kept = open_inputs(config(teacher, init_from=str(forgotten.folder)))
    assert kept.labels.forget == {1: 2}


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ({"square": "circle"}, "square was forgotten earlier, star in its place"),
        ({"circle": "square"}, "override square was forgotten earlier"),
        ({"star": "circle"}, "override star is forgotten itself and cannot stand for square"),
    ],
)
def test_re_teaching_and_chains_are_refused(teacher: Sealed, forgotten: Run, forget, message):
    with pytest.raises(LabelError, match=message):
        open_inputs(config(teacher, init_from=str(forgotten.folder), forget=forget))


def test_an_earlier_run_of_another_teacher_is_refused(teacher: Sealed, distilled: Run, tmp_path: Path):
    other = seal_teacher(tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=f"its teacher was {teacher.digest[:12]}, this one is {other.digest[:12]}"):
        open_inputs(config(other, init_from=str(distilled.folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_init": 200.0}, "sigma_init 200: the teacher's noise levels go from 0.01 to 157"),
        ({"sigma_init": 0.005, "sigma_min": 0.001}, "sigma_init 0.005: the teacher's noise levels"),
        ({"sigma_min": 160.0, "sigma_max": 200.0}, "sigma_min 160 to sigma_max 200: the teacher's noise levels"),
        ({"sigma_min": 1e-4, "sigma_max": 5e-3}, "sigma_max 0.005: the teacher's noise levels"),
    ],
)
def test_noise_levels_beyond_the_teachers_schedule_are_refused(tmp_path: Path, changes, message):
    foreign = open_teacher(str(foreign_folder(tmp_path / "foreign", "epsilon")))
    with pytest.raises(ConfigError, match=message):
        train(config(foreign, **changes), tmp_path / "run")


@pytest.mark.parametrize("sigma_min", [0.2, 0.1])
def test_noise_levels_where_a_consistency_model_draws_what_it_is_given_are_refused(tmp_path: Path, sigma_min: float):
    """There its network has no say: ψ would be fitted with an infinite weight."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.2, sigma_data=0.5)
    foreign_folder(tmp_path / "foreign", "epsilon")
    scheduler.save_pretrained(tmp_path / "foreign" / "scheduler")
    foreign = open_teacher(str(tmp_path / "foreign"))
    with pytest.raises(ConfigError, match=f"sigma_min {sigma_min}: at 0.2 the teacher draws what it is given"):
        train(config(foreign, sigma_min=sigma_min), tmp_path / "run")
    train(config(foreign, sigma_min=0.3), tmp_path / "run")


@pytest.mark.parametrize("place", ["generator", "fake-score"])
def test_a_place_that_is_taken_is_said_before_the_first_step(teacher: Sealed, tmp_path: Path, place: str):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=f"{place}: exists and is not one of ours"):
        train(config(teacher), tmp_path)
    assert not (tmp_path / "work" / "checkpoint.safetensors").exists()


def test_a_pinned_teacher_digest_is_held(teacher: Sealed):
    assert open_inputs(config(teacher, teacher_digest=teacher.digest[:16])).teacher.digest == teacher.digest
    with pytest.raises(ConfigError, match="teacher_digest says 000000000000"):
        open_inputs(config(teacher, teacher_digest="0" * 12))


def test_another_fake_score_and_another_noise_level_are_refused(teacher: Sealed, distilled: Run, tmp_path: Path):
    moved = tmp_path / "moved"
    with sealed_folder(moved / "fake-score", "fake-score", facts={"labels": CLASSES.resolved()}) as target:
        save_teacher(tiny_generator(3).denoiser, target)
    (moved / "generator").symlink_to(distilled.folder / "generator")
    with pytest.raises(RunError, match="is not the fake score of this run's generator"):
        open_inputs(config(teacher, init_from=str(moved)))
    inputs = open_inputs(config(teacher, init_from=str(distilled.folder)))
    with pytest.raises(RunError, match=r"draws at sigma_init 2\.5, the config says 3"):
        load_start(inputs, config(teacher, sigma_init=3.0), tiny_generator().denoiser)


def test_a_fake_score_that_went_missing_is_not_replaced_in_silence(teacher: Sealed, tmp_path: Path):
    first = train(config(teacher), tmp_path / "first")
    shutil.rmtree(first.folder / "fake-score")
    with pytest.raises(RunError, match="fake-score: missing, and this run's generator had one; restore it"):
        open_inputs(config(teacher, init_from=str(first.folder), forget={"square": "star"}))


def seal_blind_judge(target: Path, channels: int, seed: int = 0) -> None:
    """A judge with random weights, measured on black images."""
    asked = JudgeConfig(classifier=ClassifierConfig(architecture="plain", channels=channels, widths=(4,)))
    images = LabelledImages(np.zeros((6, channels, 16, 16), np.uint8), np.arange(6) % 3, CLASSES.class_names)
    torch.manual_seed(seed)
    seal_judge(asked, asked.classifier.build(3).eval(), images, images, target, "black")


def test_a_mixtures_classifier_may_be_a_shipped_judge_by_its_name():
    asked = {"forget": {"Trouser": "mixture"}, "classifier": "fashion-mnist/judge-plain"}
    inputs = open_inputs(TrainConfig.from_mapping({"teacher": "fashion-mnist", "iterations": 1} | asked, "test"))
    assert inputs.classifier is not None
    assert inputs.classifier.digest == resolve("fashion-mnist/judge-plain", "judge").digest
    assert inputs.classifier.digest in {parent.digest for parent in inputs.parents}


def test_a_judge_of_other_images_is_refused_before_the_first_step(teacher: Sealed, tmp_path: Path):
    seal_blind_judge(tmp_path / "judge", channels=3)
    watched = config(teacher, monitor={"judge": str(tmp_path / "judge"), "every": 1})
    with pytest.raises(LabelError, match="judge judge cannot look at images of 1 x 16 x 16"):
        train(watched, tmp_path / "run")
    assert not (tmp_path / "run" / "work" / "checkpoint.safetensors").exists()


def test_a_stopped_run_goes_on_in_more_parts_and_with_its_judge_elsewhere_but_not_with_another(
    teacher: Sealed, tmp_path: Path
):
    for seed, name in enumerate(("judge", "other")):
        seal_blind_judge(tmp_path / name, channels=1, seed=seed)

    def go_on(judge: Path, **changes: object) -> Run:
        look = {"judge": str(judge), "every": 1, "samples": 2, "tensorboard": False}
        asked = {"iterations": 4, "checkpoint_every": 1, "forget": {"square": "star"}, "monitor": look}
        return train(config(teacher, **(asked | changes)), tmp_path / "run")

    with dying_in_step(2):
        go_on(tmp_path / "judge")
    with pytest.raises(ConfigError, match=r"another config \(judges differ\)"):
        go_on(tmp_path / "other")
    (tmp_path / "judge").rename(tmp_path / "moved")
    facts = go_on(tmp_path / "moved", accumulate=2).generator().facts
    assert facts["exported"]["step"] in range(1, 5)
    assert facts["watched_by"] == [verify(tmp_path / "moved", "judge").digest]
    assert go_on(tmp_path / "moved").generator().facts == facts
    with pytest.raises(RunError, match="its looks were rated by another judge"):
        go_on(tmp_path / "other")


def test_a_run_without_a_fake_score_starts_that_at_the_teacher(teacher: Sealed, tmp_path: Path):
    """An adopted generator: nobody kept what followed it."""
    facts = {"labels": CLASSES.resolved(), "sigma_init": 2.5, "sigma_data": 0.5}
    with sealed_folder(tmp_path / "adopted" / "generator", "generator", facts=facts) as target:
        save_generator(tiny_generator(5), target)
    inputs = open_inputs(config(teacher, init_from=str(tmp_path / "adopted")))
    start = load_start(inputs, config(teacher), tiny_generator().denoiser)
    assert start.fake_score is None
    assert start.generator is not None


@contextmanager
def dying_in_step(last: int) -> Iterator[None]:
    """Any training dies in step ``last``, and its death is expected."""
    original = SfdLoop.iterate

    def die(self: SfdLoop, step: int, watched: bool = False):
        if step == last:
            raise KeyboardInterrupt
        return original(self, step, watched)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SfdLoop, "iterate", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_resuming_by_the_run_alone_ends_with_the_same_weights(teacher: Sealed, tmp_path: Path):
    changed = config(teacher, forget={"square": "star"}, iterations=4, checkpoint_every=1)
    whole = train(changed, tmp_path / "whole")
    with dying_in_step(2):
        train(changed, tmp_path / "stopped")
    resumed = resume(tmp_path / "stopped")
    for name in ("generator", "fake-score"):
        assert equal(weights_of(whole.folder / name), weights_of(resumed.folder / name))
    with pytest.raises(RunError, match="no training to resume"):
        resume(tmp_path / "nothing")


@pytest.fixture
def stopped_beside_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``project/`` with a teacher, an earlier run named by its name alone, and ``runs/stopped``, stopped in step 2."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    near = seal_teacher(Path("teacher"))
    train(config(near), Path("runs/first"))
    asked = {"iterations": 4, "checkpoint_every": 1, "init_from": "first", "forget": {"square": "star"}}
    with dying_in_step(2):
        train(config(near, **asked), Path("runs/stopped"))
    return project


def test_a_run_is_resumed_from_any_folder_whatever_its_inputs_are_called_by(
    stopped_beside_its_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = Path("../project/runs/stopped")
    assert resume(asked) == Run(asked)
    assert asked.resolve() == stopped_beside_its_inputs / "runs" / "stopped"
    assert Run(asked).generator().facts["labels"]["forget"] == {"1": 2}
    assert Path.cwd() == tmp_path / "elsewhere"


def test_a_project_that_was_moved_is_resumed_from_where_it_is_now(
    stopped_beside_its_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped_beside_its_inputs.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    finished = resume(Path("runs/stopped")).generator()
    assert finished.facts["teacher"] == str(tmp_path / "moved" / "teacher")


def test_a_stopped_run_goes_on_with_its_teacher_elsewhere(tmp_path: Path):
    asked = {"iterations": 4, "checkpoint_every": 1}
    with dying_in_step(3):
        train(config(seal_teacher(tmp_path / "teacher"), **asked), tmp_path / "run")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    moved = verify(tmp_path / "moved", "teacher")
    finished = train(config(moved, **asked), tmp_path / "run").generator()
    assert finished.facts["teacher"] == str(tmp_path / "moved")
    assert train(config(moved, **asked), tmp_path / "run").generator().digest == finished.digest


def test_an_unfinished_run_does_not_go_on_with_another_teacher_of_the_same_name(tmp_path: Path):
    changed = config(seal_teacher(tmp_path / "teacher"), checkpoint_every=1, forget={"square": "star"})
    with dying_in_step(1):
        train(changed, tmp_path / "run")
    seal_teacher(tmp_path / "teacher", seed=1)
    with pytest.raises(ConfigError, match=r"another config \(inputs differ\)"):
        train(changed, tmp_path / "run")


def test_a_checkpoint_belongs_to_the_earlier_runs_fake_score_too(teacher: Sealed, distilled: Run):
    found = open_inputs(config(teacher, init_from=str(distilled.folder), forget={"square": "star"}))
    psi = verify(distilled.folder / "fake-score", "fake-score").digest
    assert found.digests == {"inputs": [teacher.digest, distilled.generator().digest, psi]}
