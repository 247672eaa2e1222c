"""The watch over a training, on the toy world of the audit's tests: gratings, a trained judge, painted networks."""

from __future__ import annotations

import copy
import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta

from sfd_deploy.errors import ConfigError, DivergedError, LabelError
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.network import NetworkConfig
from sfd_deploy.runtime.pytorch import GeneratorRuntime, TeacherRuntime
from sfd_deploy.training.monitor import MonitorConfig, Watch
from sfd_deploy.training.previews import device_of, draw_by_label
from sfd_deploy.training.rating import DrawLabel, Experts, Look, Rating, excused_bound, rank
from sfd_deploy.training.teacher import label_agreement
from tests.audit.toy import (
    LABELS,
    NAMES,
    Painter,
    ToyRuntime,
    forgetful,
    gratings,
    leaking,
    noise,
    seal_judge,
    stored,
    teacher_painter,
)
from tests.conftest import tiny_generator


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "plain"
    seal_judge(folder, "plain", 1)
    return folder


@pytest.fixture(autouse=True)
def painters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfd_deploy.training.monitor.GeneratorRuntime", lambda painter, device: ToyRuntime(painter))
    monkeypatch.setattr("sfd_deploy.training.monitor.TeacherRuntime", lambda painter, *_: ToyRuntime(painter))
    monkeypatch.setattr("sfd_deploy.training.monitor.device_of", lambda painter: "cpu")


def watch(folder: Path, judge: Path | None, labels: Labels = LABELS, **changes: object) -> Watch:
    values = {"judge": None if judge is None else str(judge), "samples": 40, "previews": 3, "every": 5} | changes
    return Watch(MonitorConfig.from_mapping(values, "test"), labels, folder / "previews", teacher_painter)  # type: ignore[arg-type]


def rated(watching: Watch) -> Rating:
    assert watching.rating is not None
    return watching.rating


def best_step(watching: Watch) -> int | None:
    best = rated(watching).best
    return None if best is None else best.step


def blurry(z, labels):
    """The start of a training: right on average, hardly any variety, and a judge names it right."""
    return 0.8 * forgetful(0 * z, labels) + 0.2 * forgetful(z, labels)


def override_for_all(z, labels):
    return gratings(z, np.full_like(labels, 3))


RIVALS: dict[str, Painter] = {
    "collapsed": stored, "blurry": blurry, "noise": noise, "override for all": override_for_all,
    "leaking": leaking(0.5), "nothing forgotten": teacher_painter,
}  # fmt: skip


@pytest.mark.parametrize("rival", RIVALS)
def test_the_honest_generator_is_picked_over_every_bad_one_seen_before_or_after(rival, judge_folder, tmp_path):
    for order in permutations(("honest", rival)):
        watching = watch(tmp_path, judge_folder)
        for step, name in enumerate(order, start=1):
            watching.look(step, forgetful if name == "honest" else RIVALS[rival])  # type: ignore[arg-type]
        assert best_step(watching) == order.index("honest") + 1


def test_a_blurry_start_scores_as_high_as_a_judge_can_and_loses_by_its_spread_alone(judge_folder, tmp_path):
    watching = watch(tmp_path, judge_folder)
    figures = watching.look(1, blurry)  # type: ignore[arg-type]
    assert (figures["watch/forget-rate"], figures["watch/retained-accuracy"]) == (0, 1)
    assert figures["watch/spread"] < 0.5


def test_figures_are_what_the_judge_says_of_the_select_streams_images(judge_folder, tmp_path):
    painter = leaking(0.4)
    figures = watch(tmp_path, judge_folder).look(1, painter)  # type: ignore[arg-type]
    latents = {label: Latents.of_stream("select", 0, label * 1000, 40).array((1, 12, 12)) for label in range(4)}
    judge = open_judge(judge_folder)
    named = {label: judge.look(painter(z, np.full(40, label)))[0] for label, z in latents.items()}
    hits = int((named[1] == 1).sum())
    assert 8 <= hits <= 24
    assert figures["watch/forget-rate"] == hits / 40
    assert figures["watch/forget-bound"] == pytest.approx(beta.ppf(0.95, hits + 1, 40 - hits))
    assert figures["watch/retained-accuracy"] == pytest.approx(np.mean([named[k] == k for k in (0, 2, 3)]))


