"""Planted numbers that FP16 cannot hold must be found, and their node named."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sfd_deploy.errors import GraphError, LimitError
from sfd_deploy.export.ranges import FP16_LIMIT, largest, measure_peaks, require_range
from sfd_deploy.export.samples import Samples
from tests.export.conftest import TINY_SHAPE, node_named

CONV_IN = "denoiser.unet.conv_in.weight"
FEW = Samples.of(seed=0, start=0, count=40, classes=3)


def test_an_ordinary_graph_is_in_range(tiny_graph: ModelProto) -> None:
    peaks = measure_peaks(tiny_graph, FEW, TINY_SHAPE)
    require_range(peaks, FP16_LIMIT, "fp16")
    assert 1 < largest(peaks).magnitude < 100


def test_peaks_are_the_largest_magnitudes(tiny_graph: ModelProto) -> None:
    peaks = {peak.tensor: peak.magnitude for peak in measure_peaks(tiny_graph, FEW, TINY_SHAPE)}
    latents = FEW.latents.array(TINY_SHAPE)
    scaled = node_named(tiny_graph, "mul_1").output[0]
    assert peaks[f"activation {scaled}"] == pytest.approx(2.5 * np.abs(latents).max(), rel=1e-6)  # sigma_init is 2.5
    weight = next(numpy_helper.to_array(item) for item in tiny_graph.graph.initializer if item.name == CONV_IN)
    assert peaks[f"weight {CONV_IN}"] == pytest.approx(np.abs(weight).max())


def test_every_label_takes_part() -> None:
    assert set(Samples.of(seed=0, start=5, count=1000, classes=10).labels.tolist()) == set(range(10))


def test_a_weight_of_a_million_is_refused_naming_its_node(tiny_graph: ModelProto) -> None:
    graph = _with_weight(tiny_graph, CONV_IN, lambda values: _set_first(values, 1e6))
    with pytest.raises(LimitError, match=r"node denoiser.unet.conv_in/conv2d \(Conv\): weight .* reaches 1e\+06"):
        require_range(measure_peaks(graph, FEW, TINY_SHAPE), FP16_LIMIT, "fp16")


def test_a_huge_activation_of_ordinary_weights_is_refused_naming_its_node(tiny_graph: ModelProto) -> None:
    # GroupNorm behind it scales it back: images and weights look ordinary.
    graph = _with_weight(tiny_graph, CONV_IN, lambda values: values * 2e4)
    with pytest.raises(LimitError, match=r"node denoiser.unet.conv_in/conv2d \(Conv\): activation conv2d reaches"):
        require_range(measure_peaks(graph, FEW, TINY_SHAPE), FP16_LIMIT, "fp16")


def test_an_activation_beyond_fp16_is_no_fault_in_fp32(tiny_graph: ModelProto) -> None:
    graph = _with_weight(tiny_graph, CONV_IN, lambda values: values * 2e4)
    require_range(measure_peaks(graph, FEW, TINY_SHAPE), float("inf"), "fp32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_in_any_precision(tiny_graph: ModelProto, value: float) -> None:
    graph = _with_weight(tiny_graph, CONV_IN, lambda values: _set_first(values, value))
    with pytest.raises(LimitError, match=f"{CONV_IN} is not finite"):
        require_range(measure_peaks(graph, FEW, TINY_SHAPE), float("inf"), "fp32")


def test_one_nan_among_ordinary_activations_is_found() -> None:
    # ONNX Runtime's ReduceMax passes over NaN: a maximum alone would not see this one.
    graph = _square_root_of(offset=0.5)
    with pytest.raises(LimitError, match=r"node planted \(Sqrt\): activation images is not finite"):
        require_range(measure_peaks(graph, FEW, TINY_SHAPE), FP16_LIMIT, "fp16")


def test_the_same_graph_without_nan_passes() -> None:
    require_range(measure_peaks(_square_root_of(offset=50.0), FEW, TINY_SHAPE), FP16_LIMIT, "fp16")


def test_a_tensor_of_unknown_type_is_refused_naming_its_node() -> None:
    graph = _square_root_of(offset=0.5)
    graph.graph.node.append(helper.make_node("Mystery", ["images"], ["out"], name="planted mystery", domain="custom"))
    graph.opset_import.append(helper.make_opsetid("custom", 1))
    with pytest.raises(GraphError, match="node planted mystery"):
        measure_peaks(graph, FEW, TINY_SHAPE)


def _square_root_of(offset: float) -> ModelProto:
    shape = ["batch", *TINY_SHAPE]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["latents", "offset"], ["sum"], name="shift"),
            helper.make_node("Sqrt", ["sum"], ["images"], name="planted"),
        ],
        "square root",
        [
            helper.make_tensor_value_info("latents", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(offset, np.float32), "offset")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _with_weight(model: ModelProto, name: str, change) -> ModelProto:  # type: ignore[no-untyped-def]
    copy = ModelProto()
    copy.CopyFrom(model)
    (weight,) = (item for item in copy.graph.initializer if item.name == name)
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight).copy()).astype(np.float32), name))
    return copy


def _set_first(values: np.ndarray, value: float) -> np.ndarray:
    values.flat[0] = value
    return values
