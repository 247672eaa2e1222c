"""A served model of class labels: one graph. Copied into model repositories as ``drawing.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Drawing:
    """Draws class labels; ``open_graph`` makes a session of a graph's file."""

    asked_for = "class_labels"

    def __init__(self, folder: Path, facts: dict[str, Any], open_graph: Callable[[Path], Any]) -> None:
        self.count = int(facts["labels"])
        self.latent_shape = tuple(facts["image_shape"])
        self.graph = open_graph(folder / "model.onnx")

    def fault(self, labels: NDArray[np.int64]) -> str | None:
        """What is wrong with a request's labels, in one sentence, or None."""
        wrong = labels[(labels < 0) | (labels >= self.count)]
        if len(wrong):
            return f"class_labels: label {wrong[0]} is out of range; use 0 to {self.count - 1}"
        return None

    def draw(self, labels: NDArray[np.int64], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (B, C, H, W) in [-1, 1]."""
        images: NDArray[np.float32] = self.graph.run(["images"], {"latents": noise, "class_labels": labels})[0]
        return images
