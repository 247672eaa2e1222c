"""Generator to one ONNX graph, the whole step inside: noise scale, preconditioning, network, clamp.

Inputs ``latents`` (B, C, H, W) float32, standard normal, and ``class_labels`` (B,) int64; output
``images`` (B, C, H, W) float32 in [-1, 1]; B is free. Only standard operators, no machine's paths,
the same bytes each time.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from torch import Tensor, nn

from sfd_deploy.errors import GraphError
from sfd_deploy.export.weights import typed_stand_in
from sfd_deploy.labels import Labels
from sfd_deploy.models.generator import OneStepGenerator

if TYPE_CHECKING:
    import onnx_ir

STANDARD_DOMAINS = {"", "ai.onnx"}
SCOPES = "pkg.torch.onnx.name_scopes"
SUBGRAPHS = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}


def trace_one_step(generator: OneStepGenerator, opset: int) -> ModelProto:
    """One FP32 graph of ``generator`` for any batch size.

    Raises:
        GraphError: an operation that PyTorch cannot export, or that ONNX's checker refuses.
    """
    example = {
        "latents": torch.zeros(2, *generator.image_shape),
        "class_labels": torch.zeros(2, dtype=torch.int64),
    }
    return trace(generator, example, ["images"], opset)


def trace(module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], opset: int) -> ModelProto:
    """One FP32 graph of ``module``; ``example`` has an input for each argument of its forward, in order.

    The first dimension of every input is free: "batch".

    Raises:
        GraphError: an operation that PyTorch cannot export, or that ONNX's checker refuses.
    """
    try:
        with _exporter_noise_silenced():
            program = torch.onnx.export(
                module, tuple(example.values()), dynamo=True, opset_version=opset, verbose=False,
                input_names=list(example), output_names=list(outputs),
                dynamic_shapes={name: {0: "batch"} for name in example},
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise GraphError(f"PyTorch cannot export the generator: {_summary(error)}", "mend that operation") from error
    if program is None:
        raise AssertionError("the dynamo exporter returns a program")
    return tidy(_to_proto(program.model))


def tidy(model: ModelProto) -> ModelProto:
    """A checked copy in plain form: sorted, typed, named by module, standard domains, no metadata.

    The tools that quantise and convert leave unsorted nodes, stale types and domains that nothing uses.

    Raises:
        GraphError: a non-standard operator is left, or the checker refuses the graph.
    """
    import onnx_ir

    graph = onnx_ir.from_proto(model)
    graph.graph.sort()
    clean = onnx_ir.to_proto(graph)
    for node in clean.graph.node:
        _name_by_module(node)
        # The exporter's metadata holds source paths of the machine it ran on.
        del node.metadata_props[:]
        node.doc_string = ""
    for holder in (clean, clean.graph, *clean.graph.initializer, *clean.graph.input, *clean.graph.output):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del clean.graph.value_info[:]
    _keep_used_domains(clean)
    return _checked(clean)


def to_bytes(model: ModelProto) -> bytes:
    """The file's bytes; equal graphs give equal bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def require_label_lookup(model: ModelProto, labels: Labels) -> None:
    """Refuse a graph that does anything to ``class_labels`` before the embedding look-up.

    A label remap draws the override for the forget label too, but nothing was forgotten: the forget
    label's images are one edit away.

    Raises:
        GraphError: labels feed anything but one look-up in a table of one row a label, or a forget
            row equals its override row.
    """
    table = _embedding_table(model)
    if table.shape[0] != labels.count:
        raise GraphError(
            f"the label table has {table.shape[0]} rows for {labels.count} labels", "export a generator of these labels"
        )
    pairs = [(label, override) for label in labels.forget for override in labels.overrides_of(label)]
    for label, override in pairs:
        if np.array_equal(table[label], table[override]):
            raise GraphError(
                f"forget label {label} has the very embedding of its override {override}: a remap, not forgetting",
                "train the generator to forget",
            )


def consumers(model: ModelProto, value: str) -> list[NodeProto]:
    """Nodes that read ``value``."""
    return [node for node in model.graph.node if value in node.input]


