"""FP16 and INT8 graphs: what is in them, and how near they stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from sfd_deploy.export.config import ExportConfig
from sfd_deploy.export.fp16 import to_fp16
from sfd_deploy.export.graph import to_bytes
from sfd_deploy.export.int8 import excluded_nodes, to_int8
from sfd_deploy.export.samples import Samples
from tests.export.conftest import TINY_SHAPE, draw, psnr

UNSEEN = Samples.of(seed=7, start=0, count=60, classes=3)


def test_fp16_holds_half_precision_weights_and_keeps_its_inputs_and_output(tiny_fp16: ModelProto) -> None:
    onnx.checker.check_model(tiny_fp16, full_check=True)
    kinds = {item.name: item.data_type for item in tiny_fp16.graph.initializer}
    weights = [kind for name, kind in kinds.items() if name.startswith("denoiser")]
    assert weights
    assert set(weights) == {TensorProto.FLOAT16}
    values = [*tiny_fp16.graph.input, *tiny_fp16.graph.output]
    assert [value.type.tensor_type.elem_type for value in values] == [
        TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT,
    ]  # fmt: skip


def test_fp16_leaves_the_graph_it_was_given(tiny_graph: ModelProto) -> None:
    before = to_bytes(tiny_graph)
    to_fp16(tiny_graph)
    assert to_bytes(tiny_graph) == before


def test_fp16_and_int8_stay_near_fp32_on_unseen_latents(
    tiny_graph: ModelProto, tiny_fp16: ModelProto, tiny_int8: dict[str, ModelProto]
) -> None:
    reference = _draw(tiny_graph)
    assert psnr(_draw(tiny_fp16), reference) > 70
    assert psnr(_draw(tiny_int8["cpu"]), reference) > 45
    assert psnr(_draw(tiny_int8["trt"]), reference) > 42


def test_int8_for_a_cpu_has_unsigned_activations_and_signed_weights_per_channel(
    tiny_int8: dict[str, ModelProto],
) -> None:
    model = tiny_int8["cpu"]
    assert _activation_zero_points(model) == {np.dtype(np.uint8)}
    weight, scale = _quantised_weight(model, "denoiser.unet.down_blocks.0.resnets.0.conv1.weight")
    assert weight.dtype == np.int8
    assert scale.shape == (weight.shape[0],)


def test_int8_for_tensorrt_is_symmetric_and_quantises_no_bias(tiny_int8: dict[str, ModelProto]) -> None:
    model = tiny_int8["trt"]
    assert _activation_zero_points(model) == {np.dtype(np.int8)}
    assert all(not np.any(point) for point in _zero_points(model))
    assert TensorProto.INT32 not in {item.data_type for item in model.graph.initializer}


def test_nodes_that_are_left_out_keep_fp32_weights(tiny_int8: dict[str, ModelProto]) -> None:
    kinds = {item.name: item.data_type for item in tiny_int8["cpu"].graph.initializer}
    for name in ("conv_in", "conv_out", "up_blocks.0.resnets.0.conv_shortcut", "mid_block.resnets.0.time_emb_proj"):
        assert kinds[f"denoiser.unet.{name}.weight"] == TensorProto.FLOAT


def test_leaving_those_nodes_out_brings_the_images_nearer(
    tiny_graph: ModelProto, tiny_int8: dict[str, ModelProto]
) -> None:
    samples = Samples.of(seed=0, start=0, count=64, classes=3)
    everything = to_int8(tiny_graph, "cpu", samples, TINY_SHAPE, exclude=())
    reference = _draw(tiny_graph)
    assert psnr(_draw(tiny_int8["cpu"]), reference) > psnr(_draw(everything), reference) + 1


def test_seven_bit_weights_are_smaller_numbers(tiny_graph: ModelProto) -> None:
    samples = Samples.of(seed=0, start=0, count=32, classes=3)
    model = to_int8(tiny_graph, "cpu", samples, TINY_SHAPE, exclude=(), reduce_range=True)
    weight, _ = _quantised_weight(model, "denoiser.unet.conv_in.weight")
    assert np.abs(weight.astype(int)).max() <= 64


def test_patterns_pick_quantisable_nodes_only(tiny_graph: ModelProto) -> None:
    picked = excluded_nodes(tiny_graph, ("*conv_in*", "*norm1*"))
    assert picked == ["denoiser.unet.conv_in/conv2d"]


def test_the_default_patterns_name_nodes_that_exist(tiny_graph: ModelProto) -> None:
    for pattern in ExportConfig().int8_exclude:
        assert excluded_nodes(tiny_graph, (pattern,)), pattern


def test_int8_graphs_use_standard_operators(tiny_int8: dict[str, ModelProto]) -> None:
    for model in tiny_int8.values():
        onnx.checker.check_model(model, full_check=True)
        assert [item.domain for item in model.opset_import] == [""]


def test_calibration_is_repeatable(tiny_graph: ModelProto, tiny_int8: dict[str, ModelProto]) -> None:
    samples = Samples.of(seed=0, start=0, count=64, classes=3)
    again = to_int8(tiny_graph, "trt", samples, TINY_SHAPE, exclude=ExportConfig().int8_exclude)
    assert to_bytes(again) == to_bytes(tiny_int8["trt"])


@pytest.mark.parametrize(("seed", "start"), [(1, 0), (0, 1)])
def test_the_calibration_digest_tells_other_latents_apart(seed: int, start: int) -> None:
    base = Samples.of(seed=0, start=0, count=4, classes=3).digest(TINY_SHAPE)
    assert base == Samples.of(seed=0, start=0, count=4, classes=3).digest(TINY_SHAPE)
    assert base != Samples.of(seed=seed, start=start, count=4, classes=3).digest(TINY_SHAPE)


def _draw(model: ModelProto) -> np.ndarray:
    """Images by the graph's own arithmetic: fused, INT8 sums saturate on an x86 CPU without VNNI (docs/export.md)."""
    return draw(to_bytes(model), UNSEEN.latents.array(TINY_SHAPE), UNSEEN.labels, fused=False)


def _zero_points(model: ModelProto) -> list[np.ndarray]:
    tensors = {item.name: item for item in model.graph.initializer}
    quantisers = [node for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    return [numpy_helper.to_array(tensors[node.input[2]]) for node in quantisers]


def _activation_zero_points(model: ModelProto) -> set[np.dtype]:
    tensors = {item.name: item for item in model.graph.initializer}
    quantisers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantisers
    return {numpy_helper.to_array(tensors[node.input[2]]).dtype for node in quantisers}


def _quantised_weight(model: ModelProto, name: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.input and node.input[0] == f"{name}_quantized")
    return tensors[node.input[0]], tensors[node.input[1]]
