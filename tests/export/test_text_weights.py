"""Parts above protobuf's 2 GB: weights in a file of their own, with the limit lowered so that a tiny U-Net is one."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sfd_deploy.errors import DigestError, ModelError
from sfd_deploy.export import text_stage, weights
from sfd_deploy.export.graph import tidy, to_bytes
from sfd_deploy.export.graph_file import write_graph
from sfd_deploy.export.text_stage import export_text_run
from sfd_deploy.export.weights import require_one_file, typed_stand_in
from sfd_deploy.manifest import Sealed, sha256_file
from sfd_deploy.runs import Run
from sfd_deploy.runtime.text import PARTS, TextOnnxRuntime
from sfd_deploy.runtime.trt import RTX
from tests.export.text_runs import QUICK, exported_text_run, seal_text_run

LIMIT = 100_000  # of the tiny parts' 70 to 500 kB only the U-Net is above, in every precision
ASKED = ["a red sandal", "a green bag"]


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_LIMIT", LIMIT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Sealed]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights, "FILE_LIMIT", LIMIT)
        run = seal_text_run(tmp_path_factory.mktemp("large") / "run")
        sealed = export_text_run(run, ("onnx",), ("fp32", "fp16", "int8"), QUICK)
    return run, {item.name: item for item in sealed}


def latents() -> np.ndarray:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).numpy()


def drawn(folder: Path, precision: str = "fp32") -> np.ndarray:
    runtime = TextOnnxRuntime(folder, precision, ASKED)
    return runtime.decode(runtime.step(latents(), runtime.encode(ASKED)))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_images_are_those_of_one_file(exported: tuple[Run, dict[str, Sealed]], precision: str):
    large, whole = exported[1][f"onnx-cpu-{precision}"], exported_text_run("sd1")[1][f"onnx-cpu-{precision}"]
    assert (large.folder / "unet" / "model.onnx_data").stat().st_size > LIMIT
    assert not (whole.folder / "unet" / "model.onnx_data").exists()
    assert np.array_equal(drawn(large.folder, precision), drawn(whole.folder, precision))


def test_the_graph_s_file_keeps_what_tools_read_first_and_no_weight(exported: tuple[Run, dict[str, Sealed]]):
    sealed = exported[1]["onnx-cpu-fp32"]
    inside = onnx.load(sealed.folder / "unet" / "model.onnx", load_external_data=False).graph.initializer
    held = {item.data_location for item in inside if item.name.endswith("weight") and np.prod(item.dims) >= 256}
    assert held == {TensorProto.EXTERNAL}
    assert all(item.data_location != TensorProto.EXTERNAL for item in inside if item.data_type == TensorProto.INT64)
    onnx.checker.check_model(str(sealed.folder / "unet" / "model.onnx"), full_check=True)
    for part in set(PARTS) - {"unet"}:
        assert [path.name for path in (sealed.folder / part).glob("model.onnx*")] == ["model.onnx"]


def test_the_data_file_is_in_the_manifest_and_a_flipped_byte_in_it_is_refused(exported: tuple[Run, dict[str, Sealed]]):
    run, sealed = exported[0], exported[1]["onnx-cpu-fp32"]
    file = sealed.folder / "unet" / "model.onnx_data"
    assert sealed.manifest.files["unet/model.onnx_data"].sha256 == sha256_file(file)
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        with pytest.raises(DigestError, match=r"model\.onnx_data"):
            run.artefact(sealed.name)
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_optimum_loads_it(exported: tuple[Run, dict[str, Sealed]], precision: str):
    pytest.importorskip("optimum.onnxruntime", reason="needs Optimum: pip install 'sfd-deploy[t2i]'")
    folder = exported[1][f"onnx-cpu-{precision}"].folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        pipe = ORTStableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            ASKED, num_inference_steps=1, guidance_scale=1.0, latents=torch.from_numpy(latents()), output_type="np"
        ).images  # fmt: skip
    np.testing.assert_allclose(images.transpose(0, 3, 1, 2) * 2 - 1, drawn(folder, precision), atol=1e-3)


def product(half: bool = False) -> ModelProto:
    """y = x W of 200 x 200, and a small bias."""
    draws = np.random.default_rng(0)
    kind = np.float16 if half else np.float32
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16 if half else TensorProto.FLOAT, ["batch", 200])
              for name in ("x", "y")]  # fmt: skip
    constants = {"w": draws.standard_normal((200, 200)).astype(kind), "b": draws.standard_normal(1).astype(kind)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], "p"), helper.make_node("Add", ["p", "b"], ["y"], "y")]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_read_back_to_the_bit_by_onnx_and_drawn_by_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
):
    monkeypatch.setattr(weights, "FILE_LIMIT", 50_000)
    model = product(half)
    write_graph(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx_data").stat().st_size == 200 * 200 * (2 if half else 4)
    read = onnx.load(tmp_path / "model.onnx")
    for tensor in read.graph.initializer:
        tensor.ClearField("data_location")  # set by onnx to what it is anyway
    assert to_bytes(read) == to_bytes(model)
    x = np.random.default_rng(1).standard_normal((3, 200)).astype(np.float16 if half else np.float32)
    sessions = [onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
                for source in (str(tmp_path / "model.onnx"), to_bytes(model))]  # fmt: skip
    ours, whole = (session.run(None, {"x": x})[0] for session in sessions)
    assert np.array_equal(ours, whole)


@pytest.mark.usefixtures("lowered")
def test_a_graph_that_no_message_holds_is_typed_and_checked_without_its_weights():
    model = product()
    stand_in = typed_stand_in(model)
    assert [item.name for item in stand_in.graph.initializer] == ["b"]
    assert len(to_bytes(stand_in)) < 1000
    typed = tidy(model)
    (between,) = [item for item in typed.graph.value_info if item.name == "p"]
    assert [dim.dim_param or dim.dim_value for dim in between.type.tensor_type.shape.dim] == ["batch", 200]
    assert [item.name for item in typed.graph.initializer] == ["w", "b"]
    assert [item.name for item in typed.graph.input] == ["x"]


@pytest.mark.usefixtures("lowered")
def test_equal_graphs_give_equal_files(tmp_path: Path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_graph(product(), tmp_path / name / "model.onnx")
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.usefixtures("lowered")
def test_an_engine_of_such_a_graph_is_refused_with_the_precision_that_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_stage, "build_engine", lambda *_: pytest.fail("was given a graph that it cannot read"))
    compiler, made = SimpleNamespace(config=QUICK), SimpleNamespace(graphs={"unet": product()}, precision="fp32")
    with pytest.raises(ModelError, match=r"unet: .* TensorRT's parser takes graphs of 2 GB at most") as refused:
        text_stage._Compiler._engine(compiler, "trt-fp32", "unet", made, RTX)  # type: ignore[arg-type]
    assert "--trt --fp16" in str(refused.value.mend)
    assert refused.value.exit_code == 2


def test_the_limit_is_protobuf_s_two_gigabytes_less_the_nodes():
    assert 2**31 - 2**27 < weights.FILE_LIMIT < 2**31
    claimed = helper.make_model(helper.make_graph([], "claimed", [], [], [
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[859_520_964])
    ]))  # fmt: skip
    with pytest.raises(ModelError, match=r"3\.44 GB of weights"):  # the U-Net of Stable Diffusion 1.5
        require_one_file(claimed, "unet", "TensorRT's parser", "export --trt --fp16")
