"""Text-to-image artefacts as TensorRT engines: the chain of ``runtime/text.py`` on an NVIDIA GPU.

As ``runtime/trt.py``, the running part follows NVIDIA's documentation and was never executed by us. What it
refuses, and why, is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.text.tokens import read_tokenizer, token_numbers
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.seam import Images
from sfd_deploy.runtime.text import PARTS, Encoded, EncodedPrompts, Part
from sfd_deploy.runtime.trt import ENGINE_FILE, FLAVOURS, gpu_capability, logger_for, require_runnable


class TextTensorRtRuntime:
    """The engines of a verified artefact; a condition is a position in ``texts``.

    Raises:
        NotRunnableHereError: as ``TensorRtRuntime``.
    """

    def __init__(self, sealed: Sealed, texts: Sequence[str]) -> None:
        facts = sealed.facts
        flavour = FLAVOURS[facts["runtime"]]
        self.name: str = flavour.name
        trt = require_runnable(sealed.name, flavour, facts["engine"])
        self.settings: dict[str, Any] = {
            "provider": flavour.title, "version": trt.__version__, "capability": gpu_capability(),
            "arithmetic": facts["precision"],
        }  # fmt: skip
        self._load(trt, sealed, texts)

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """Images (B, 3, H, W) of prompts ``labels`` (B,)."""
        parts = [
            self._draw(latents[i : i + self.largest], labels[i : i + self.largest])
            for i in range(0, len(labels), self.largest)
        ]
        return np.concatenate(parts)

    def close(self) -> None:
        """Free the engines and their memory on the GPU."""
        del self.engines

    def _load(self, trt: Any, sealed: Sealed, texts: Sequence[str]) -> None:  # pragma: no cover - needs an NVIDIA GPU
        facts = sealed.facts
        self.largest = int(facts["batch"]["max"])
        self.latent_shape: tuple[int, int, int] = tuple(facts["latent_shape"])
        self.image_shape: tuple[int, int, int] = tuple(facts["image_shape"])
        self.tokenizer = read_tokenizer(sealed.folder / "tokenizer")
        self.engines = {part: _Engine(trt, sealed.folder / part / ENGINE_FILE, part) for part in PARTS}
        self.prompts = EncodedPrompts(texts, self._encode)

    def _draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:  # pragma: no cover - needs a GPU
        encoded = self.prompts.rows(labels)
        clean = self.engines["unet"](sample=latents.array(self.latent_shape), encoder_hidden_states=encoded)
        return self.engines["vae_decoder"](latent_sample=clean)

    def _encode(self, texts: Sequence[str]) -> Encoded:  # pragma: no cover - needs a GPU
        numbers = token_numbers(self.tokenizer, texts)
        batches = range(0, len(numbers), self.largest)
        encoder = self.engines["text_encoder"]
        return np.concatenate([encoder(input_ids=numbers[i : i + self.largest]) for i in batches])


class _Engine:  # pragma: no cover - needs an NVIDIA GPU
    """One engine of one output. Its digest is verified: an engine is code."""

    def __init__(self, trt: Any, plan: Path, part: Part) -> None:
        import torch

        logger = logger_for(trt)
        logger.errors.clear()
        self.part = part
        self.runtime = trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            reason = logger.errors[0].splitlines()[0] if logger.errors else "no reason given"
            raise NotRunnableHereError(
                f"{plan}: TensorRT cannot load the engine ({reason})", "export it on this machine"
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        (self.output,) = (name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def __call__(self, **arrays: NDArray[Any]) -> NDArray[np.float32]:
        import torch

        with torch.cuda.stream(self.stream):
            tensors = {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}
            accepted = [self.context.set_input_shape(name, tuple(item.shape)) for name, item in tensors.items()]
            shape = tuple(self.context.get_tensor_shape(self.output))
            tensors[self.output] = torch.empty(shape, dtype=torch.float32, device="cuda")
            accepted += [self.context.set_tensor_address(name, item.data_ptr()) for name, item in tensors.items()]
            done = all(accepted) and self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        if not done:
            raise BackendError(f"{self.part}: TensorRT refused the batch", "draw batches inside the engine's profile")
        output: NDArray[np.float32] = tensors[self.output].cpu().numpy()
        return output
