"""Whether numbers fit: every weight and, over many latents, every FP32 activation of a graph.

An FP16 graph on a CPU cannot show this: ONNX Runtime computes it in FP32 there, and the converter
clamps large weights without a word. So the FP32 graph is measured, before it is converted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfd_deploy.errors import GraphError, LimitError
from sfd_deploy.export.graph import consumers
from sfd_deploy.export.graph_file import write_graph
from sfd_deploy.export.samples import Feeds, Samples
from sfd_deploy.export.weights import typed_stand_in
from sfd_deploy.progress import progress_bar
from sfd_deploy.runtime.ort import open_session

# Half of FP16's largest number, 65,504: room for sums that a GPU orders differently.
FP16_LIMIT = 32_768.0
BATCH = 32


@dataclass(frozen=True)
class Peak:
    """Largest magnitude of one tensor; not a number if any of it was not finite."""

    node: str
    operator: str
    tensor: str
    magnitude: float

    def __str__(self) -> str:
        return f"node {self.node} ({self.operator}): {self.tensor}"


def measure_peaks(model: ModelProto, samples: Samples, shape: tuple[int, ...]) -> list[Peak]:
    """Peaks of all weights, then of all FP32 activations over ``samples``, in graph order.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    return peaks_over(model, samples.feeds(shape, BATCH), len(samples))


def peaks_over(model: ModelProto, batches: Iterable[Feeds], count: int) -> list[Peak]:
    """The same over the inputs of ``batches``, ``count`` rows in all.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    return [*_weight_peaks(model), *_activation_peaks(model, batches, count)]


def require_range(peaks: list[Peak], limit: float, precision: str) -> None:
    """Refuse numbers that are not finite or beyond ``limit``.

    Raises:
        LimitError: naming the first node at fault.
    """
    for peak in peaks:
        if not np.isfinite(peak.magnitude):
            raise LimitError(f"{peak} is not finite", "train the generator again: its numbers overflow")
        if peak.magnitude > limit:
            raise LimitError(
                f"{peak} reaches {peak.magnitude:.4g}, beyond the {limit:g} that {precision} allows",
                "export --fp32, or train with smaller weights",
            )


def largest(peaks: list[Peak]) -> Peak:
    """The largest activation or weight."""
    return max(peaks, key=lambda peak: peak.magnitude)


def _weight_peaks(model: ModelProto) -> list[Peak]:
    peaks = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(weight)
        for node in consumers(model, weight.name)[:1]:
            peaks.append(Peak(node.name, node.op_type, f"weight {weight.name}", float(np.abs(values).max(initial=0.0))))
    return peaks


def _activation_peaks(model: ModelProto, batches: Iterable[Feeds], count: int) -> list[Peak]:
    probed, tensors = _with_probes(model)
    top: NDArray[np.float64] = np.zeros(len(tensors))
    with (
        TemporaryDirectory(prefix="sfd-deploy-ranges-") as folder,
        progress_bar("checking ranges", count) as advance,
    ):
        write_graph(probed, Path(folder) / "probed.onnx")
        session = open_session(Path(folder) / "probed.onnx", "cpu")
        for feeds in batches:
            top = np.maximum(top, _probe(session, feeds, len(tensors)))
            advance(len(next(iter(feeds.values()))), "")
    return [Peak(node.name, node.op_type, f"activation {tensor}", float(value))
            for (node, tensor), value in zip(tensors, top, strict=True)]  # fmt: skip


def _probe(session: Any, feeds: Any, count: int) -> NDArray[np.float64]:
    values = np.array(session.run([output for i in range(count) for output in (f"peak_{i}", f"sum_{i}")], feeds))
    peaks, sums = values.reshape(count, 2).astype(np.float64).T
    # ONNX Runtime's ReduceMax passes over NaN (measured); a sum of magnitudes never does. numpy's maximum keeps NaN.
    return np.where(np.isfinite(sums), peaks, np.nan)


def _with_probes(model: ModelProto) -> tuple[ModelProto, list[tuple[NodeProto, str]]]:
    # Two scalars a tensor leave the graph, never the tensor: memory stays that of one batch.
    probed = ModelProto()
    probed.CopyFrom(model)
    types = _element_types(model)
    tensors = [(node, name) for node in model.graph.node for name in node.output if types[name] == TensorProto.FLOAT]
    for index, (_, name) in enumerate(tensors):
        probed.graph.node.extend([
            helper.make_node("Abs", [name], [f"abs_{index}"]),
            helper.make_node("ReduceMax", [f"abs_{index}"], [f"peak_{index}"], keepdims=0),
            helper.make_node("ReduceSum", [f"abs_{index}"], [f"sum_{index}"], keepdims=0),
        ])  # fmt: skip
        probed.graph.output.extend(
            helper.make_tensor_value_info(f"{kind}_{index}", TensorProto.FLOAT, []) for kind in ("peak", "sum")
        )
    return probed, tensors


def _element_types(model: ModelProto) -> dict[str, int]:
    typed = onnx.shape_inference.infer_shapes(typed_stand_in(model))
    types = {item.name: item.type.tensor_type.elem_type for item in [*typed.graph.value_info, *typed.graph.output]}
    for node in model.graph.node:
        if untyped := [name for name in node.output if name and name not in types]:
            raise GraphError(f"node {node.name} ({node.op_type}): the type of {untyped[0]} is unknown", "report this")
    return types