def test_a_resumed_watch_gives_the_record_of_an_unbroken_one(judge_folder, tmp_path):
    sequence = [blurry, leaking(0.5), forgetful, stored]
    whole = watch(tmp_path, judge_folder)
    for step, painter in enumerate(sequence):
        whole.look(step, painter)  # type: ignore[arg-type]
    first, second = watch(tmp_path, judge_folder), watch(tmp_path, judge_folder)
    for step, painter in enumerate(sequence[:2]):
        first.look(step, painter)  # type: ignore[arg-type]
    rated(second).restore(json.loads(json.dumps(rated(first).state())))
    second.teacher = noise  # type: ignore[assignment]  # the yardstick is kept, not measured again
    for step, painter in enumerate(sequence[2:], start=2):
        second.look(step, painter)  # type: ignore[arg-type]
    assert rated(second).state() == rated(whole).state()
    assert best_step(second) == best_step(whole) == 2
    with pytest.raises(ConfigError, match="unknown key `stop`"):
        rated(second).restore({"looks": [{"stop": 3}]})


@pytest.mark.parametrize(("size", "expected"), [(28, 128), (64, 32), (256, 2), (1024, 1)])
def test_of_large_images_fewer_are_drawn_at_once(size, expected):
    """A training that fits died at its first look, of 128 images at once."""
    drawn: list[int] = []

    def paint(latents, labels):
        drawn.append(len(labels))
        return np.zeros((len(labels), 1, size, size), np.float32)

    images = draw_by_label(ToyRuntime(paint, image_shape=(1, size, size)), [0, 1], expected + 1)
    assert images.shape == (2, expected + 1, 1, size, size)
    assert max(drawn) == expected


def test_the_agreement_draws_no_more_at_once_than_a_look(judge_folder, monkeypatch):
    drawn: list[int] = []

    def runtime(*_) -> ToyRuntime:
        return ToyRuntime(lambda latents, labels: drawn.append(len(labels)) or teacher_painter(latents, labels))

    monkeypatch.setattr("sfd_deploy.training.teacher.TeacherRuntime", runtime)
    monkeypatch.setattr("sfd_deploy.training.previews.DRAW_BATCH", 16)
    found = label_agreement(tiny_generator().denoiser, LABELS, [open_judge(judge_folder)], 40)
    assert max(drawn) == 16
    assert sum(drawn) == 40 * LABELS.count
    assert found["plain"] > 0.9


@pytest.mark.parametrize("judged", [True, False])
def test_of_many_labels_a_preview_has_the_forgotten_and_the_first(judged, judge_folder, tmp_path, monkeypatch):
    """A thousand classes would be eight thousand images a look."""
    monkeypatch.setattr("sfd_deploy.training.monitor.LABELS_SHOWN", 2)
    ((forgotten, override),) = LABELS.forget.items()
    seen = []
    monkeypatch.setattr("sfd_deploy.training.monitor.save_preview", lambda images, *_: seen.append(images))
    watch(tmp_path, judge_folder if judged else None, previews=3).look(5, teacher_painter)  # type: ignore[arg-type]
    expected = draw_by_label(ToyRuntime(teacher_painter), sorted({forgotten, override}), 3)  # type: ignore[arg-type]
    assert np.array_equal(seen[0], expected)


def test_previews_are_a_row_a_label_with_the_same_latents_every_time(judge_folder, tmp_path):
    watching = watch(tmp_path, judge_folder, previews=3)
    watching.look(50, forgetful)  # type: ignore[arg-type]
    watching.look(100, forgetful)  # type: ignore[arg-type]
    watch(tmp_path, None, previews=3).look(150, forgetful)  # type: ignore[arg-type]
    files = sorted((tmp_path / "previews").iterdir())
    assert [file.name for file in files] == ["step-000050.png", "step-000100.png", "step-000150.png"]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    with Image.open(files[0]) as picture:
        assert picture.size == (5 * (3 * 13 - 1), 5 * (4 * 13 - 1))  # 12 pixels, a gap of 1, enlarged 5 times
        rows = np.asarray(picture)[2::5, 2::5].astype(float).reshape(-1, 38)
    first = gratings(Latents.of_stream("select", 0, 2000, 1).array((1, 12, 12)), np.array([2]))[0, 0]
    assert np.abs(rows[26:38, :12] - (first + 1) * 127.5).max() <= 0.5


def test_without_a_judge_nothing_is_rated_and_no_step_is_best(tmp_path):
    watching = watch(tmp_path, None, previews=0)
    assert watching.look(5, noise) == {}  # type: ignore[arg-type]
    assert watching.rating is None
    assert not (tmp_path / "previews").exists()


def test_looks_are_due_every_so_many_steps_and_at_the_last_or_never(tmp_path):
    often, never = watch(tmp_path, None, every=5), watch(tmp_path, None, every=0)
    assert [step for step in range(1, 13) if often.due(step, last=step == 12)] == [5, 10, 12]
    assert not any(never.due(step, last=step == 12) for step in range(1, 13))


def test_nothing_forgotten_is_ranked_by_accuracy(judge_folder, tmp_path):
    watching = watch(tmp_path, judge_folder, labels=LABELS.plain())
    assert watching.look(1, gratings)["watch/forget-bound"] == 0  # type: ignore[arg-type]
    watching.look(2, teacher_painter)  # type: ignore[arg-type]
    assert best_step(watching) == 1


