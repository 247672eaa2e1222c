"""Exporting a text-to-image run: artefacts that stock pipelines load and draw with, and what fails an export."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import StableDiffusionPipeline
from onnx import numpy_helper

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import DigestError, LimitError, RunError
from sfd_deploy.export import text_stage
from sfd_deploy.export.config import TextExportConfig
from sfd_deploy.export.kinds import export_any
from sfd_deploy.export.text_graphs import Graphs
from sfd_deploy.export.text_samples import spread
from sfd_deploy.export.text_stage import export_text_run
from sfd_deploy.manifest import Sealed, sha256_file
from sfd_deploy.prompts import Prompts
from sfd_deploy.runs import Run
from sfd_deploy.runtime.text import PARTS, TextOnnxRuntime
from sfd_deploy.runtime.trt import RTX
from tests.export.text_runs import PROMPTS, QUICK, exported_text_run, seal_text_run
from tests.text_world import Layout

ASKED = ["a red sandal", "a green bag", "a coat on a black background"]
needs_rtx = pytest.mark.skipif(RTX.module() is None, reason=f"needs TensorRT for RTX: {RTX.mend}")


def artefact(name: str, layout: Layout = "sd1") -> Sealed:
    return exported_text_run(layout)[1][name]


def traced() -> Graphs:
    """The tiny generator's FP32 graphs as they were traced, spared a second trace."""
    folder = artefact("onnx-cpu-fp32").folder
    graphs: Graphs = {part: onnx.load(folder / part / "model.onnx") for part in PARTS}
    del graphs["unet"].graph.input[1]  # the timestep that is added when a folder is written
    return graphs


