"""Real TensorRT engines by NVIDIA's own builder, which needs no GPU; none is run here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from sfd_deploy.errors import BackendError, GraphError
from sfd_deploy.export import engine
from sfd_deploy.export.config import ExportConfig
from sfd_deploy.export.engine import build_engine, find_flavour, fraction, target_capabilities
from sfd_deploy.export.fp16 import to_fp16
from sfd_deploy.export.graph import to_bytes
from sfd_deploy.export.int8 import to_int8
from sfd_deploy.export.samples import Samples
from sfd_deploy.progress import LOGGER
from sfd_deploy.runtime import trt
from sfd_deploy.runtime.trt import CLASSIC, RTX, Flavour

CONFIG = ExportConfig()
DEMO_SHAPE = (1, 28, 28)

needs_rtx = pytest.mark.skipif(RTX.module() is None, reason=f"needs TensorRT for RTX: {RTX.mend}")


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """TensorRT's complaints about planted faults are expected."""
    caplog.set_level("INFO", LOGGER.name)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engines_of_the_demo_architecture_are_built_by_the_real_builder(demo_graph: ModelProto, precision: str) -> None:
    samples = Samples.of(seed=0, start=0, count=32, classes=10)
    convert: dict[str, Callable[[], ModelProto]] = {
        "fp32": lambda: demo_graph,
        "fp16": lambda: to_fp16(demo_graph),
        "int8": lambda: to_int8(demo_graph, "trt", samples, DEMO_SHAPE, exclude=CONFIG.int8_exclude),
    }
    graph = to_bytes(convert[precision]())
    built = build_engine(graph, f"trt-rtx-{precision}", precision, RTX, CONFIG)  # type: ignore[arg-type]
    assert len(built.plan) > len(graph)  # weights and kernels for several GPUs
    assert built.flavour is RTX
    assert built.version == RTX.module().__version__  # type: ignore[union-attr]
    assert ("SM75" in built.compute_capabilities) == (precision == "fp16")
    assert {"SM80", "SM86", "SM89", "SM120"} <= set(built.compute_capabilities)


@needs_rtx
def test_a_graph_that_tensorrt_cannot_parse_is_one_line_that_names_the_node(tiny_graph: ModelProto) -> None:
    with pytest.raises(GraphError, match=r"node planted/Determinant \(Det\): the operation is not supported") as caught:
        build_engine(to_bytes(_with_determinant(tiny_graph)), "trt-rtx-fp32", "fp32", RTX, CONFIG)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@needs_rtx
def test_an_int8_graph_made_for_a_cpu_is_refused_and_the_one_for_tensorrt_is_not(
    tiny_int8: dict[str, ModelProto],
) -> None:
    with pytest.raises(GraphError, match=r"node denoiser.unet.*DequantizeLinear.*Int32"):
        build_engine(to_bytes(tiny_int8["cpu"]), "trt-rtx-int8", "int8", RTX, CONFIG)
    assert build_engine(to_bytes(tiny_int8["trt"]), "trt-rtx-int8", "int8", RTX, CONFIG).plan


@needs_rtx
def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(GraphError, match="trt-rtx-fp32: TensorRT cannot parse the graph"):
        build_engine(b"not a graph", "trt-rtx-fp32", "fp32", RTX, CONFIG)


@needs_rtx
def test_a_graph_that_parses_but_cannot_be_built_names_the_node(tiny_graph: ModelProto) -> None:
    # Turing has no FP32 matrix product in TensorRT for RTX; asked as if the graph were FP16, the builder refuses.
    turing = ExportConfig(compute_capabilities=("SM75",))
    with pytest.raises(GraphError, match=r"cannot build the graph: .*Cannot compile operation '.*time_emb_proj"):
        build_engine(to_bytes(tiny_graph), "trt-rtx-fp16", "fp16", RTX, turing)


@needs_rtx
def test_tensorrt_prints_nothing_and_tells_our_log(
    tiny_graph: ModelProto, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GraphError):
        build_engine(to_bytes(_with_determinant(tiny_graph)), "trt-rtx-fp32", "fp32", RTX, CONFIG)
    build_engine(to_bytes(tiny_graph), "trt-rtx-fp32", "fp32", RTX, CONFIG)
    assert capfd.readouterr().out == ""
    assert any("TensorRT: " in record.getMessage() and record.levelname == "ERROR" for record in caplog.records)