def test_a_judge_of_other_classes_is_refused(judge_folder, tmp_path):
    with pytest.raises(LabelError, match="plain knows other classes"):
        watch(tmp_path, judge_folder, labels=Labels(class_names=("a", "b", "c", "d")))


def on_two_backgrounds(seed: int) -> Painter:
    """Gratings, one in ten of them on another background; latents of its own, so that only luck tells two apart."""
    rng = np.random.default_rng(seed)

    def paint(z, labels):
        drawn = gratings(rng.normal(size=z.shape).astype(np.float32), labels)
        return drawn + 4 * (rng.random((len(z), 1, 1, 1)) < 0.1).astype(np.float32)

    return paint


def test_a_generator_that_draws_just_as_the_teacher_is_not_thought_collapsed_by_chance(judge_folder, tmp_path):
    as_read, by_bound = [], []
    for seed in range(20):
        watching = watch(tmp_path, judge_folder, labels=LABELS.plain(), previews=0)
        watching.teacher = on_two_backgrounds(seed)  # type: ignore[assignment]
        figures = watching.look(1, on_two_backgrounds(100 + seed))  # type: ignore[arg-type]
        as_read.append(figures["watch/spread"] >= 0.7)
        by_bound.append(figures["watch/spread-bound"] >= 0.7)
    assert np.mean(as_read) < 0.8
    assert np.mean(by_bound) >= 0.95


def look(**changes: float) -> Look:
    values = {
        "step": 1, "forget_rate": 0.0, "forget_bound": 0.05, "excused_bound": 0.05, "retained_accuracy": 0.9,
        "accuracy_ratio": 1.0, "spread_ratio": 0.95, "spread_error": 0.0,
    } | changes  # fmt: skip
    return Look.from_mapping(values, "test")


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (look(spread_ratio=0.75, retained_accuracy=0.91), look(spread_ratio=0.99)),  # both healthy: accuracy decides
        (look(spread_ratio=0.6), look(spread_ratio=0.5, forget_bound=0.01, retained_accuracy=1.0)),
        (look(forget_bound=0.2), look(spread_ratio=2.0, retained_accuracy=1.0)),  # noise, blown up
        (look(forget_bound=0.2), look(accuracy_ratio=0.3, retained_accuracy=0.3)),  # the override for everything
        (look(forget_bound=0.06), look(forget_bound=0.07, retained_accuracy=1.0)),
        (look(forget_bound=0.05, retained_accuracy=0.92), look(forget_bound=0.01)),  # within the judge's own error
        (look(step=2), look(step=1)),
        (look(spread_ratio=0.1), look(spread_ratio=0.0)),
        # 0.68 with an error of 2 % may well be 0.7 (0.68 exp(0.0329) = 0.703); 0.67 is shown to be less (0.692).
        (look(spread_ratio=0.68, spread_error=0.02, retained_accuracy=0.91), look(spread_ratio=0.99)),
        (look(spread_ratio=0.99), look(spread_ratio=0.67, spread_error=0.02, retained_accuracy=0.91)),
        (look(spread_ratio=1.47, spread_error=0.02, retained_accuracy=0.91), look(spread_ratio=0.99)),
    ],
)  # fmt: skip
def test_the_rule_puts_health_before_forgetting_before_accuracy(better, worse):
    assert rank(better) > rank(worse)


def test_a_best_look_that_forgot_nothing_is_doubted_and_an_honest_one_is_not(judge_folder, tmp_path):
    watching = watch(tmp_path, judge_folder)
    assert rated(watching).doubt == ""
    watching.look(1, RIVALS["nothing forgotten"])  # type: ignore[arg-type]
    # The teacher errs on 2 of 40 latents; Clopper-Pearson's 95 % bound of 38 of 40.
    bound = f"at most {beta.ppf(0.95, 39, 2):.1%}"
    assert rated(watching).doubt == (
        f"the exported look, of step 1, still draws what was to be forgotten in 95.0% of images ({bound})"
    )
    watching.look(2, forgetful)  # type: ignore[arg-type]
    assert rated(watching).doubt == ""


def judge_that_calls(mistaken: int) -> Judge:
    """Real images: 100 a class, ``mistaken`` of the last called the second. Drawn ones are called by their value."""
    truth = np.repeat([0, 1, 2, 3], 100)
    called = truth.copy()
    called[300 : 300 + mistaken] = 1
    look = lambda images: (images[:, 0, 0, 0].astype(int), None)
    return SimpleNamespace(held_out=np.stack([truth, called]), class_names=NAMES, look=look)  # type: ignore[return-value]


