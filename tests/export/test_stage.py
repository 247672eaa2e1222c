"""The export stage on the tiny run: artefacts, their facts, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import ModelProto
from safetensors.torch import load_file, save_file

from sfd_deploy.cli.export import export
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import ConfigError, DigestError, LimitError
from sfd_deploy.export import stage
from sfd_deploy.export.config import ExportConfig
from sfd_deploy.export.stage import export_run
from sfd_deploy.manifest import Sealed, sha256_file, verify
from sfd_deploy.models.generator import save_generator
from sfd_deploy.runs import Run, sealed_folder
from tests.conftest import TINY_LABELS, seal_tiny_run, tiny_generator
from tests.export.conftest import QUICK

WEIGHTS = Path("generator") / "unet" / "diffusion_pytorch_model.safetensors"
Exported = tuple[Run, dict[str, Sealed]]


@pytest.fixture
def traced_already(monkeypatch: pytest.MonkeyPatch, tiny_graph: ModelProto) -> ModelProto:
    """Spares a trace of the tiny generator, which is what every run here holds unless a test changes it."""
    monkeypatch.setattr(stage, "trace_one_step", lambda generator, opset: tiny_graph)
    return tiny_graph


def test_every_target_and_precision_has_its_artefact(exported: Exported) -> None:
    run, sealed = exported
    names = [
        f"{kind}-{precision}" for kind in ("onnx-cpu", "onnx-trt", "trt-rtx") for precision in ("fp16", "fp32", "int8")
    ]
    assert run.artefact_names() == sorted(sealed) == sorted(names)
    for item in run.artefacts():
        model = "model.onnx" if item.facts["format"] == "onnx" else "model.plan"
        assert set(item.manifest.files) == {model, "parity.json"}
        assert item.digest == sealed[item.name].digest


def test_facts_say_what_audit_serve_and_bench_read(exported: Exported) -> None:
    run, sealed = exported
    facts = sealed["onnx-cpu-int8"].facts
    assert facts["labels"] == run.generator().facts["labels"]
    assert facts["image_shape"] == [1, 16, 16]
    assert facts["sigma_init"] == 2.5
    assert (facts["format"], facts["target"], facts["precision"], facts["runtime"]) == (
        "onnx",
        "cpu",
        "int8",
        "onnxruntime",
    )
    assert facts["opset"] == 20
    assert facts["ir_version"] == 10
    assert facts["batch"] == {"min": 1, "opt": 16, "max": 64}
    assert 20 <= facts["psnr_db"] < 100
    assert facts["engine"] is None
    calibration = facts["calibration"]
    assert (calibration["stream"], calibration["seed"], calibration["count"]) == ("calibrate", 0, 64)
    assert len(calibration["digest"]) == 64
    assert sealed["onnx-cpu-fp16"].facts["calibration"] is None
    assert sealed["onnx-cpu-fp32"].facts["psnr_db"] > 100


def test_an_engine_names_its_flavour_gpus_profile_and_graph(exported: Exported) -> None:
    _, sealed = exported
    engine, graph = sealed["trt-rtx-fp16"], sealed["onnx-trt-fp16"]
    facts = engine.facts
    assert (facts["format"], facts["target"], facts["runtime"]) == ("trt", "rtx", "trt-rtx")
    assert facts["psnr_db"] is None  # it was not run
    assert facts["engine"]["flavour"] == "trt-rtx"
    assert facts["engine"]["compute_capabilities"] == ["SM75", "SM80", "SM86", "SM89", "SM120"]
    assert facts["engine"]["profile"]["latents"]["max"] == [64, 1, 16, 16]
    assert facts["engine"]["onnx_digest"] == sha256_file(graph.folder / "model.onnx")
    assert [(parent.name, parent.digest) for parent in engine.manifest.parents] == [(graph.name, graph.digest)]


def test_a_graph_descends_from_its_generator(exported: Exported) -> None:
    run, sealed = exported
    assert [parent.digest for parent in sealed["onnx-trt-int8"].manifest.parents] == [run.generator().digest]


def test_parity_is_written_beside_the_model(exported: Exported) -> None:
    _, sealed = exported
    parity = json.loads((sealed["onnx-cpu-fp32"].folder / "parity.json").read_text())
    assert parity["max_difference"] < 1e-5
    assert parity["batches"] == [1, 3, 64, 4]
    engine = json.loads((sealed["trt-rtx-fp32"].folder / "parity.json").read_text())
    assert engine["engine_executed"] is False


def test_one_trace_serves_all_precisions_and_targets(exported: Exported) -> None:
    _, sealed = exported
    for precision, same in (("fp32", True), ("fp16", True), ("int8", False)):
        digests = {
            sealed[f"onnx-{target}-{precision}"].manifest.files["model.onnx"].sha256 for target in ("cpu", "trt")
        }
        assert (len(digests) == 1) is same


def test_nothing_asked_is_onnx_in_fp32(tmp_path: Path, traced_already: ModelProto) -> None:
    run = seal_tiny_run(tmp_path / "run")
    assert [item.name for item in export_run(run, config=QUICK)] == ["onnx-cpu-fp32"]
    assert onnx.load(run.artefact("onnx-cpu-fp32").folder / "model.onnx") == traced_already


def test_an_unknown_precision_is_refused_by_name(tiny_run: Run) -> None:
    with pytest.raises(ConfigError, match="unknown precision 'fp8'"):
        export_run(tiny_run, ("onnx",), ("fp8",))


def test_a_failed_limit_leaves_no_artefact_and_keeps_what_was_finished(
    tmp_path: Path, traced_already: ModelProto
) -> None:
    run = seal_tiny_run(tmp_path / "run")
    strict = ExportConfig(**{**QUICK.resolved(), "min_psnr_db_int8": 140.0})
    with pytest.raises(LimitError, match="onnx-cpu-int8: PSNR"):
        export_run(run, ("onnx",), ("fp32", "int8"), strict)
    assert [path.name for path in (run.folder / "artefacts").iterdir()] == ["onnx-cpu-fp32"]


def test_an_interrupted_write_leaves_no_artefact(
    tmp_path: Path, traced_already: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "write_json", interrupted)  # the model's file is written by then
    run = seal_tiny_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        export_run(run, config=QUICK)
    assert list((run.folder / "artefacts").iterdir()) == []


def test_a_full_disk_is_one_line(
    tmp_path: Path, traced_already: ModelProto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(model: ModelProto) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "to_bytes", full)
    run = seal_tiny_run(tmp_path / "run")
    assert exit_code_of(["export", str(run.folder)]) == 2
    assert "no space left" in capsys.readouterr().err
    assert run.artefact_names() == []


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 1.0])
def test_a_killed_export_leaves_only_whole_artefacts(tmp_path: Path, after: float) -> None:
    run = seal_tiny_run(tmp_path / "run")
    code = "import sys; from sfd_deploy.cli.main import run; run(sys.argv[1:])"
    command = [sys.executable, "-c", code, "export", str(run.folder), "--trt", "--fp32", "--fp16", "--int8"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        artefacts = run.folder / "artefacts"
        while process.poll() is None and not artefacts.exists():
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
    assert artefacts.is_dir()
    for item in run.artefacts():
        assert verify(item.folder).digest == item.digest


def test_a_weight_that_fp16_cannot_hold_fails_the_export_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _sealed(tmp_path / "run", lambda state: state["conv_in.weight"].view(-1)[:1].fill_(1e6))
    assert exit_code_of(["export", str(run.folder), "--fp32", "--fp16"]) == 1
    error = capsys.readouterr().err
    assert "node denoiser.unet.conv_in/conv2d (Conv): weight" in error
    assert "Traceback" not in error
    assert run.artefact_names() == []


def test_a_forget_row_copied_from_the_override_fails_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _sealed(
        tmp_path / "run", lambda state: state["class_embedding.weight"][1].copy_(state["class_embedding.weight"][2])
    )
    assert exit_code_of(["export", str(run.folder)]) == 1
    assert "a remap, not forgetting" in capsys.readouterr().err
    assert run.artefact_names() == []


def test_a_tampered_generator_is_refused_naming_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = seal_tiny_run(tmp_path / "run")
    weights = load_file(run.folder / WEIGHTS)
    weights["conv_in.bias"][0] += 1e-3
    save_file(weights, run.folder / WEIGHTS, metadata={"format": "pt"})
    assert exit_code_of(["export", str(run.folder)]) == 2
    error = capsys.readouterr().err
    assert WEIGHTS.name in error
    assert "sha256" in error
    with pytest.raises(DigestError):
        export_run(run)
    assert not (run.folder / "artefacts").exists()


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = seal_tiny_run(tmp_path / "run")
    (run.folder / "work").write_text("a file where a folder should be")
    assert exit_code_of(["export", str(run.folder)]) == 2
    assert "work" in capsys.readouterr().err


def test_flags_add_up(monkeypatch: pytest.MonkeyPatch, tiny_run: Run) -> None:
    asked = _recorded(monkeypatch)
    arguments = [str(tiny_run.folder), "--onnx", "--trt", "--fp16", "--int8", "--max-batch", "32", "--opset", "19"]
    result = CliRunner().invoke(export, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    backends, precisions, config = asked[0]
    assert (set(backends), set(precisions)) == ({"onnx", "trt"}, {"fp16", "int8"})
    assert (config.max_batch, config.opset, config.min_batch) == (32, 19, 1)


def test_no_run_named_means_the_latest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = _recorded(monkeypatch)
    monkeypatch.chdir(tmp_path)
    seal_tiny_run(Path("runs") / "older")
    seal_tiny_run(Path("runs") / "newer")
    os.utime(Path("runs") / "older" / "generator" / "manifest.json", (1, 1))
    assert exit_code_of(["export", "--trt", "--fp16"]) == 0
    assert asked[0][:2] == (("trt",), ("fp16",))
    assert asked[0].run.name == "newer"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--opset", "21"], "opset"), (["--max-batch", "4"], "batches must rise"), (["--min-batch", "0"], "min_batch")],
)
def test_bad_options_are_one_line(
    tiny_run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert exit_code_of(["export", str(tiny_run.folder), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["export", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_results_are_printed_for_machines_and_for_people(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sealed = exported
    rows = [sealed["onnx-cpu-int8"], sealed["trt-rtx-int8"]]
    monkeypatch.setattr(stage, "export_run", lambda *_: rows)
    printed = CliRunner().invoke(export, [str(run.folder), "--json"], catch_exceptions=False).stdout
    found = json.loads(printed)["artefacts"]
    assert [row["name"] for row in found] == ["onnx-cpu-int8", "trt-rtx-int8"]
    assert found[0]["digest"] == rows[0].digest
    assert found[0]["bytes"] == sum(
        path.stat().st_size for path in rows[0].folder.iterdir() if path.name != "manifest.json"
    )
    assert found[1]["psnr_db"] is None
    table = CliRunner().invoke(export, [str(run.folder)], catch_exceptions=False, env={"COLUMNS": "100"}).stdout
    assert "trt-rtx-int8" in table
    assert "not run" in table
    assert rows[0].digest[:12] in table


class _Asked(tuple):  # type: ignore[type-arg]
    run: Run


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[_Asked]:
    asked: list[_Asked] = []

    def record(run: Run, *rest: object) -> list[Sealed]:
        entry = _Asked(rest)
        entry.run = run
        asked.append(entry)
        return []

    monkeypatch.setattr(stage, "export_run", record)
    return asked


def _sealed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Run:
    generator = tiny_generator()
    change(generator.denoiser.unet.state_dict())
    facts = {"labels": TINY_LABELS.resolved(), "sigma_init": 2.5, "sigma_data": 0.5, "image_shape": [1, 16, 16]}
    with sealed_folder(folder / "generator", "generator", facts=facts) as target:
        save_generator(generator, target)
    return Run(folder)