@needs_rtx
def test_ctrl_c_during_a_build_ends_it(
    tiny_graph: ModelProto, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[int] = []

    @contextmanager
    def bar(task: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def advance(count: int, note: str) -> None:
            steps.append(count)
            if len(steps) == 5:
                os.kill(os.getpid(), signal.SIGINT)

        yield advance

    monkeypatch.setattr(engine, "progress_bar", bar)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(to_bytes(tiny_graph), "trt-rtx-fp32", "fp32", RTX, CONFIG)
    assert signal.getsignal(signal.SIGINT) is before
    assert "BuildCanceled" in caplog.text  # TensorRT stopped by itself, at the step after


@needs_rtx
def test_the_progress_bar_reaches_its_end(tiny_graph: ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    @contextmanager
    def bar(task: str, total: int) -> Iterator[Callable[[int, str], None]]:
        assert (task, total) == ("building trt-rtx-fp32", 1000)
        yield lambda count, note: shown.append(count)

    monkeypatch.setattr(engine, "progress_bar", bar)
    build_engine(to_bytes(tiny_graph), "trt-rtx-fp32", "fp32", RTX, CONFIG)
    assert min(shown) >= 0
    assert sum(shown) == 1000


def test_nested_phases_add_up() -> None:
    assert fraction([]) == 0
    assert fraction([[1, 4]]) == 0.25
    assert fraction([[1, 4], [1, 2]]) == 0.375
    assert fraction([[1, 4], [1, 2], [5, 10]]) == 0.4375
    assert fraction([[4, 4], [1, 1]]) == 1


def test_turing_gets_fp16_engines_only() -> None:
    assert target_capabilities("fp16", RTX, CONFIG)[0] == "SM75"
    assert "SM75" not in target_capabilities("int8", RTX, CONFIG)
    with pytest.raises(BackendError, match="no fp32 engine for SM75"):
        target_capabilities("fp32", RTX, ExportConfig(compute_capabilities=("SM75",)))


def test_without_a_gpu_the_ahead_of_time_flavour_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "gpu_capability", lambda: None)
    monkeypatch.setattr(Flavour, "module", lambda self: object())
    assert find_flavour() is RTX


def test_with_a_gpu_classic_tensorrt_is_chosen_and_builds_for_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "gpu_capability", lambda: "SM90")
    monkeypatch.setattr(Flavour, "module", lambda self: object())
    assert find_flavour() is CLASSIC
    assert target_capabilities("fp32", CLASSIC, CONFIG) == ("SM90",)


def test_classic_tensorrt_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "gpu_capability", lambda: None)
    with pytest.raises(BackendError, match="none is here"):
        target_capabilities("fp32", CLASSIC, CONFIG)


def test_without_either_flavour_the_mend_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "module", lambda self: None)
    with pytest.raises(BackendError) as caught:
        find_flavour()
    assert caught.value.exit_code == 2
    assert "sfd-deploy[trt-rtx]" in caught.value.mend
    assert "sfd-deploy[gpu]" in caught.value.mend
    with pytest.raises(BackendError, match="TensorRT for RTX is not installed"):
        build_engine(b"", "trt-rtx-fp32", "fp32", RTX, CONFIG)


def test_one_logger_serves_all_of_a_flavour() -> None:
    # TensorRT keeps the first logger it is given and warns about any other.
    module: Any = RTX.module() or pytest.skip(f"needs TensorRT for RTX: {RTX.mend}")
    assert trt.logger_for(module) is trt.logger_for(module)


def _with_determinant(model: ModelProto) -> ModelProto:
    """The graph times the determinant of each image: valid ONNX that TensorRT has no kernel for."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.node[-1].output[0] = "drawn"
    copy.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
    copy.graph.node.extend([
        helper.make_node("Det", ["drawn"], ["determinant"], name="planted/Determinant"),
        helper.make_node("Unsqueeze", ["determinant", "axes"], ["factor"], name="planted/Unsqueeze"),
        helper.make_node("Mul", ["drawn", "factor"], ["images"], name="planted/Mul"),
    ])  # fmt: skip
    onnx.checker.check_model(copy, full_check=True)
    return copy