def test_the_excuse_is_what_the_judges_error_on_real_override_images_makes_likely():
    """2 of 100 override images called the forget label: of 40, up to 2 in 95 % of draws (binomial, by hand)."""
    judge = judge_that_calls(mistaken=2)
    at_most = [sum(_binomial(40, k, 0.02) for k in range(hits + 1)) for hits in range(4)]
    assert at_most[1] < 0.95 < at_most[2]
    assert excused_bound(Experts.of(judge, LABELS), 1, 40) == pytest.approx(beta.ppf(0.95, 3, 38))
    several = Labels(class_names=NAMES, forget={0: 2, 1: "mixture"})
    # The mixture may draw 2 or 3: one error in 100 on average, at most 2 of 40.
    assert excused_bound(Experts.of(judge, several), 1, 40) == pytest.approx(beta.ppf(0.95, 3, 38))
    assert excused_bound(Experts.of(judge, several), 0, 40) == pytest.approx(beta.ppf(0.95, 1, 40))


def two_forgotten(*looks: dict[int, int]) -> Rating:
    """A rating of ``looks`` at 40 images a label, of which so many are drawn as the forget label.

    The judge calls 10 of 100 real override images label 1, none label 0: of 40, up to 7 in 95 % of draws (binomial).
    """
    labels = Labels(class_names=NAMES, forget={0: 2, 1: 3})

    def drawing(hits: dict[int, int]) -> DrawLabel:
        def draw(label: int, count: int) -> np.ndarray:
            shown = np.full(count, labels.forget.get(label, label), np.float32)
            shown[: hits.get(label, 0)] = label
            return np.broadcast_to(shown[:, None, None, None], (count, 1, 2, 2)).copy()

        return draw

    rating = Rating(Experts.of(judge_that_calls(mistaken=10), labels), 40, drawing({}))
    for step, hits in enumerate(looks, start=1):
        rating.look(step, drawing(hits))
    return rating


@pytest.mark.parametrize(
    ("hits", "worst", "excused"), [({0: 3, 1: 6}, 3, 0), ({0: 6, 1: 3}, 6, 0), ({1: 12}, 12, 7), ({}, 0, 0)]
)
def test_of_several_forget_labels_the_one_farthest_above_its_own_excuse_counts(hits, worst: int, excused: int):
    (found,) = two_forgotten(hits).looks
    assert found.forget_rate == worst / 40
    assert found.forget_bound == pytest.approx(beta.ppf(0.95, worst + 1, 40 - worst))
    assert found.excused_bound == pytest.approx(beta.ppf(0.95, excused + 1, 40 - excused))


def test_a_label_that_leaks_is_not_excused_by_what_the_judge_mistakes_for_another():
    """The clean look is exported although the leaking one comes later; alone, the leaking one is doubted."""
    assert two_forgotten({}, {0: 6}).best.step == 1
    assert two_forgotten({0: 6}).doubt
    assert two_forgotten({}, {1: 6}).best.step == 2  # as many of the label that the judge does mistake are luck
    assert not two_forgotten({1: 6}).doubt


def test_a_look_at_images_that_are_no_number_says_that_the_training_diverged(judge_folder, tmp_path):
    watching = watch(tmp_path, judge_folder)
    watching.look(1, forgetful)  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match="the look at step 2 is of images that are no number"):
        watching.look(2, lambda latents, labels: forgetful(latents, labels) * np.float32(np.nan))  # type: ignore[arg-type]


def _binomial(n: int, k: int, p: float) -> float:
    from math import comb

    return comb(n, k) * p**k * (1 - p) ** (n - k)


def test_real_networks_are_looked_at_without_a_trace(judge_folder, tmp_path, monkeypatch: pytest.MonkeyPatch):
    for name, real in (("GeneratorRuntime", GeneratorRuntime), ("TeacherRuntime", TeacherRuntime)):
        monkeypatch.setattr(f"sfd_deploy.training.monitor.{name}", real)
    torch.manual_seed(0)
    unet = NetworkConfig(image_size=12, channels=1, block_channels=(8, 16), norm_groups=4).build(4)
    teacher = EdmDenoiser(unet, 0.5).eval()
    generator = OneStepGenerator(copy.deepcopy(teacher), 2.5).eval()
    monkeypatch.setattr("sfd_deploy.training.monitor.device_of", device_of)
    before = [value.clone() for net in (teacher, generator) for value in net.state_dict().values()]
    random_state = torch.get_rng_state()
    watching = watch(tmp_path, judge_folder)
    watching.teacher = teacher
    figures = watching.look(1, generator)
    assert set(figures) == {
        f"watch/{name}" for name in ("forget-rate", "forget-bound", "retained-accuracy", "spread", "spread-bound")
    }
    assert best_step(watching) == 1
    after = [value for net in (teacher, generator) for value in net.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in generator.parameters())
