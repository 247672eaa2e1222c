"""FP32 graph to INT8 by ONNX Runtime's own quantiser, calibrated on latents: no data needed.

A graph is written for its target. ONNX Runtime on a CPU is fastest with unsigned activations;
TensorRT parses only symmetric signed ones, and no quantised bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnx import ModelProto

from sfd_deploy.export.config import Target
from sfd_deploy.export.graph import tidy
from sfd_deploy.export.graph_file import write_graph
from sfd_deploy.export.samples import Feeds, Samples
from sfd_deploy.export.weights import fits_one_file

# Named: left out, the quantiser takes every operator it knows, which fails here.
QUANTISED_OPERATORS = ["Conv", "Gemm", "MatMul"]
BATCH = 32


def to_int8(
    model: ModelProto, target: Target, samples: Samples, shape: tuple[int, ...], *, exclude: Sequence[str],
    reduce_range: bool = False,
) -> ModelProto:  # fmt: skip
    """``model`` with quantise-dequantise pairs around its convolutions and matrix products.

    Nodes whose name matches a pattern of ``exclude`` stay FP32.
    """
    return quantise(model, target, samples.feeds(shape, BATCH), exclude=exclude, reduce_range=reduce_range)


def quantise(
    model: ModelProto, target: Target, batches: Iterable[Feeds], *, exclude: Sequence[str], reduce_range: bool = False
) -> ModelProto:
    """The same, calibrated on the inputs of ``batches``."""
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory(prefix="sfd-deploy-int8-") as folder:
        source, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "int8"))
        write_graph(model, source)
        beside = not fits_one_file(model)
        # Symbolic shape inference fails on graphs of the dynamo exporter, whose shapes are complete anyway.
        quant_pre_process(
            source, prepared, skip_symbolic_shape=True, save_as_external_data=beside, all_tensors_to_one_file=True
        )
        quantize_static(
            prepared, quantised, _Reader(batches), quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED_OPERATORS, nodes_to_exclude=excluded_nodes(onnx.load(prepared), exclude),
            per_channel=True, reduce_range=reduce_range, use_external_data_format=beside, **_number_format(target),
        )  # fmt: skip
        return tidy(onnx.load(quantised))


def excluded_nodes(model: ModelProto, patterns: Sequence[str]) -> list[str]:
    """Names of the quantisable nodes that match a pattern."""
    quantisable = (node.name for node in model.graph.node if node.op_type in QUANTISED_OPERATORS)
    return [name for name in quantisable if any(fnmatch(name, pattern) for pattern in patterns)]


def _number_format(target: Target) -> dict[str, Any]:
    from onnxruntime.quantization import QuantType

    if target == "cpu":
        return {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    return {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8, "extra_options": options}


class _Reader:
    """What the quantiser asks for batches; it wants the method, not its abstract class."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self.feeds = iter(batches)

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)
