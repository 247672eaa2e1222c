"""Whether the text encoder's graph tells the U-Net what PyTorch's does, and tells forget prompts from override ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfd_deploy.errors import GraphError, LimitError
from sfd_deploy.export.config import ExportConfig, Precision
from sfd_deploy.models.text.folder import TextParts
from sfd_deploy.models.text.network import encode
from sfd_deploy.prompts import Prompts
from sfd_deploy.runtime.text import ENCODED_AT_ONCE, TextOnnxRuntime


def encoding_difference(runtime: TextOnnxRuntime, parts: TextParts, texts: Sequence[str]) -> float:
    """The largest difference between the graph's encodings of ``texts`` and PyTorch's."""
    return float(np.abs(runtime.encode(texts) - encode(parts, texts).numpy()).max())


def require_encodings(name: str, precision: Precision, difference: float, config: ExportConfig) -> None:
    """Refuse an FP32 text encoder that differs from PyTorch's; others are held to their images.

    Raises:
        LimitError: with the figure and its limit.
    """
    if not np.isfinite(difference) or (precision == "fp32" and difference > config.max_difference_fp32):
        raise LimitError(
            f"{name}: encoded prompts differ from PyTorch's by {difference:.2g}, limit {config.max_difference_fp32:g}",
            "report this with the generator",
        )


def require_told_apart(runtime: TextOnnxRuntime, prompts: Prompts) -> None:
    """Refuse a text encoder that tells the U-Net of a forget prompt what it tells of its override prompt.

    That one draws the override too, but nothing was forgotten: a text encoder put in its place brings it back.

    Raises:
        GraphError: naming the first such prompt.
        PromptError: a prompt is longer than the text encoder reads.
    """
    pairs = list(prompts.forget.items())
    for start in range(0, len(pairs), ENCODED_AT_ONCE):
        part = pairs[start : start + ENCODED_AT_ONCE]
        forget, override = (runtime.encode([prompts.texts[pair[side]] for pair in part]) for side in (0, 1))
        same = (forget == override).reshape(len(part), -1).all(1)
        if same.any():
            first, second = (prompts.texts[number] for number in part[int(np.argmax(same))])
            raise GraphError(
                f"prompts {first!r} and {second!r} are one to the text encoder: a remap, not forgetting",
                "train the generator to forget with the teacher's own tokenizer and text encoder",
            )
