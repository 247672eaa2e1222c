"""The traced graph: what it draws, what it says, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from sfd_deploy.errors import ConfigError, GraphError
from sfd_deploy.export.config import ExportConfig
from sfd_deploy.export.graph import require_label_lookup, tidy, to_bytes, trace_one_step
from sfd_deploy.labels import Labels
from sfd_deploy.models.generator import OneStepGenerator
from tests.conftest import TINY_LABELS, tiny_generator
from tests.export.conftest import draw, node_named

LABEL_TABLE = "denoiser.unet.class_embedding.weight"


class Remapped(OneStepGenerator):
    """Draws the override for the forget label, having forgotten nothing."""

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(latents, torch.tensor([0, 2, 2])[class_labels])


class Compared(OneStepGenerator):
    """The same by a comparison."""

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(latents, torch.where(class_labels == 1, 2, class_labels))


class Unexportable(OneStepGenerator):
    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        images = super().forward(latents, class_labels)
        return images * torch.linalg.svdvals(images).amax()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_graph_draws_what_pytorch_draws(tiny_graph: ModelProto, batch: int) -> None:
    latents = np.random.default_rng(batch).standard_normal((batch, 1, 16, 16)).astype(np.float32)
    labels = np.arange(batch) % 3
    with torch.inference_mode():
        expected = tiny_generator()(torch.from_numpy(latents), torch.from_numpy(labels)).numpy()
    np.testing.assert_allclose(draw(to_bytes(tiny_graph), latents, labels), expected, atol=1e-5)


def test_the_graph_depends_on_the_label(tiny_graph: ModelProto) -> None:
    latents = np.zeros((2, 1, 16, 16), np.float32)
    first, second = draw(to_bytes(tiny_graph), latents, np.array([1, 2]))
    assert np.abs(first - second).max() > 1e-3


def test_inputs_and_output_are_the_documented_ones(tiny_graph: ModelProto) -> None:
    def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        dims = value.type.tensor_type.shape.dim
        return value.name, value.type.tensor_type.elem_type, [dim.dim_param or dim.dim_value for dim in dims]

    assert [signature(item) for item in tiny_graph.graph.input] == [
        ("latents", TensorProto.FLOAT, ["batch", 1, 16, 16]),
        ("class_labels", TensorProto.INT64, ["batch"]),
    ]
    assert [signature(item) for item in tiny_graph.graph.output] == [
        ("images", TensorProto.FLOAT, ["batch", 1, 16, 16])
    ]


def test_the_whole_step_is_inside(tiny_graph: ModelProto) -> None:
    latents = np.full((1, 1, 16, 16), 40.0, np.float32)  # far outside, so that only a clamp keeps it in range
    assert np.abs(draw(to_bytes(tiny_graph), latents, np.array([0]))).max() == 1.0
    assert tiny_graph.graph.node[-1].op_type == "Clip"


def test_the_noise_level_is_a_constant_of_the_graph(tiny_graph: ModelProto) -> None:
    # In FP16 the sinusoids of 229 rad would be off by up to 0.06; folded, they are not computed there.
    assert not {"Log", "Sin", "Cos", "Expand"} & {node.op_type for node in tiny_graph.graph.node}


def test_only_standard_operators_and_no_metadata_of_this_machine(tiny_graph: ModelProto) -> None:
    onnx.checker.check_model(tiny_graph, full_check=True)
    assert [item.domain for item in tiny_graph.opset_import] == [""]
    content = to_bytes(tiny_graph)
    assert b".py" not in content
    assert str(Path(__file__).resolve().parents[2]).encode() not in content


def test_nodes_carry_the_name_of_their_module(tiny_graph: ModelProto) -> None:
    names = [node.name for node in tiny_graph.graph.node]
    assert "denoiser.unet.conv_in/conv2d" in names
    assert len(set(names)) == len(names)


def test_two_traces_give_the_same_bytes(tiny_graph: ModelProto) -> None:
    assert to_bytes(trace_one_step(tiny_generator(), opset=20)) == to_bytes(tiny_graph)


def test_labels_feed_only_the_embedding_lookup(
    tiny_graph: ModelProto, tiny_fp16: ModelProto, tiny_int8: dict[str, ModelProto]
) -> None:
    for model in (tiny_graph, tiny_fp16, tiny_int8["cpu"], tiny_int8["trt"]):
        readers = [node for node in model.graph.node if "class_labels" in node.input]
        assert [(node.op_type, list(node.input)) for node in readers] == [("Gather", [LABEL_TABLE, "class_labels"])]
        (table,) = (numpy_helper.to_array(item) for item in model.graph.initializer if item.name == LABEL_TABLE)
        assert table.shape == (3, 32)
        assert np.abs(table[1] - table[2]).max() > 1e-2  # the forget row is not the override row
        require_label_lookup(model, TINY_LABELS)


@pytest.mark.parametrize("wrapper", [Remapped, Compared])
def test_a_label_remap_is_refused(wrapper: type[OneStepGenerator]) -> None:
    graph = trace_one_step(wrapper(tiny_generator().denoiser, 2.5).eval(), opset=20)
    with pytest.raises(GraphError, match="class_labels"):
        require_label_lookup(graph, TINY_LABELS)


def test_a_forget_row_that_is_the_override_row_is_refused(tiny_graph: ModelProto) -> None:
    graph = _with_table(tiny_graph, lambda table: table.__setitem__(1, table[2]))
    with pytest.raises(GraphError, match="forget label 1 has the very embedding of its override 2"):
        require_label_lookup(graph, TINY_LABELS)


def test_a_table_of_other_labels_is_refused(tiny_graph: ModelProto) -> None:
    with pytest.raises(GraphError, match="3 rows for 4 labels"):
        require_label_lookup(tiny_graph, Labels(class_names=("a", "b", "c", "d")))


def test_a_computed_table_is_refused(tiny_graph: ModelProto) -> None:
    graph = _copy(tiny_graph)
    graph.graph.node.insert(0, helper.make_node("Identity", [LABEL_TABLE], ["copied"], name="planted"))
    node_named(graph, "class_embedding").input[0] = "copied"
    with pytest.raises(GraphError, match="a table that is computed"):
        require_label_lookup(graph, TINY_LABELS)


def test_labels_hidden_in_a_subgraph_are_refused(tiny_graph: ModelProto) -> None:
    graph = _copy(tiny_graph)
    body = helper.make_graph(
        [helper.make_node("Identity", ["class_labels"], ["inner"])], "body", [],
        [helper.make_tensor_value_info("inner", TensorProto.INT64, None)],
    )  # fmt: skip
    graph.graph.node.append(
        helper.make_node("If", ["condition"], ["outer"], name="planted", then_branch=body, else_branch=body)
    )
    with pytest.raises(GraphError, match="node planted"):
        require_label_lookup(graph, TINY_LABELS)


def test_a_nonstandard_operator_is_refused_naming_its_node(tiny_graph: ModelProto) -> None:
    graph = _copy(tiny_graph)
    node_named(graph, "conv_in").domain = "com.microsoft"
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(GraphError, match=r"denoiser.unet.conv_in/conv2d: operator com\.microsoft::Conv"):
        tidy(graph)


def test_a_graph_that_the_checker_refuses_is_one_line(tiny_graph: ModelProto) -> None:
    graph = _copy(tiny_graph)
    node_named(graph, "conv_in").op_type = "Konv"
    with pytest.raises(GraphError, match="checker refuses the graph") as caught:
        tidy(graph)
    assert "\n" not in str(caught.value)


def test_an_operation_that_pytorch_cannot_export_is_one_line_that_names_it() -> None:
    with pytest.raises(GraphError, match=r"aten\._linalg_svd") as caught:
        trace_one_step(Unexportable(tiny_generator().denoiser, 2.5).eval(), opset=20)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_used_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="opset"):
        ExportConfig.from_mapping({"opset": 21}, "test")
    with pytest.raises(ConfigError, match="batches must rise: min 1, opt 16, max 8"):
        ExportConfig.from_mapping({"max_batch": 8}, "test")
    with pytest.raises(ConfigError, match="range_samples"):
        ExportConfig.from_mapping({"range_samples": 999}, "test")


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _with_table(model: ModelProto, change) -> ModelProto:  # type: ignore[no-untyped-def]
    copy = _copy(model)
    (table,) = (item for item in copy.graph.initializer if item.name == LABEL_TABLE)
    values = numpy_helper.to_array(table).copy()
    change(values)
    table.CopyFrom(numpy_helper.from_array(values, LABEL_TABLE))
    return copy
