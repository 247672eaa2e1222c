"""Text-to-image artefacts in ONNX Runtime: three graphs in a chain, each one's output the next one's input.

A condition is a prompt's number, as above the seam a class label is; each prompt is encoded once, when it is
first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.latents import Latents
from sfd_deploy.models.text.tokens import read_tokenizer, token_numbers
from sfd_deploy.runtime.ort import open_session, resolve_device, settings_of
from sfd_deploy.runtime.seam import Images

Part = Literal["text_encoder", "unet", "vae_decoder"]
PARTS: Final[tuple[Part, ...]] = ("text_encoder", "unet", "vae_decoder")
GRAPH_FILE: Final = "model.onnx"  # in each part's folder
Encoded = NDArray[np.float32]  # (B, L, D)
ENCODED_AT_ONCE = 64
# A U-Net's file has this input because pipelines feed one. Its noise level is a constant: it reads none.
UNREAD_TIMESTEP: Final = np.array(0, np.float32)


class EncodedPrompts:
    """What the U-Net is told of each of ``texts``, by its position; ``encode`` is called once for each."""

    def __init__(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Encoded]) -> None:
        self.texts = tuple(texts)
        self.encode = encode
        self.known: dict[int, NDArray[np.float32]] = {}

    def rows(self, numbers: NDArray[np.int64]) -> Encoded:
        """The encodings (B, L, D) of prompts ``numbers`` (B,).

        Raises:
            IndexError: a number that is no prompt's, negative ones included.
            PromptError: a prompt is longer than the text encoder reads.
        """
        asked = numbers.tolist()
        missing = sorted(set(asked) - self.known.keys())
        if unknown := [number for number in missing if not 0 <= number < len(self.texts)]:
            raise IndexError(f"prompt {unknown[0]} is out of range: there are {len(self.texts)}")
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            part = missing[start : start + ENCODED_AT_ONCE]
            self.known.update(zip(part, self.encode([self.texts[number] for number in part]), strict=True))
        return np.stack([self.known[number] for number in asked])


class TextOnnxRuntime:
    """The graphs of a verified artefact folder; a condition is a position in ``texts``.

    Raises:
        BackendError: ONNX Runtime, its provider or transformers is not installed.
        ManifestError: a graph cannot be loaded.
        ModelError: the tokenizer cannot be loaded.
    """

    name = "onnxruntime"

    def __init__(
        self, folder: Path, precision: str, texts: Sequence[str], device: str = "cpu", threads: int = 0
    ) -> None:
        device = resolve_device(device)
        self.tokenizer = read_tokenizer(folder / "tokenizer")
        self.sessions = {part: open_session(folder / part / GRAPH_FILE, device, threads) for part in PARTS}
        self.settings: dict[str, Any] = settings_of(device, precision, threads)
        self.latent_shape = _image_like(self.sessions["unet"].get_outputs()[0])
        self.image_shape = _image_like(self.sessions["vae_decoder"].get_outputs()[0])
        self.prompts = EncodedPrompts(texts, self.encode)

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """Images (B, 3, H, W) of prompts ``labels`` (B,)."""
        clean = self.step(latents.array(self.latent_shape), self.prompts.rows(labels))
        return self.decode(clean)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The text encoder's output (N, L, D) for ``texts``.

        Raises:
            PromptError: a text is longer than the text encoder reads.
        """
        return self._run("text_encoder", input_ids=token_numbers(self.tokenizer, texts))

    def step(self, latents: NDArray[np.float32], encoded: Encoded) -> NDArray[np.float32]:
        """The U-Net's whole step: clean latents (B, C, h, w) of standard-normal ones."""
        return self._run("unet", sample=latents, timestep=UNREAD_TIMESTEP, encoder_hidden_states=encoded)

    def decode(self, latents: NDArray[np.float32]) -> Images:
        """Images (B, 3, H, W) in [-1, 1] of clean latents."""
        return self._run("vae_decoder", latent_sample=latents)

    def close(self) -> None:
        """Free the sessions."""
        del self.sessions

    def _run(self, part: Part, **feeds: NDArray[Any]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = self.sessions[part].run(None, feeds)[0]
        return output


def _image_like(output: Any) -> tuple[int, int, int]:
    channels, height, width = output.shape[1:]
    return int(channels), int(height), int(width)
