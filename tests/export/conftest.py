"""Graphs that several tests share; each is traced or converted once a session."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto

from sfd_deploy.export.config import ExportConfig
from sfd_deploy.export.fp16 import to_fp16
from sfd_deploy.export.graph import trace_one_step
from sfd_deploy.export.int8 import to_int8
from sfd_deploy.export.samples import Samples
from sfd_deploy.export.stage import export_run
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.network import NetworkConfig
from sfd_deploy.runs import Run
from tests.conftest import seal_tiny_run, tiny_generator

TINY_SHAPE = (1, 16, 16)
QUICK = ExportConfig(range_samples=1000, calibration_samples=64, parity_samples=72)


def demo_generator() -> OneStepGenerator:
    """A generator of the demo's architecture; weights moved off their start, so that no part of it is idle."""
    torch.manual_seed(0)
    network = NetworkConfig(image_size=28, channels=1, block_channels=(16, 64, 128), norm_groups=8).build(10)
    network.eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return OneStepGenerator(EdmDenoiser(network, 0.5), 2.5).eval()


@pytest.fixture(scope="session")
def tiny_graph() -> ModelProto:
    """The tiny generator, FP32. Read-only."""
    return trace_one_step(tiny_generator(), opset=20)


@pytest.fixture(scope="session")
def tiny_fp16(tiny_graph: ModelProto) -> ModelProto:
    return to_fp16(tiny_graph)


@pytest.fixture(scope="session")
def tiny_int8(tiny_graph: ModelProto) -> dict[str, ModelProto]:
    """The tiny generator in INT8, by target."""
    samples = Samples.of(seed=0, start=0, count=64, classes=3)
    exclude = ExportConfig().int8_exclude
    return {target: to_int8(tiny_graph, target, samples, TINY_SHAPE, exclude=exclude) for target in ("cpu", "trt")}


@pytest.fixture(scope="session")
def demo_graph() -> ModelProto:
    """The demo's architecture, FP32. Read-only."""
    return trace_one_step(demo_generator(), opset=20)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Sealed]]:
    """The tiny run and all nine of its artefacts. Read-only."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT for RTX: pip install 'sfd-deploy[trt-rtx]'")
    run = seal_tiny_run(tmp_path_factory.mktemp("exported") / "tiny")
    sealed = export_run(run, ("onnx", "trt"), ("fp32", "fp16", "int8"), QUICK)
    return run, {item.name: item for item in sealed}


def draw(graph: bytes, latents: np.ndarray, labels: np.ndarray, fused: bool = True) -> np.ndarray:
    """Images by ONNX Runtime itself, past our runtime."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(["images"], {"latents": latents, "class_labels": labels})[0]


def node_named(model: ModelProto, part: str) -> NodeProto:
    """The first node whose name contains ``part``."""
    return next(node for node in model.graph.node if part in node.name)


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """In dB over the data range of 2, over all pixels at once."""
    return float(10 * np.log10(4 / np.mean((images.astype(np.float64) - reference) ** 2)))