def _embedding_table(model: ModelProto) -> np.ndarray:
    readers = consumers(model, "class_labels")
    if nested := [node for node in model.graph.node if any(item.type in SUBGRAPHS for item in node.attribute)]:
        raise _remapped(nested[0], "hides operations in a subgraph")
    if len(readers) != 1:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in readers) or "nothing"
        raise GraphError(f"class_labels must feed one embedding look-up, feeds {names}", "export the network unwrapped")
    node = readers[0]
    tables = {item.name: item for item in model.graph.initializer}
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
    if node.op_type != "Gather" or node.input[1] != "class_labels" or axis != 0:
        raise _remapped(node, "is not an embedding look-up")
    if node.input[0] not in tables:
        raise _remapped(node, "looks up a table that is computed")
    table = numpy_helper.to_array(tables[node.input[0]])
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.floating):
        raise _remapped(node, f"looks up a {table.dtype} table of shape {table.shape}, not an embedding")
    return table


def _remapped(node: NodeProto, what: str) -> GraphError:
    return GraphError(
        f"node {node.name} ({node.op_type}) reads class_labels and {what}", "export the network unwrapped"
    )


def _to_proto(model: onnx_ir.Model) -> ModelProto:
    import onnx_ir
    from onnxscript import optimizer

    _fold_noise_level(model)
    optimizer.optimize(model)
    return onnx_ir.to_proto(model)


def _fold_noise_level(model: onnx_ir.Model) -> None:
    # sigma_init is one number, yet the exporter repeats it for each row of the batch before its logarithm and
    # sinusoids. As a row of one it folds, with the time embedding, to constants that are computed in FP32: at
    # 250 ln(2.5) = 229 rad an FP16 engine's sinusoids would be off by up to 0.06 rad.
    import onnx_ir

    for node in model.graph:
        level = node.inputs[0].const_value if node.op_type == "Expand" and node.inputs[0] is not None else None
        if level is None or level.size != 1 or not _is_batch_size(node.inputs[1]):
            continue
        tensor = onnx_ir.tensor(level.numpy().reshape(1), name=f"{node.outputs[0].name}_row")
        row = onnx_ir.Value(
            name=tensor.name, shape=onnx_ir.Shape([1]), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(row)
        node.outputs[0].replace_all_uses_with(row)


def _is_batch_size(value: onnx_ir.Value | None) -> bool:
    if value is None or value.shape is None or list(value.shape) != [1]:
        return False
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Shape" else None
    return source is not None and source.is_graph_input()


def _name_by_module(node: NodeProto) -> None:
    # "denoiser.unet.conv_in/conv2d" says where a failing node sits; "node_conv2d" does not.
    scopes = next((item.value for item in node.metadata_props if item.key == SCOPES), None)
    if scopes is not None:
        module = ast.literal_eval(scopes)[-2]
        node.name = f"{module}/{node.name.removeprefix('node_')}" if module else node.name.removeprefix("node_")


def _keep_used_domains(model: ModelProto) -> None:
    used = {node.domain for node in model.graph.node}
    for node in model.graph.node:
        if node.domain not in STANDARD_DOMAINS:
            raise GraphError(
                f"node {node.name}: operator {node.domain}::{node.op_type} is not standard ONNX",
                "leave out the tool that wrote it",
            )
    kept = [item for item in model.opset_import if item.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _checked(model: ModelProto) -> ModelProto:
    stand_in = typed_stand_in(model)
    try:
        typed = onnx.shape_inference.infer_shapes(stand_in, strict_mode=True, data_prop=True)
        onnx.checker.check_model(typed, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"ONNX's checker refuses the graph ({reason})", "report this with the generator") from error
    return typed if stand_in is model else _typed_as(typed, model)


def _typed_as(typed: ModelProto, model: ModelProto) -> ModelProto:
    for values in ("output", "value_info"):
        del getattr(model.graph, values)[:]
        getattr(model.graph, values).extend(getattr(typed.graph, values))
    return model


def _summary(error: Exception) -> str:
    # The message is a page of advice; its section "Exception summary" names the operation.
    found = re.search(r"^<class '.*'>: (.+)$", str(error), flags=re.MULTILINE)
    return found[1] if found else str(error).strip().splitlines()[0]


@contextmanager
def _exporter_noise_silenced() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed. Skipping torchvision::nms"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
