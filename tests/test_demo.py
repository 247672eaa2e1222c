"""The main job by its own command, as a newcomer runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfd_deploy import demo
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import RunError
from sfd_deploy.evidence import AuditRecord, read_record
from sfd_deploy.manifest import Sealed
from sfd_deploy.policy.plan import Policy
from sfd_deploy.runs import Run
from sfd_deploy.serving.install import Triton
from sfd_deploy.serving.launch import started
from tests.serving.fixtures import MODEL, row_of, seal_audit

RUNNABLE = [
    "generator", "onnx-cpu-fp16", "onnx-cpu-fp32", "onnx-cpu-int8", "onnx-trt-fp16", "onnx-trt-fp32", "onnx-trt-int8",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(1800)
def test_the_demo_trains_compiles_audits_and_serves_and_its_summary_says_so(triton: Triton, tmp_path: Path):
    output = tmp_path / "demo"
    code = exit_code_of(["demo", "--output", str(output), "--triton", str(triton.folder), "--set-up-seconds", "7"])
    summary = json.loads((output / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["artefacts"]}
    assert code == summary["exit_code"] == 0
    assert summary["seconds"]["set_up"] == 7
    assert [name for name, row in rows.items() if row["verdict"] == "pass"] == RUNNABLE
    assert all(row["forget"]["upper_99"] <= 0.01 for row in rows.values() if row["forget"])
    assert summary["served"] == {"http": True, "grpc": True, "images_match": True}


@pytest.fixture
def audited_already(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Spares the stages before serving: ``run`` is given by the test, the rest is what they were asked."""
    asked: dict[str, Any] = {}

    def audited(selection: Any, *, policy: Policy, probes: str | None) -> tuple[AuditRecord, Sealed]:
        asked.update(probes=probes, policy=policy.name)
        run = asked["run"]
        sealed = seal_audit(run, row_of(run.artefact(MODEL)), policy_digest=policy.digest)
        return read_record(sealed), sealed

    monkeypatch.setattr(demo.Demo, "require_teacher", lambda self: None)
    monkeypatch.setattr(demo, "load_config", lambda name: asked.setdefault("config", name))
    monkeypatch.setattr(demo, "run_training", lambda config, folder: asked["run"])
    monkeypatch.setattr(demo, "export_any", lambda run, *what: asked.setdefault("exported", what))
    monkeypatch.setattr(demo, "audit_selection", audited)
    return asked


def test_a_demo_without_its_teacher_is_refused_before_triton_is_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def missing(name: str, kind: str) -> Sealed:
        raise RunError(f"{name}: no such {kind}", "train it")

    monkeypatch.setattr(demo, "resolve", missing)
    triton = tmp_path / "triton"
    assert exit_code_of(["demo", "--text-to-image", "--output", str(tmp_path), "--triton", str(triton)]) == 2
    assert "fashion-t2i: no such teacher" in capsys.readouterr().err
    assert not triton.exists()


ASKED = {
    "audited_run": ([], "fashion-mnist", (("onnx", "trt"), ("fp32", "fp16", "int8"), {}), None, "default"),
    "audited_text_run": (
        ["--text-to-image"], "fashion-t2i-sandal", (("onnx",), ("fp32", "int8"), {}), "fashion-t2i-sandal",
        "fashion-t2i",
    ),
}  # fmt: skip


@pytest.mark.triton
@pytest.mark.parametrize("kind", ASKED)
def test_each_demo_serves_what_passed_and_compares_what_clients_get(
    kind: str, request: pytest.FixtureRequest, audited_already: dict[str, Any], triton: Triton, tmp_path: Path
):
    run: Run = request.getfixturevalue(kind)
    audited_already["run"] = run
    options, *expected = ASKED[kind]
    code = exit_code_of(["demo", *options, "--output", str(run.folder), "--triton", str(triton.folder)])
    summary = json.loads((run.folder / "summary.json").read_text())
    assert [audited_already[key] for key in ("config", "exported", "probes", "policy")] == expected
    assert code == summary["exit_code"] == 0
    assert [row["name"] for row in summary["artefacts"]] == [MODEL]
    assert summary["served"] == {"http": True, "grpc": True, "images_match": True}


@pytest.mark.triton
def test_served_images_of_other_prompts_fail_the_demo(
    audited_text_run: Run, audited_already: dict[str, Any], triton: Triton, monkeypatch: pytest.MonkeyPatch
):
    audited_already["run"] = audited_text_run
    ask = demo.TritonRuntime.draw_uint8
    monkeypatch.setattr(demo, "launched", started)  # without its own comparison
    monkeypatch.setattr(
        demo.TritonRuntime, "draw_uint8", lambda self, latents, labels: ask(self, latents, np.zeros_like(labels))
    )
    folder = audited_text_run.folder
    assert exit_code_of(["demo", "--text-to-image", "--output", str(folder), "--triton", str(triton.folder)]) == 1
    assert json.loads((folder / "summary.json").read_text())["served"]["images_match"] is False
