"""The export stage for text-to-image: a run's generator to artefacts of three graphs or engines each.

Named as the others: ``onnx-cpu-int8`` is a folder in Optimum's layout, ``trt-rtx-fp16`` one of engines built
from ``onnx-trt-fp16``. INT8 is the U-Net's precision; the parts before and after it stay FP32.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sfd_deploy.export.config import BACKENDS, LATENT_STREAM, PRECISIONS, Precision, Target, TextExportConfig
from sfd_deploy.export.engine import Engine, build_engine, find_flavour
from sfd_deploy.export.fp16 import to_fp16
from sfd_deploy.export.graph import to_bytes
from sfd_deploy.export.int8 import quantise
from sfd_deploy.export.parity import Parity, compare
from sfd_deploy.export.ranges import FP16_LIMIT, Peak, largest, peaks_over, require_range
from sfd_deploy.export.samples import Samples
from sfd_deploy.export.stage import PARITY_FILE, chosen_of, full_disk_told
from sfd_deploy.export.text_facts import engine_facts, part_precision, peak_facts
from sfd_deploy.export.text_folder import copy_words, write_pipeline
from sfd_deploy.export.text_graphs import Graphs, require_joints, trace_text_generator
from sfd_deploy.export.text_parity import encoding_difference, require_encodings, require_told_apart
from sfd_deploy.export.text_samples import feeds_of, spread
from sfd_deploy.export.weights import require_one_file
from sfd_deploy.manifest import Sealed, digest_of, verify
from sfd_deploy.models.text.folder import TextParts, load_parts
from sfd_deploy.models.text.generator import OneStepTextGenerator
from sfd_deploy.models.text.network import text_denoiser
from sfd_deploy.progress import log_to, progress_bar
from sfd_deploy.prompts import TEXT_TO_IMAGE, Prompts, prompts_in
from sfd_deploy.runs import Run, sealed_folder, write_json
from sfd_deploy.runtime.seam import Images, draw_all
from sfd_deploy.runtime.text import PARTS, Part, TextOnnxRuntime
from sfd_deploy.runtime.text_pytorch import TextGeneratorRuntime
from sfd_deploy.runtime.trt import ENGINE_FILE, Flavour


def export_text_run(
    run: Run, backends: Sequence[str] = (), precisions: Sequence[str] = (), config: TextExportConfig | None = None
) -> list[Sealed]:
    """Compile the run's generator for each back end in each precision; empty means onnx, empty means fp32.

    An artefact is sealed whole or not at all; those finished before one fails are kept.

    Raises:
        As ``export_run``; RunError where the generator records no prompts, PromptError where one is too long.
    """
    config = config or TextExportConfig()
    chosen = chosen_of("back end", backends, BACKENDS)
    wanted = chosen_of("precision", precisions, PRECISIONS)
    flavour = find_flavour() if "trt" in chosen else None
    with (
        log_to(run.work / "export.log"),
        full_disk_told(),
        TemporaryDirectory(prefix="sfd-deploy-export-") as scratch,
    ):
        compiler = _prepare(run, config, wanted, Path(scratch))
        sealed: list[Sealed] = []
        if "onnx" in chosen:
            sealed += [compiler.seal_graphs("cpu", precision) for precision in wanted]
        if flavour is not None:
            for precision in wanted:
                sealed += compiler.seal_engines(precision, flavour)
    return sealed


@dataclass(frozen=True)
class Pipeline:
    """Checked graphs, written to ``folder`` and ready to be sealed."""

    precision: Precision
    folder: Path
    graphs: Graphs
    parity: Parity
    encoding_difference: float

    def comparison(self) -> dict[str, Any]:
        """What ``parity.json`` says."""
        return {**self.parity.resolved(), "encoding_difference": self.encoding_difference, "drawn_by": "onnxruntime"}


@dataclass(frozen=True)
class _Compiler:
    """One generator, traced once; graphs are made from that trace and compared with these images.

    ``runtime`` draws with the traced graphs; ``scratch`` holds every folder until it is sealed.
    """

    run: Run
    config: TextExportConfig
    generator: Sealed
    prompts: Prompts
    parts: TextParts
    traced: Graphs
    runtime: TextOnnxRuntime
    scratch: Path
    peaks: dict[str, Peak] = field(default_factory=dict)
    made: dict[tuple[Target, Precision], Pipeline] = field(default_factory=dict)

    def pipeline(self, target: Target, precision: Precision) -> Pipeline:
        """The graphs of one target and precision, compared with PyTorch; only INT8 differs between targets."""
        target = target if precision == "int8" else "cpu"
        if (target, precision) not in self.made:
            self.made[target, precision] = self._make(target, precision)
        return self.made[target, precision]

    def seal_graphs(self, target: Target, precision: Precision) -> Sealed:
        """Write one artefact of graphs."""
        made = self.pipeline(target, precision)
        batch = {"min": 1, "opt": self.config.opt_batch, "max": self.config.max_batch}
        facts = self._facts(made, format="onnx", target=target, runtime="onnxruntime", batch=batch)
        place = self.run.folder / "artefacts" / f"onnx-{target}-{precision}"
        with sealed_folder(place, "artefact", parents=(self.generator.as_parent(),), config=self.config.resolved(),
                           seed=self.config.seed, facts=facts) as folder:  # fmt: skip
            shutil.copytree(made.folder, folder, dirs_exist_ok=True)
            write_json(folder / PARITY_FILE, made.comparison())
        return verify(place, "artefact")

    def seal_engines(self, precision: Precision, flavour: Flavour) -> list[Sealed]:
        """Build three engines, then write their graphs' artefact and their own; one that fails leaves neither."""
        made = self.pipeline("trt", precision)
        name = f"trt-{flavour.target}-{precision}"
        engines = {part: self._engine(name, part, made, flavour) for part in PARTS}
        parent = self.seal_graphs("trt", precision)
        batch = {"min": self.config.min_batch, "opt": self.config.opt_batch, "max": self.config.max_batch}
        facts = self._facts(made, format="trt", target=flavour.target, runtime=flavour.name, batch=batch)
        facts |= {"psnr_db": None, "engine": engine_facts(engines, made.graphs, batch, parent)}
        place = self.run.folder / "artefacts" / name
        with sealed_folder(place, "artefact", parents=(parent.as_parent(),), config=self.config.resolved(),
                           seed=self.config.seed, facts=facts) as folder:  # fmt: skip
            for part, engine in engines.items():
                (folder / part).mkdir()
                (folder / part / ENGINE_FILE).write_bytes(engine.plan)
            copy_words(self.generator.folder, folder)
            write_json(folder / PARITY_FILE, {"graph": parent.name, **made.comparison(), "engine_executed": False})
        return [parent, verify(place, "artefact")]

    def check_ranges(self, precisions: Sequence[Precision]) -> None:
        """Measure every weight and, over the range samples, every activation of the three graphs.

        Raises:
            LimitError: naming the first number at fault.
        """
        samples = spread(self.config.seed, 0, self.config.range_samples, self.prompts.count)
        for part in PARTS:
            feeds = feeds_of(self.runtime, part, samples, self.config.max_batch)
            peaks = peaks_over(self.traced[part], feeds, len(samples))
            for precision, limit in (("fp32", float("inf")), ("fp16", FP16_LIMIT)):
                if precision in {"fp32", *precisions}:
                    require_range(peaks, limit, f"{precision} ({part})")
            self.peaks[part] = largest(peaks)

    @cached_property
    def samples(self) -> Samples:
        """What graphs are compared on: not what set the INT8 ranges, which would flatter the INT8 graph."""
        start = self.config.calibration_samples
        return spread(self.config.seed, start, self.config.parity_samples, self.prompts.count)

    @cached_property
    def reference(self) -> Images:
        """The PyTorch generator's images of ``samples``."""
        asked = np.unique(self.samples.labels)
        denoiser = text_denoiser(self.parts, [self.prompts.texts[number] for number in asked])
        generator = OneStepTextGenerator(denoiser, denoiser.sigma_range[1], self.parts.vae).eval()
        labels = np.searchsorted(asked, self.samples.labels)
        return draw_all(TextGeneratorRuntime(generator), self.samples.latents, labels, self.config.max_batch)

    def _make(self, target: Target, precision: Precision) -> Pipeline:
        name = f"onnx-{target}-{precision}"
        with progress_bar(f"converting to {precision}", 1):
            graphs = self._converted(target, precision)
        require_joints(graphs)
        folder = self.scratch / name
        write_pipeline(graphs, self.generator.folder, self.parts.scheduler, folder)
        runtime = TextOnnxRuntime(folder, precision, self.prompts.texts)
        asked = [self.prompts.texts[number] for number in np.unique(self.samples.labels)]
        difference = encoding_difference(runtime, self.parts, asked)
        require_encodings(name, precision, difference, self.config)
        parity = compare(name, runtime, self.samples, self.reference, self.config.max_batch)
        parity.require(name, precision, self.config)
        return Pipeline(precision, folder, graphs, parity, difference)

    def _converted(self, target: Target, precision: Precision) -> Graphs:
        if precision == "fp32":
            return self.traced
        if precision == "fp16":
            return {part: to_fp16(graph) for part, graph in self.traced.items()}
        feeds = feeds_of(self.runtime, "unet", self._calibration(), self.config.max_batch)
        unet = quantise(self.traced["unet"], target, feeds, exclude=self.config.int8_exclude,
                        reduce_range=self.config.int8_reduce_range)  # fmt: skip
        return {**self.traced, "unet": unet}

    def _calibration(self) -> Samples:
        return spread(self.config.seed, 0, self.config.calibration_samples, self.prompts.count)

    def _engine(self, name: str, part: Part, made: Pipeline, flavour: Flavour) -> Engine:
        # Without the timestep that it does not read, which an engine would ask for.
        graph, name = made.graphs[part], f"{name} {part}"
        require_one_file(graph, name, "TensorRT's parser", "export --trt --fp16, which is half as large")
        return build_engine(to_bytes(graph), name, made.precision, flavour, self.config)

    def _facts(self, made: Pipeline, **own: Any) -> dict[str, Any]:
        precisions = {part: part_precision(part, made.precision) for part in PARTS}
        unet = made.graphs["unet"]
        return {
            "kind": TEXT_TO_IMAGE,
            "prompts": self.prompts.count,
            "prompts_digest": digest_of(self.prompts.resolved()),
            "image_shape": list(self.runtime.image_shape),
            "latent_shape": list(self.runtime.latent_shape),
            "sigma_init": self.generator.facts["sigma_init"],
            "precision": made.precision,
            "precisions": precisions,
            "opset": unet.opset_import[0].version,
            "ir_version": unet.ir_version,
            "psnr_db": made.parity.psnr_db,
            "calibration": self._calibration_facts() if made.precision == "int8" else None,
            "range": {
                "samples": self.config.range_samples,
                **{part: peak_facts(peak) for part, peak in self.peaks.items()},
            },
            "engine": None,
            **own,
        }

    def _calibration_facts(self) -> dict[str, Any]:
        samples = self._calibration()
        return {"stream": LATENT_STREAM, "seed": self.config.seed, "count": len(samples),
                "prompts": "evenly over all", "digest": samples.digest(self.runtime.latent_shape)}  # fmt: skip


def _prepare(run: Run, config: TextExportConfig, precisions: Sequence[Precision], scratch: Path) -> _Compiler:
    sealed = run.generator()
    prompts, parts = prompts_in(sealed.folder), load_parts(sealed)
    with progress_bar("tracing the generator", 1):
        traced = trace_text_generator(parts, float(sealed.facts["sigma_init"]), config.opset)
    folder = scratch / "traced"
    write_pipeline(traced, sealed.folder, parts.scheduler, folder)
    runtime = TextOnnxRuntime(folder, "fp32", prompts.texts)
    require_told_apart(runtime, prompts)
    compiler = _Compiler(run, config, sealed, prompts, parts, traced, runtime, scratch)
    compiler.check_ranges(precisions)
    return compiler
