"""The main job by its own command, as a newcomer runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.serving.install import Triton

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
