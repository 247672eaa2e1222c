"""ONNX graph to TensorRT engine, by NVIDIA's own parser and builder.

Two flavours: TensorRT for RTX compiles ahead of time on any machine, for several GPUs at once;
classic TensorRT compiles on the GPU that will run the engine. Precision is in the graph: networks
are strongly typed. Two builds of one graph differ in their bytes, so an engine is audited by itself.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sfd_deploy.errors import BackendError, GraphError
from sfd_deploy.export.config import ExportConfig, Precision
from sfd_deploy.progress import progress_bar
from sfd_deploy.runtime.trt import CLASSIC, RTX, Flavour, gpu_capability, logger_for

PERMILLE = 1000


@dataclass(frozen=True)
class Engine:
    """A built engine: its bytes and what they are for."""

    plan: bytes
    flavour: Flavour
    version: str
    compute_capabilities: tuple[str, ...]


def find_flavour() -> Flavour:
    """Classic TensorRT where there is a GPU and the package, else TensorRT for RTX.

    Raises:
        BackendError: neither can build here.
    """
    if gpu_capability() is not None and CLASSIC.module() is not None:
        return CLASSIC
    if RTX.module() is not None:
        return RTX
    raise BackendError(
        "no TensorRT that can build here is installed",
        f"{RTX.mend}, which needs no GPU, or on a machine with an NVIDIA GPU {CLASSIC.mend}",
    )


def build_engine(graph: bytes, name: str, precision: Precision, flavour: Flavour, config: ExportConfig) -> Engine:
    """Parse and build one engine; ``name`` is for messages and the progress bar.

    Raises:
        BackendError: the flavour is not installed.
        GraphError: TensorRT cannot parse or build the graph; names the node.
    """
    trt = flavour.module()
    if trt is None:
        raise BackendError(f"{flavour.title} is not installed", flavour.mend)
    logger = logger_for(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = parse(trt, builder, graph, name)
    capabilities = target_capabilities(precision, flavour, config)
    settings = _settings(trt, builder, network, config)
    if flavour.ahead_of_time:
        settings.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            settings.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
    plan = _compile(trt, builder, network, settings, name)
    if plan is None:
        reason = _one_line(logger.errors[0]) if logger.errors else "no reason given"
        raise GraphError(
            f"{name}: {flavour.title} cannot build the graph: {reason}", "export another precision or opset"
        )
    return Engine(bytes(plan), flavour, str(trt.__version__), capabilities)


def parse(trt: Any, builder: Any, graph: bytes, name: str) -> Any:
    """The graph as a strongly typed TensorRT network.

    Raises:
        GraphError: naming every node that the parser reported.
    """
    # TensorRT 11 knows no other kind of network and ignores the flag; 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        faults = "; ".join(f"node {e.node_name()} ({e.node_operator()}): {_reason(e)}" for e in errors)
        raise GraphError(f"{name}: TensorRT cannot parse the graph: {faults or 'no reason given'}",
                         "replace that operation, or export --onnx")  # fmt: skip
    return network


def target_capabilities(precision: Precision, flavour: Flavour, config: ExportConfig) -> tuple[str, ...]:
    """The GPUs that an engine of ``precision`` is built for.

    Raises:
        BackendError: none is left, or no GPU is here.
    """
    if not flavour.ahead_of_time:
        here = gpu_capability()
        if here is None:
            raise BackendError("TensorRT builds on the GPU that will run the engine, and none is here", RTX.mend)
        return (here,)
    # Measured with TensorRT for RTX 1.7: "FP32 GEMM is not supported" on Turing; an INT8 graph holds such too.
    possible = tuple(item for item in config.compute_capabilities if item != "SM75" or precision == "fp16")
    if not possible:
        raise BackendError(
            f"TensorRT for RTX builds no {precision} engine for SM75", "export --fp16, or name newer GPUs"
        )
    return possible


def _settings(trt: Any, builder: Any, network: Any, config: ExportConfig) -> Any:
    settings = builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)  # on by default: FP32 products with ten bits of mantissa are not FP32
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(
            tensor.name, *((size, *rest) for size in (config.min_batch, config.opt_batch, config.max_batch))
        )
    settings.add_optimization_profile(profile)
    return settings


def _compile(trt: Any, builder: Any, network: Any, settings: Any, name: str) -> Any | None:
    with progress_bar(f"building {name}", PERMILLE) as advance, _interrupt_noted() as interrupted:
        monitor = _monitor(trt, advance, interrupted)
        settings.progress_monitor = monitor
        plan = builder.build_serialized_network(network, settings)
    if interrupted.is_set():
        raise KeyboardInterrupt
    return plan


def _monitor(trt: Any, advance: Callable[[int, str], None], interrupted: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Feeds the progress bar; TensorRT calls it from several threads, without our lock."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.phases: dict[str, list[int]] = {}  # name → [steps done, steps]; outermost first
            self.shown = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases[phase_name] = [0, max(1, num_steps)]

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                steps = self.phases.get(phase_name, [0, 1])[1]
                self._show(phase_name, steps)  # a phase may end before it has reported all its steps
                self.phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                self._show(phase_name, step + 1)
            return not interrupted.is_set()  # False stops the build

        def _show(self, phase_name: str, done: int) -> None:
            if phase_name in self.phases:
                self.phases[phase_name][0] = done
                reached = int(PERMILLE * fraction(list(self.phases.values())))
                advance(max(0, reached - self.shown), phase_name)
                self.shown = max(self.shown, reached)

    return Monitor()


def fraction(phases: list[list[int]]) -> float:
    """How far nested phases, outermost first, each [steps done, steps], have come; 0 to 1."""
    done, width = 0.0, 1.0
    for step, steps in phases:
        done += width * step / steps
        width /= steps
    return min(done, 1.0)


@contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    # An exception must not fly through TensorRT's C++ frames: Ctrl-C sets a flag that ends the build at its next step.
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(error: Any) -> str:
    text = _one_line(error.desc())
    return "the operation is not supported" if text in {"", "false"} else text


def _one_line(text: str) -> str:
    # Without a driver TensorRT appends a CUDA complaint to whatever else went wrong.
    lines = [line for line in text.splitlines() if "catchCudaError" not in line]
    return " ".join(" ".join(lines).split())[:300]
