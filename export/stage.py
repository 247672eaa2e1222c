"""The export stage: a run's generator to sealed artefacts, each checked against PyTorch before it is sealed.

Names are ``<format>-<target>-<precision>``: ``onnx-cpu-int8``; ``onnx-trt-fp16`` is a graph written
for TensorRT and ``trt-rtx-fp16`` (or ``trt-gpu-fp16``) the engine built from it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, TypeVar

from onnx import ModelProto

from sfd_deploy.errors import ConfigError, RunError
from sfd_deploy.export.config import (
    BACKENDS,
    LATENT_STREAM,
    PRECISIONS,
    Backend,
    ExportConfig,
    Precision,
    Target,
)
from sfd_deploy.export.engine import Engine, build_engine, find_flavour
from sfd_deploy.export.fp16 import to_fp16
from sfd_deploy.export.graph import require_label_lookup, to_bytes, trace_one_step
from sfd_deploy.export.int8 import to_int8
from sfd_deploy.export.parity import Parity, compare
from sfd_deploy.export.ranges import FP16_LIMIT, Peak, largest, measure_peaks, require_range
from sfd_deploy.export.samples import Samples
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.models.generator import labels_of, load_generator
from sfd_deploy.progress import log_to, progress_bar
from sfd_deploy.runs import Run, sealed_folder, write_json
from sfd_deploy.runtime.ort import OnnxRuntime
from sfd_deploy.runtime.pytorch import GeneratorRuntime
from sfd_deploy.runtime.seam import Images, draw_all
from sfd_deploy.runtime.trt import ENGINE_FILE, Flavour

GRAPH_FILE, PARITY_FILE = "model.onnx", "parity.json"
Choice = TypeVar("Choice", bound=str)


def export_run(
    run: Run, backends: Sequence[str] = (), precisions: Sequence[str] = (), config: ExportConfig | None = None
) -> list[Sealed]:
    """Compile the run's generator for each back end in each precision; empty means onnx, empty means fp32.

    An artefact is sealed whole or not at all; those finished before one fails are kept.

    Raises:
        ConfigError: an unknown back end or precision.
        BackendError: ONNX Runtime or TensorRT is not installed.
        DigestError, ManifestError: the generator's files are not those it was sealed with.
        GraphError: a graph cannot be exported, remaps labels, or cannot be parsed by TensorRT.
        LimitError: numbers out of range, or images that differ from PyTorch's.
    """
    config = config or ExportConfig()
    chosen: tuple[Backend, ...] = chosen_of("back end", backends, BACKENDS)
    wanted: tuple[Precision, ...] = chosen_of("precision", precisions, PRECISIONS)
    flavour = find_flavour() if "trt" in chosen else None
    with log_to(run.work / "export.log"), full_disk_told():
        compiler = _prepare(run, config, wanted)
        sealed: list[Sealed] = []
        if "onnx" in chosen:
            sealed += [compiler.seal_graph(compiler.graph("cpu", precision)) for precision in wanted]
        if flavour is not None:
            for precision in wanted:
                sealed += compiler.seal_engine(precision, flavour)
    return sealed


@dataclass(frozen=True)
class Graph:
    """A checked graph, ready to be sealed."""

    target: Target
    precision: Precision
    content: bytes
    parity: Parity
    opset: int
    ir_version: int

    @property
    def name(self) -> str:
        """Its artefact's name."""
        return f"onnx-{self.target}-{self.precision}"


