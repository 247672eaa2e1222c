"""Generators that are not EDM export through the same path: one graph, any batch, the noise level folded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto

from sfd_deploy.export.graph import require_label_lookup, to_bytes, trace_one_step
from tests.conftest import TINY_LABELS
from tests.export.conftest import TINY_SHAPE, draw
from tests.models.tiny import tiny_generator_of

KINDS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module", params=KINDS)
def traced(request: pytest.FixtureRequest) -> tuple[str, ModelProto]:
    return request.param, trace_one_step(tiny_generator_of(request.param), opset=20)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_graph_draws_the_generators_images_for_any_batch(traced: tuple[str, ModelProto], batch: int) -> None:
    kind, graph = traced
    latents = torch.randn(batch, *TINY_SHAPE, generator=torch.Generator().manual_seed(batch))
    labels = torch.arange(batch) % 3
    with torch.no_grad():
        ours = tiny_generator_of(kind)(latents, labels).numpy()
    assert ours.std() > 0.1
    assert np.abs(draw(to_bytes(graph), latents.numpy(), labels.numpy()) - ours).max() < 1e-4


def test_schedule_and_noise_level_are_constants_of_the_graph(traced: tuple[str, ModelProto]) -> None:
    _, graph = traced
    operators = {node.op_type for node in graph.graph.node}
    assert not operators & {"Log", "Exp", "Sin", "Cos", "Expand", "GreaterOrEqual", "ReduceSum", "Round", "Where"}
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    require_label_lookup(graph, TINY_LABELS)
