"""The real thing, small: the shipped teacher and judges, a short training, planted faults, a real server.

The honest run is the control: each planted fault must fail where it passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sfd_deploy.audit import stage as audit_stage
from sfd_deploy.bench import forgetting, latency, markdown
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.embedded import resolve
from sfd_deploy.export.stage import export_run
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import Judge
from sfd_deploy.models.generator import labels_of
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime
from sfd_deploy.runtime.seam import Images, Runtime, to_uint8
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.stage import train
from tests.fashion import BAG, TROUSER, policy_file, rows, shipped_judges

pytestmark = pytest.mark.timeout(2400)  # the first test trains a generator, on one core

# As the default policy, with fewer teacher images: the teacher is the slow one.
POLICY = {"name": "test", "retained_samples": 100, "reference_samples": 60}


@pytest.fixture(scope="module")
def judges() -> list[Judge]:
    return shipped_judges()


@pytest.fixture(scope="module")
def fashion_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo's training, stopped half way, exported to FP32 and INT8 graphs: it must pass already."""
    config = TrainConfig.load("fashion-mnist", "train").resolved() | {"iterations": 300}
    run = train(TrainConfig.from_mapping(config, "test"), tmp_path_factory.mktemp("fashion") / "run")
    export_run(run, ["onnx"], ["fp32", "int8"])
    return run


@pytest.fixture(scope="module")
def audited(fashion_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Run]:
    policy = policy_file(tmp_path_factory.mktemp("policy"), POLICY)
    return exit_code_of(["audit", str(fashion_run.folder), "--policy", policy]), fashion_run


def test_the_honest_run_passes_in_every_precision(audited: tuple[int, Run]):
    code, run = audited
    found = rows(run)
    assert {name: (row["verdict"], row["reasons"]) for name, row in found.items()} == {
        name: ("pass", []) for name in ("generator", "onnx-cpu-fp32", "onnx-cpu-int8")
    }
    assert code == 0
    assert all(row["figures"]["forget"]["upper"] <= 0.01 for row in found.values())


class Planted:
    """A runtime that draws with another's permission, and leaks."""

    def __init__(self, inner: Runtime, draw) -> None:
        self.inner, self._draw = inner, draw
        self.name, self.settings, self.image_shape = inner.name, inner.settings, inner.image_shape

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        return self._draw(self.inner, latents, labels)

    def close(self) -> None:
        self.inner.close()


def leak(share: float):
    """The teacher's image for ``share`` of the latents."""
    teacher = open_runtime(resolve("fashion-mnist", "teacher"))

    def draw(inner: Runtime, latents: Latents, labels: NDArray[np.int64]) -> Images:
        images = inner.draw(latents, labels).copy()
        chosen = np.flatnonzero(latents.seeds % 1000 < 1000 * share)
        if len(chosen):
            images[chosen] = teacher.draw(Latents(latents.seeds[chosen]), labels[chosen])
        return images

    return draw


def noise(inner: Runtime, latents: Latents, labels: NDArray[np.int64]) -> Images:
    return np.tanh(latents.array(inner.image_shape))


def one_stored_image(inner: Runtime, latents: Latents, labels: NDArray[np.int64]) -> Images:
    first = Latents(np.full(len(labels), 12345, np.int64))
    return inner.draw(first, labels)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(lambda: leak(0.05), "forget"), (lambda: noise, "retained"), (lambda: one_stored_image, "spread")],
    ids=["5 % leak of the teacher", "noise", "one stored image per class"],
)
def test_a_planted_fault_fails_with_the_audit_command_unchanged(
    audited: tuple[int, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault, reason
):
    _, run = audited
    draw = fault()

    def open_planted(sealed: Sealed, device: str = "auto") -> Runtime:
        runtime = open_runtime(sealed, device)
        return Planted(runtime, draw) if sealed.name == "onnx-cpu-fp32" else runtime

    monkeypatch.setattr(audit_stage, "open_runtime", open_planted)
    arguments = ["audit", str(run.folder / "artefacts" / "onnx-cpu-fp32"), "--policy", policy_file(tmp_path, POLICY)]
    assert exit_code_of(arguments) == 1
    row = rows(run)["onnx-cpu-fp32"]
    assert row["verdict"] == "fail"
    assert any(reason in text for text in row["reasons"])


def test_the_forget_row_of_the_embedding_is_its_own(fashion_run: Run):
    from sfd_deploy.models.generator import load_generator

    table = load_generator(fashion_run.generator()).denoiser.unet.class_embedding.weight
    assert not np.allclose(table[TROUSER].numpy(), table[BAG].numpy(), atol=1e-3)


def test_bench_tables_have_a_row_for_everything_that_runs(fashion_run: Run, judges: list[Judge]):
    timed = latency(fashion_run, batches=(4,), rounds=3)
    assert [row.name for row in timed] == ["teacher", "generator", "onnx-cpu-fp32", "onnx-cpu-int8"]
    assert {row.name: row.times_generator for row in timed}["generator"] == 1.0
    assert all(row.times_teacher > 2 for row in timed[1:])  # 35 evaluations against one
    table = forgetting(fashion_run, judges, samples=200, per_label=10)
    baseline = next(row for row in table if row.name == "onnx-cpu-fp32")
    assert (baseline.only_here, baseline.only_fp32, baseline.p_value) == (0, 0, 1.0)
    assert markdown(table).count("\n") == len(table) + 1


@pytest.fixture(scope="module")
def server(audited: tuple[int, Run], triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from sfd_deploy.policy.plan import Policy
    from sfd_deploy.serving.launch import launched, servable
    from sfd_deploy.serving.stage import build_repository

    _, run = audited
    folder = tmp_path_factory.mktemp("serve-policy")
    assert exit_code_of(["audit", str(run.folder), "--policy", policy_file(folder, POLICY)]) == 0
    digest = Policy.load(policy_file(folder, POLICY), "policy").digest
    with launched(servable(build_repository(run, digest)), triton, run.work / "triton.log") as running:
        yield running


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_served_images_are_what_was_asked_for_and_bags_for_trousers(
    server, audited: tuple[int, Run], judges: list[Judge], protocol
):
    from sfd_deploy.runtime.endpoint import TritonRuntime

    _, run = audited
    artefact = run.artefact("onnx-cpu-int8")
    address = server.http if protocol == "http" else server.grpc
    client, local = TritonRuntime(address, "onnx-cpu-int8", protocol), open_runtime(artefact)
    labels = np.repeat(np.arange(10), 200)
    latents = Latents.of_stream("sample", 1, 0, len(labels))
    served = client.draw_uint8(latents, labels)
    client.close()
    drawn = np.concatenate([to_uint8(local.draw(latents[i : i + 64], labels[i : i + 64])) for i in range(0, 2000, 64)])
    assert np.abs(served.astype(int) - drawn.astype(int)).max() <= 1
    expected = np.where(labels == TROUSER, labels_of(artefact).forget[TROUSER], labels)
    images = served.astype(np.float32) / 127.5 - 1
    for judge in judges:
        called = judge.look(images)[0]
        assert (called == expected).mean() > 0.8
        assert (called[labels == TROUSER] == TROUSER).mean() <= 0.01
        assert (called[labels == TROUSER] == BAG).mean() > 0.85