@dataclass(frozen=True)
class _Compiler:
    """One generator, traced once; graphs are made from that trace and compared with these images."""

    run: Run
    config: ExportConfig
    generator: Sealed
    labels: Labels
    shape: tuple[int, int, int]
    traced: ModelProto
    samples: Samples
    reference: Images
    peak: Peak
    made: dict[tuple[str, Precision], Graph] = field(default_factory=dict)

    def graph(self, target: Target, precision: Precision) -> Graph:
        """The graph of one target and precision, compared with PyTorch; only INT8 differs between targets."""
        key = (target if precision == "int8" else "any", precision)
        if key not in self.made:
            self.made[key] = self._make(target, precision)
        return replace(self.made[key], target=target)

    def seal_graph(self, graph: Graph) -> Sealed:
        """Write one graph's artefact."""
        # An ONNX graph takes any batch; an engine's smallest binds the engine alone.
        batch = {"min": 1, "opt": self.config.opt_batch, "max": self.config.max_batch}
        facts = self._facts(graph, format="onnx", target=graph.target, runtime="onnxruntime", batch=batch)
        parity = {**graph.parity.resolved(), "drawn_by": "onnxruntime"}
        return self._seal(graph.name, {GRAPH_FILE: graph.content}, parity, facts, parent=self.generator)

    def seal_engine(self, precision: Precision, flavour: Flavour) -> list[Sealed]:
        """Build one engine, then write its graph's artefact and its own; a graph that fails leaves neither."""
        graph = self.graph("trt", precision)
        name = f"trt-{flavour.target}-{precision}"
        engine = build_engine(graph.content, name, precision, flavour, self.config)
        sealed = self.seal_graph(graph)
        batch = {"min": self.config.min_batch, "opt": self.config.opt_batch, "max": self.config.max_batch}
        facts = self._facts(graph, format="trt", target=flavour.target, runtime=flavour.name, batch=batch)
        digest = sealed.manifest.files[GRAPH_FILE].sha256
        facts |= {"psnr_db": None, "engine": _engine_facts(engine, batch, self.shape, digest)}
        parity = {"graph": graph.name, **graph.parity.resolved(), "drawn_by": "onnxruntime", "engine_executed": False}
        return [sealed, self._seal(name, {ENGINE_FILE: engine.plan}, parity, facts, parent=sealed)]

    def _make(self, target: Target, precision: Precision) -> Graph:
        name = f"onnx-{target}-{precision}"
        with progress_bar(f"converting to {precision}", 1):
            model = self._converted(target, precision)
        require_label_lookup(model, self.labels)
        content = to_bytes(model)
        parity = self._compare(name, precision, content)
        parity.require(name, precision, self.config)
        return Graph(target, precision, content, parity, model.opset_import[0].version, model.ir_version)

    def _converted(self, target: Target, precision: Precision) -> ModelProto:
        if precision == "fp32":
            return self.traced
        if precision == "fp16":
            return to_fp16(self.traced)
        return to_int8(self.traced, target, self._calibration(), self.shape, exclude=self.config.int8_exclude,
                       reduce_range=self.config.int8_reduce_range)  # fmt: skip

    def _calibration(self) -> Samples:
        return Samples.of(self.config.seed, 0, self.config.calibration_samples, self.labels.count)

    def _compare(self, name: str, precision: Precision, content: bytes) -> Parity:
        with TemporaryDirectory(prefix="sfd-deploy-parity-") as folder:
            path = Path(folder) / GRAPH_FILE
            path.write_bytes(content)
            runtime = OnnxRuntime(path, precision, "cpu")
            return compare(name, runtime, self.samples, self.reference, self.config.max_batch)

    def _facts(self, graph: Graph, **own: Any) -> dict[str, Any]:
        return {
            "labels": self.generator.facts["labels"],
            "image_shape": list(self.shape),
            "sigma_init": self.generator.facts["sigma_init"],
            "precision": graph.precision,
            "opset": graph.opset,
            "ir_version": graph.ir_version,
            "psnr_db": graph.parity.psnr_db,
            "calibration": self._calibration_facts() if graph.precision == "int8" else None,
            "range": {"samples": self.config.range_samples, "largest": self.peak.magnitude, "at": str(self.peak)},
            "engine": None,
            **own,
        }

    def _calibration_facts(self) -> dict[str, Any]:
        samples = self._calibration()
        return {"stream": LATENT_STREAM, "seed": self.config.seed, "count": len(samples),
                "labels": "index modulo classes", "digest": samples.digest(self.shape)}  # fmt: skip

    def _seal(
        self, name: str, files: dict[str, bytes], parity: dict[str, Any], facts: dict[str, Any], *, parent: Sealed
    ) -> Sealed:
        target = self.run.folder / "artefacts" / name
        with sealed_folder(target, "artefact", parents=(parent.as_parent(),), config=self.config.resolved(),
                           seed=self.config.seed, facts=facts) as folder:  # fmt: skip
            for file, content in files.items():
                (folder / file).write_bytes(content)
            write_json(folder / PARITY_FILE, parity)
        return verify(target, "artefact")


def _prepare(run: Run, config: ExportConfig, precisions: Sequence[Precision]) -> _Compiler:
    sealed = run.generator()
    generator = load_generator(sealed)
    labels, shape = labels_of(sealed), generator.image_shape
    with progress_bar("tracing the generator", 1):
        traced = trace_one_step(generator, config.opset)
    require_label_lookup(traced, labels)
    peaks = measure_peaks(traced, Samples.of(config.seed, 0, config.range_samples, labels.count), shape)
    for precision, limit in (("fp32", float("inf")), ("fp16", FP16_LIMIT)):
        if precision in {"fp32", *precisions}:
            require_range(peaks, limit, precision)
    # Not the images that set the INT8 ranges: they would flatter the INT8 graph.
    samples = Samples.of(config.seed, config.calibration_samples, config.parity_samples, labels.count)
    reference = draw_all(GeneratorRuntime(generator), samples.latents, samples.labels, config.max_batch)
    return _Compiler(run, config, sealed, labels, shape, traced, samples, reference, largest(peaks))


def _engine_facts(
    engine: Engine, batch: dict[str, int], shape: tuple[int, int, int], onnx_digest: str
) -> dict[str, Any]:
    profile = {
        "latents": {kind: [size, *shape] for kind, size in batch.items()},
        "class_labels": {kind: [size] for kind, size in batch.items()},
    }
    return {"flavour": engine.flavour.name, "version": engine.version,
            "compute_capabilities": list(engine.compute_capabilities), "profile": profile, "tf32": False,
            "onnx_digest": onnx_digest}  # fmt: skip


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Say a full disk in one line."""
    # ONNX Runtime and its quantiser read and write files: a full temporary folder is no bug of ours.
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        where = error.filename or gettempdir()
        raise RunError(f"{where}: no space left", "free space, or set TMPDIR to a folder that has some") from None


def chosen_of(what: str, asked: Iterable[str], known: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Which of ``known`` are asked for, in its order; nothing asked is the first.

    Raises:
        ConfigError: one that is not known.
    """
    names = set(asked) or {known[0]}
    if unknown := sorted(names - set(known)):
        raise ConfigError(f"unknown {what} {unknown[0]!r}", f"use {', '.join(known)}")
    return tuple(item for item in known if item in names)
