"""Tiny text-to-image runs, sealed as training seals them, and all their artefacts; each is made once a test session."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from sfd_deploy.export.config import TextExportConfig
from sfd_deploy.export.text_stage import export_text_run
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.folder import TextParts
from sfd_deploy.models.text.generator import save_text_generator
from sfd_deploy.models.text.network import text_denoiser
from sfd_deploy.prompts import Prompts
from sfd_deploy.runs import Run, sealed_folder, write_json
from sfd_deploy.runtime.trt import RTX
from tests.text_world import Layout, text_parts

PROMPTS = Prompts(
    texts=("", "a green bag", "a coat on a black background", "a red sandal", "a red sneaker", "the grey sandal",
           "the grey sneaker"),
    retained=(1, 2), forget={3: 4, 5: 6},
)  # fmt: skip
SIGMA = 2.5
QUICK = TextExportConfig(calibration_samples=16, range_samples=16, parity_samples=16)


def seal_text_run(
    folder: Path, layout: Layout = "sd1", change: Callable[[TextParts], object] = lambda parts: None,
    prompts: Prompts = PROMPTS,
) -> Run:  # fmt: skip
    """A run folder whose generator is the tiny pipeline of a layout, after ``change``."""
    parts = copy.deepcopy(text_parts(layout))
    with torch.no_grad():
        change(parts)
    generator = OneStepGenerator(text_denoiser(parts, [""]), SIGMA)
    facts = {
        "kind": "text-to-image", "image_shape": [4, 8, 8], "sigma_init": generator.sigma_init, "prompts": prompts.count
    }  # fmt: skip
    with sealed_folder(folder / "generator", "generator", facts=facts) as target:
        save_text_generator(generator, parts, target)
        write_json(target / "prompts.json", prompts.resolved())
    return Run(folder)


@cache
def exported_text_run(layout: Layout) -> tuple[Run, dict[str, Sealed]]:
    """A run with its artefacts: sd1's all (engines where TensorRT for RTX is installed), sd2's in FP32. Read-only."""
    folder = Path(tempfile.mkdtemp(prefix="sfd-deploy-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = seal_text_run(folder / layout, layout)
    everything = ("fp32", "fp16", "int8") if layout == "sd1" else ("fp32",)
    backends = ("onnx", "trt") if layout == "sd1" and RTX.module() is not None else ("onnx",)
    return run, {item.name: item for item in export_text_run(run, backends, everything, QUICK)}