def latents_for(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def drawn_by(pipe: Any, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
    """A stock pipeline's images in [-1, 1], one unguided step."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompts, num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="np").images
    return images.transpose(0, 3, 1, 2) * 2 - 1


def drawn_by_ours(folder: Path, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
    runtime = TextOnnxRuntime(folder, "fp32", prompts)
    return runtime.decode(runtime.step(latents.numpy(), runtime.encode(prompts)))


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_the_fp32_artefact_draws_what_stock_diffusers_draws_from_the_generator(layout: Layout):
    run, sealed = exported_text_run(layout)
    expected = drawn_by(StableDiffusionPipeline.from_pretrained(run.folder / "generator"), ASKED, latents_for(3))
    ours = drawn_by_ours(sealed["onnx-cpu-fp32"].folder, ASKED, latents_for(3))
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(("layout", "precision"), [("sd1", "fp32"), ("sd2", "fp32"), ("sd1", "fp16"), ("sd1", "int8")])
def test_optimum_loads_the_artefact_folder_and_draws_the_same_images(layout: Layout, precision: str):
    pytest.importorskip("optimum.onnxruntime", reason="needs Optimum: pip install 'sfd-deploy[t2i]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.onnxruntime import ORTStableDiffusionPipeline
    folder = artefact(f"onnx-cpu-{precision}", layout).folder
    for prompts in (ASKED, ASKED[:1]):
        latents = latents_for(len(prompts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = drawn_by(ORTStableDiffusionPipeline.from_pretrained(folder), prompts, latents)
        ours = drawn_by_ours(folder, prompts, latents)
        # Batches shape INT8 sums; rounding is then a step of a scale, not of a float.
        np.testing.assert_allclose(theirs, ours, atol=1e-5 if precision == "fp32" else 1e-3)


def test_every_target_and_precision_has_its_artefact_and_its_files():
    run, sealed = exported_text_run("sd1")
    targets = ("onnx-cpu", "onnx-trt", "trt-rtx") if RTX.module() is not None else ("onnx-cpu",)
    assert run.artefact_names() == sorted(sealed)
    assert set(sealed) == {f"{target}-{precision}" for target in targets for precision in ("fp32", "fp16", "int8")}
    files = set(sealed["onnx-cpu-int8"].manifest.files)
    assert {f"{part}/{name}" for part in PARTS for name in ("model.onnx", "config.json")} < files
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
            "prompts.json", "parity.json"} < files  # fmt: skip


def test_facts_say_what_audit_serve_and_bench_will_read():
    run, _ = exported_text_run("sd1")
    item = artefact("onnx-cpu-int8")
    facts = item.facts
    assert facts["kind"] == "text-to-image"
    assert (facts["image_shape"], facts["latent_shape"]) == ([3, 16, 16], [4, 8, 8])
    assert facts["sigma_init"] == pytest.approx(2.5017, abs=1e-4)
    assert (facts["format"], facts["target"], facts["runtime"], facts["precision"]) == (
        "onnx", "cpu", "onnxruntime", "int8",
    )  # fmt: skip
    assert facts["precisions"] == {"text_encoder": "fp32", "unet": "int8", "vae_decoder": "fp32"}
    assert facts["prompts"] == 7
    assert facts["batch"] == {"min": 1, "opt": 1, "max": 8}
    assert facts["calibration"]["count"] == 16
    assert set(facts["range"]) == {"samples", *PARTS}
    assert 20 <= facts["psnr_db"] < 100
    assert [parent.digest for parent in item.manifest.parents] == [run.generator().digest]
    assert json.loads((item.folder / "prompts.json").read_text()) == PROMPTS.resolved()


def test_the_prompts_digest_tells_other_prompts_apart():
    changed = PROMPTS.model_copy(update={"forget": {3: 4}})
    digest = artefact("onnx-cpu-fp32").facts["prompts_digest"]
    assert digest == artefact("onnx-cpu-int8").facts["prompts_digest"]
    assert digest != text_stage.digest_of(changed.resolved())


def test_parity_says_how_far_images_and_encodings_are_from_pytorch():
    parity = json.loads((artefact("onnx-cpu-fp32").folder / "parity.json").read_text())
    assert parity["max_difference"] < 1e-4
    assert parity["encoding_difference"] < 1e-4
    assert parity["batches"] == [1, 3, 8, 4]


@needs_rtx
def test_engines_of_all_three_parts_are_built_and_name_their_graphs():
    engine, graph = artefact("trt-rtx-fp16"), artefact("onnx-trt-fp16")
    facts = engine.facts
    assert {f"{part}/model.plan" for part in PARTS} < set(engine.manifest.files)
    assert "tokenizer/vocab.json" in engine.manifest.files
    assert facts["psnr_db"] is None  # it was not run
    assert facts["engine"]["onnx_digest"]["unet"] == sha256_file(graph.folder / "unet" / "model.onnx")
    assert facts["engine"]["compute_capabilities"] == ["SM75", "SM80", "SM86", "SM89", "SM120"]
    profile = facts["engine"]["profile"]
    assert profile["unet"]["sample"]["max"] == [8, 4, 8, 8]
    assert "timestep" not in profile["unet"]
    assert profile["text_encoder"] == {"input_ids": {"min": [1, 16], "opt": [1, 16], "max": [8, 16]}}
    assert [(parent.name, parent.digest) for parent in engine.manifest.parents] == [(graph.name, graph.digest)]


@needs_rtx
def test_only_int8_differs_between_targets():
    for precision, same in (("fp32", True), ("fp16", True), ("int8", False)):
        digests = {artefact(f"onnx-{target}-{precision}").manifest.files["unet/model.onnx"].sha256
                   for target in ("cpu", "trt")}  # fmt: skip
        assert (len(digests) == 1) is same


@pytest.mark.parametrize(("prompts", "count"), [(7, 16), (6000, 64), (65, 64)])
def test_samples_ask_for_every_prompt_in_turn_or_evenly_for_all(prompts: int, count: int):
    numbers = spread(0, 0, count, prompts).labels
    assert len(numbers) == count
    assert numbers.dtype == np.int64
    assert set(numbers) == set(range(prompts)) if prompts <= count else len(set(numbers)) == count
    assert numbers.max() > 0.98 * (prompts - 1)  # forget prompts stand last


def test_one_flipped_byte_of_an_artefact_is_refused_naming_the_file(tmp_path: Path):
    shutil.copytree(exported_text_run("sd1")[0].folder, tmp_path / "run")
    file = tmp_path / "run" / "artefacts" / "onnx-cpu-fp32" / "vae_decoder" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DigestError, match=r"vae_decoder/model\.onnx"):
        Run(tmp_path / "run").artefact("onnx-cpu-fp32")


@pytest.fixture
def traced_already(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Spares a trace of the tiny generator; what a test does to these graphs, the trace did."""
    graphs = traced()
    monkeypatch.setattr(text_stage, "trace_text_generator", lambda parts, sigma_init, opset: graphs)
    return graphs


def scale_weight(graphs: Graphs, part: str, name: str, factor: float) -> None:
    (tensor,) = (item for item in graphs[part].graph.initializer if item.name.endswith(name))  # type: ignore[index]
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_the_command_takes_a_text_run_and_prints_its_artefact(
    tmp_path: Path, traced_already: Graphs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TextExportConfig, "from_mapping", classmethod(lambda cls, values, source: QUICK))
    run = seal_text_run(tmp_path / "run")
    assert exit_code_of(["export", str(run.folder), "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["artefacts"]
    assert (printed["name"], printed["precision"]) == ("onnx-cpu-fp32", "fp32")
    assert run.artefact_names() == ["onnx-cpu-fp32"]


def test_settings_of_the_command_line_reach_the_text_export(monkeypatch: pytest.MonkeyPatch):
    asked: list[TextExportConfig] = []
    monkeypatch.setattr(text_stage, "export_text_run", lambda run, backends, precisions, config: asked.append(config))
    export_any(exported_text_run("sd1")[0], (), (), {"max_batch": 2})
    assert (asked[0].max_batch, asked[0].opt_batch) == (2, 1)


def test_prompts_that_are_one_to_the_text_encoder_are_a_remap(
    tmp_path: Path, traced_already: Graphs, capsys: pytest.CaptureFixture[str]
):
    # CLIP's tokenizer knows no case: whatever forgot one of these forgot the other.
    prompts = Prompts(texts=("", "a coat", "A Red Sandal", "a red sandal"), retained=(1,), forget={2: 3})
    run = seal_text_run(tmp_path / "run", prompts=prompts)
    assert exit_code_of(["export", str(run.folder)]) == 1
    assert "'A Red Sandal' and 'a red sandal' are one to the text encoder" in capsys.readouterr().err
    assert run.artefact_names() == []


@pytest.mark.parametrize(
    ("part", "weight"), [("text_encoder", "token_embedding.weight"), ("vae_decoder", "conv_in.weight")]
)
def test_a_number_that_fp16_cannot_hold_is_refused_naming_part_and_node(
    tmp_path: Path, traced_already: Graphs, part: str, weight: str
):
    scale_weight(traced_already, part, weight, 1e7)
    run = seal_text_run(tmp_path / "run")
    with pytest.raises(LimitError, match=rf"node {part[:3]}.*: weight .*{weight} reaches .*fp16 \({part}\)"):
        export_text_run(run, ("onnx",), ("fp16",), QUICK)
    assert run.artefact_names() == []


@pytest.mark.parametrize(
    ("part", "weight", "said"),
    [
        ("text_encoder", "token_embedding.weight", "encoded prompts differ from PyTorch's by"),
        ("unet", "conv_out.weight", "onnx-cpu-fp32: differs from PyTorch by"),
        ("vae_decoder", "conv_out.weight", "onnx-cpu-fp32: differs from PyTorch by"),
    ],
)
def test_a_part_that_departs_from_pytorch_is_not_sealed(
    tmp_path: Path, traced_already: Graphs, part: str, weight: str, said: str
):
    scale_weight(traced_already, part, weight, 1.1)
    run = seal_text_run(tmp_path / "run")
    with pytest.raises(LimitError, match=said):
        export_text_run(run, config=QUICK)
    assert run.artefact_names() == []


def test_a_generator_that_records_no_prompts_is_refused(tmp_path: Path):
    run = seal_text_run(tmp_path / "run")
    (run.folder / "generator" / "prompts.json").unlink()
    manifest = run.folder / "generator" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["files"]["prompts.json"]
    manifest.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"prompts\.json"):
        export_text_run(run, config=QUICK)


def test_a_tampered_generator_is_one_line_naming_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = seal_text_run(tmp_path / "run")
    file = run.folder / "generator" / "tokenizer" / "merges.txt"
    file.write_text(file.read_text() + "a b\n")
    assert exit_code_of(["export", str(run.folder)]) == 2
    error = capsys.readouterr().err
    assert "merges.txt" in error
    assert "sha256" in error


def test_batches_that_cannot_be_are_one_line(capsys: pytest.CaptureFixture[str]):
    run = exported_text_run("sd1")[0]
    assert exit_code_of(["export", str(run.folder), "--opt-batch", "16"]) == 2
    assert "batches must rise: min 1, opt 16, max 8" in capsys.readouterr().err
