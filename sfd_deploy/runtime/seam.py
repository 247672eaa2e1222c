"""The one seam after training: latents and labels in, images out, whatever runs it.

A label is a condition's number: a class's, or a prompt's.

Audit, bench, precision choice and serving checks are written against ``Runtime`` alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.latents import Latents

Images = NDArray[np.float32]  # (B, C, H, W) in [-1, 1]


class Runtime(Protocol):
    """Anything that draws."""

    @property
    def name(self) -> str:
        """pytorch, onnxruntime, trt, trt-rtx or triton."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What shapes its numbers and speed (provider, threads, arithmetic); serving must use what was audited."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images; of latents too, unless the back end draws from prompts."""
        ...

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """Images (B, C, H, W) float32 in [-1, 1] for ``latents`` and ``labels`` (B,)."""
        ...

    def close(self) -> None:
        """Release sessions, connections and memory."""
        ...


def draw_all(runtime: Runtime, latents: Latents, labels: NDArray[np.int64], batch: int) -> Images:
    """Draw in batches of at most ``batch``; (N, C, H, W) float32.

    Raises:
        ValueError: latents and labels differ in number.
    """
    if len(latents) != len(labels):
        raise ValueError(f"{len(latents)} latents but {len(labels)} labels")
    parts = [runtime.draw(latents[i : i + batch], labels[i : i + batch]) for i in range(0, len(labels), batch)]
    return np.concatenate(parts) if parts else np.empty((0, *runtime.image_shape), np.float32)


def to_uint8(images: Images) -> NDArray[np.uint8]:
    """Images in [-1, 1] to 0..255, rounded half to even; what a server returns."""
    scaled: NDArray[np.uint8] = np.rint((images + np.float32(1.0)) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    return scaled
