"""How far Optimum's ONNX Runtime pipeline and our runtime are apart on one exported folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.runtime.text import TextOnnxRuntime


def difference(folder: Path, precision: str, prompts: Sequence[str], latents: NDArray[np.float32]) -> float:
    """The largest difference of a value, images in [-1, 1], over ``prompts`` drawn from ``latents`` (N, C, h, w)."""
    runtime = TextOnnxRuntime(folder, precision, prompts)
    try:
        ours = runtime.decode(runtime.step(latents, runtime.encode(prompts)))
    finally:
        runtime.close()
    return float(np.abs(_drawn_by_optimum(folder, prompts, latents) - ours).max())


def _drawn_by_optimum(folder: Path, prompts: Sequence[str], latents: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports' deprecations
        from optimum.onnxruntime import ORTStableDiffusionPipeline  # type: ignore[import-untyped]

        pipe: Any = ORTStableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            list(prompts), num_inference_steps=1, guidance_scale=1.0, latents=torch.from_numpy(latents),
            output_type="np",
        ).images  # fmt: skip
    drawn: NDArray[np.float32] = images.transpose(0, 3, 1, 2) * 2 - 1
    return drawn
