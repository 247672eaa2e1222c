"""What Triton's python back end loads: the frame of a served model; a condition and a seed in, uint8 images out.

This file is copied into model repositories and runs in Triton's environment, which has what
``triton-requirements.txt`` lists and nothing of ours: ``latents.py`` and ``drawing.py`` lie beside it, the
latter one of ``labels.py`` and ``prompts.py``. Clients never send latents, so what can be drawn is what a seed
draws. All files are checked against ``serving.json`` before one is used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only in Triton's stub
from numpy.typing import NDArray

FACTS = "serving.json"
SAID = "sfd-deploy: "  # how the server's log tells our words from its own


class TritonPythonModel:
    """The three calls that Triton makes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify the model's files and open its graphs with the settings it was audited with."""
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            facts = verified_facts(folder)
            self.latents = load_module(folder / "latents.py")
            open_graph = partial(open_session, settings=facts["settings"])
            self.drawing = load_module(folder / "drawing.py").Drawing(folder, facts, open_graph)
        except Exception as error:
            # Measured on 2.51: now and then the server aborts over a failed load and loses its reason.
            print(f"{SAID}{error}", file=sys.stderr, flush=True)
            raise

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order; a faulty request gets its own error and spoils no other."""
        asked = [(column(request, self.drawing.asked_for), column(request, "seed")) for request in requests]
        faults = [self.drawing.fault(conditions) or fault(seeds) for conditions, seeds in asked]
        sound = [rows for rows, found in zip(asked, faults, strict=True) if found is None]
        drawn = iter(self.draw(sound))
        return [failure(found) if found else next(drawn) for found in faults]

    def draw(self, asked: list[tuple[NDArray[Any], NDArray[np.int64]]]) -> list[Any]:
        """Draw the rows of all requests as one batch and part them again."""
        if not asked:
            return []
        conditions, seeds = (np.concatenate(parts) for parts in zip(*asked, strict=True))
        noise = self.latents.standard_normal(seeds, self.drawing.latent_shape)
        images = self.drawing.draw(conditions, noise)
        ends = np.cumsum([len(rows) for rows, _ in asked])
        return [answer(part) for part in np.split(images, ends[:-1])]

    def finalize(self) -> None:
        """Free the sessions."""
        del self.drawing


def verified_facts(folder: Path) -> dict[str, Any]:
    """The facts beside the model, once every file that they name has the digest that they record.

    Raises:
        ValueError: naming the file that differs; Triton then refuses to load the model.
    """
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    for name, recorded in facts["files"].items():
        found = sha256_of(folder / name)
        if found != recorded:
            raise ValueError(
                f"{name}: sha256 is {found[:12]}, {FACTS} says {recorded[:12]}; run `sfd-deploy serve` again"
            )
    return facts


def sha256_of(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_module(path: Path) -> Any:
    """Import a file by its path: nothing else of that name can come first."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def open_session(model: Path, settings: dict[str, Any]) -> ort.InferenceSession:
    """ONNX Runtime as the audit ran it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.log_severity_level = 3
    return ort.InferenceSession(str(model), options, providers=[settings["provider"]])


def column(request: Any, name: str) -> NDArray[Any]:
    """An input (B, 1) as (B,)."""
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)  # type: ignore[no-any-return]


def fault(seeds: NDArray[np.int64]) -> str | None:
    """What is wrong with a request's seeds, in one sentence, or None."""
    negative = seeds[seeds < 0]
    if len(negative):
        return f"seed: seed {negative[0]} is negative; use 0 to 9223372036854775807"
    return None


def answer(images: NDArray[np.float32]) -> Any:
    """A response with images in [-1, 1] as 0..255, rounded as ``sfd_deploy.runtime.seam.to_uint8`` does."""
    if not np.isfinite(images).all():
        return failure("images: the model drew values that are not finite", pb_utils.TritonError.INTERNAL)
    levels = np.rint((images + np.float32(1.0)) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    return pb_utils.InferenceResponse([pb_utils.Tensor("images", levels)])


def failure(message: str, code: int | None = None) -> Any:
    """A response that carries an error; the request's own fault unless ``code`` says otherwise."""
    code = pb_utils.TritonError.INVALID_ARG if code is None else code
    return pb_utils.InferenceResponse([], pb_utils.TritonError(message, code))
