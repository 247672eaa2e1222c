"""A served model, local or remote: class labels or prompts go out with seeds, uint8 images come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError
from sfd_deploy.latents import Latents
from sfd_deploy.prompts import in_utf8
from sfd_deploy.runtime.seam import Images

Transport = Literal["grpc", "http"]
LABEL, PROMPT = "class_labels", "prompt"  # what a model of ours is asked for: one of the two
TYPES = {LABEL: "INT64", PROMPT: "BYTES", "seed": "INT64", "images": "UINT8"}


class TritonRuntime:
    """One model of a Triton server, asked in many requests at once.

    Args:
        address: host and port, as in ``127.0.0.1:8001``.
        model: the model's name on the server.
        protocol: which of the server's two ports ``address`` is.
        rows: images a request, 0 for as many as the model takes. 1 is what single users send, and
            leaves it to the server to form batches.
        concurrency: requests under way at once.
        texts: prompts; a label is then a position in them. None asks for class labels.

    Raises:
        BackendError: the address has a scheme, tritonclient is missing, nothing answers, the model is
            unknown, or it has other inputs and outputs than our python back end.
        PromptError: a text that UTF-8 cannot carry.
    """

    name = "triton"

    def __init__(
        self, address: str, model: str, protocol: Transport = "grpc", rows: int = 0, concurrency: int = 16,
        texts: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.address, self.model, self.protocol, self.concurrency = address, model, protocol, concurrency
        self.prompts = None if texts is None else np.array([in_utf8(text) for text in texts], np.object_)
        if "://" in address:
            raise BackendError(f"{address}: has a scheme", "give host and port alone, as in 127.0.0.1:8001")
        self.library = _import(protocol)
        options = {} if protocol == "grpc" else {"concurrency": concurrency, "network_timeout": 600.0}
        self.client = self._call(lambda: self.library.InferenceServerClient(address, **options))
        try:
            shape, largest, version = self._describe()
        except BaseException:
            self.client.close()
            raise
        self.image_shape = shape
        self.rows = min(rows or largest, largest)
        self.settings: dict[str, Any] = {
            "model": model, "protocol": protocol, "rows": self.rows, "concurrency": concurrency, "server": version,
        }  # fmt: skip

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """Images (B, C, H, W) in [-1, 1], of the 256 levels that a server sends."""
        return self.draw_uint8(latents, labels).astype(np.float32) / np.float32(127.5) - np.float32(1.0)

    def draw_uint8(self, latents: Latents, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (B, C, H, W) uint8 exactly as served.

        Raises:
            BackendError: the server refused a request, or answered with something else than images.
            IndexError: a label that is no prompt's position, negative ones included.
        """
        _require_int64(LABEL, labels)
        _require_int64("seed", latents.seeds)
        starts = range(0, len(labels), self.rows)
        requests = (self._inputs(labels[i : i + self.rows], latents.seeds[i : i + self.rows]) for i in starts)
        parts = [self._images(answer) for answer in self._ask(requests)]
        images = np.concatenate(parts) if parts else np.empty((0, *self.image_shape), np.uint8)
        if len(images) != len(labels):
            raise BackendError(f"{self._where}: {len(images)} images for {len(labels)} labels", _MEND_EMPTY)
        return images

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    @property
    def _where(self) -> str:
        return f"model {self.model} at {self.address}"

    def _describe(self) -> tuple[tuple[int, int, int], int, str]:
        form = {"as_json": True} if self.protocol == "grpc" else {}
        metadata, config, server = self._call(
            lambda: (
                self.client.get_model_metadata(self.model, **form),
                self.client.get_model_config(self.model, **form),
                self.client.get_server_metadata(**form),
            )
        )
        self._require_contract(metadata)
        channels, height, width = (int(size) for size in metadata["outputs"][0]["shape"][1:])
        config = config.get("config", config)  # gRPC wraps it
        return (channels, height, width), max(1, int(config.get("max_batch_size", 0))), str(server["version"])

    @property
    def _asked_for(self) -> str:
        return LABEL if self.prompts is None else PROMPT

    def _require_contract(self, metadata: Any) -> None:
        self._require_kind({tensor["name"] for tensor in metadata["inputs"]})
        for side, names in (("inputs", (self._asked_for, "seed")), ("outputs", ("images",))):
            found = {tensor["name"]: tensor["datatype"] for tensor in metadata[side]}
            for name in names:
                if name not in found:
                    raise BackendError(f"{self._where}: has no tensor `{name}`", "name a model of a python repository")
                if found[name] != TYPES[name]:
                    raise BackendError(
                        f"{self._where}: `{name}` is {found[name]}, wants {TYPES[name]}", "serve it again"
                    )

    def _require_kind(self, inputs: set[str]) -> None:
        if self._asked_for in inputs:
            return
        if PROMPT in inputs:
            raise BackendError(f"{self._where}: draws from prompts, and is asked for class labels", "give it texts")
        if LABEL in inputs:
            raise BackendError(f"{self._where}: draws class labels, and is asked for prompts", "give it no texts")

    def _inputs(self, labels: NDArray[np.int64], seeds: NDArray[np.int64]) -> list[Any]:
        conditions = labels if self.prompts is None else self._prompts_at(labels)
        inputs = []
        for name, values in ((self._asked_for, conditions), ("seed", seeds)):
            tensor = self.library.InferInput(name, [len(values), 1], TYPES[name])
            tensor.set_data_from_numpy(np.ascontiguousarray(values).reshape(-1, 1))
            inputs.append(tensor)
        return inputs

    def _prompts_at(self, numbers: NDArray[np.int64]) -> NDArray[np.object_]:
        assert self.prompts is not None
        # A negative number would count from the end.
        if len(unknown := numbers[(numbers < 0) | (numbers >= len(self.prompts))]):
            raise IndexError(f"prompt {unknown[0]} is out of range: there are {len(self.prompts)}")
        return self.prompts[numbers]

    def _ask(self, requests: Iterable[list[Any]]) -> Iterable[Any]:
        if self.protocol == "http":
            # The HTTP client is bound to one thread and has concurrency of its own.
            waiting = [self.client.async_infer(self.model, inputs) for inputs in requests]
            return [self._call(pending.get_result) for pending in waiting]
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda inputs: self._call(lambda: self.client.infer(self.model, inputs)), requests))

    def _images(self, answer: Any) -> NDArray[np.uint8]:
        try:
            images: NDArray[np.uint8] | None = answer.as_numpy("images")
        except ValueError:  # no bytes for the shape that the answer announces
            images = None
        if images is None or images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            found = "empty" if images is None else f"{images.dtype} {images.shape}"
            raise BackendError(f"{self._where}: `images` is {found}, wants uint8 (B, {self.image_shape})", _MEND_EMPTY)
        return images

    def _call(self, ask: Callable[[], Any]) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return ask()
        except InferenceServerException as error:
            message = str(error.message()).splitlines()[0]
            raise BackendError(f"{self._where}: {message}", "mend the request or start the server") from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise BackendError(f"{self._where}: nothing answers ({reason})", "start the server") from None


# Measured: a 2.51 server whose Python has numpy 2 is ready and answers with empty tensors.
_MEND_EMPTY = "give the server's Python numpy below 2, or a newer server"


def _require_int64(name: str, values: NDArray[Any]) -> None:
    if values.dtype != np.int64:
        raise BackendError(f"input `{name}`: wants INT64, got {values.dtype}", "convert it with astype(numpy.int64)")


def _import(protocol: Transport) -> Any:
    try:
        if protocol == "http":
            import tritonclient.http as library
        else:
            import tritonclient.grpc as library
    except ImportError:
        raise BackendError("tritonclient is not installed", "pip install 'sfd-deploy[serve]'") from None
    return library
