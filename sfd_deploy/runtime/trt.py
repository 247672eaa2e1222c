"""TensorRT engines of both flavours, run on an NVIDIA GPU.

The running part follows NVIDIA's Python API documentation (TensorRT 10 and 11, TensorRT for RTX 1.7)
and was never executed by us: no GPU was at hand. What it refuses, and why, is tested.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.progress import LOGGER
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.seam import Images

ENGINE_FILE = "model.plan"


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two TensorRT products; their Python APIs differ little.

    ``target`` names artefacts; ``ahead_of_time`` says that it compiles without a GPU, for several at once.
    """

    name: Literal["trt", "trt-rtx"]
    target: Literal["gpu", "rtx"]
    title: str
    modules: tuple[str, ...]
    extra: str
    ahead_of_time: bool

    def module(self) -> Any | None:
        """The Python package, or None where it is not installed or its libraries do not load."""
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError):
                continue
        return None

    @property
    def mend(self) -> str:
        """How to install it."""
        return f"pip install 'sfd-deploy[{self.extra}]'"


CLASSIC = Flavour("trt", "gpu", "TensorRT", ("tensorrt",), "gpu", ahead_of_time=False)
RTX = Flavour(
    "trt-rtx", "rtx", "TensorRT for RTX", ("tensorrt_rtx_bindings", "tensorrt_rtx"), "trt-rtx", ahead_of_time=True
)
FLAVOURS = {flavour.name: flavour for flavour in (CLASSIC, RTX)}


def gpu_capability() -> str | None:
    """The first visible GPU's compute capability, such as SM89; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}"


@cache
def logger_for(trt: Any) -> Any:
    """TensorRT's logger, sending warnings and errors to ours: nothing reaches stdout.

    One for each flavour, since TensorRT keeps the first it is given. ``errors`` holds what went wrong since it was
    last cleared.
    """
    failures = {trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR}
    levels = dict.fromkeys(failures, logging.ERROR) | {trt.ILogger.WARNING: logging.WARNING}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in failures:
                self.errors.append(message)
            LOGGER.log(levels.get(severity, logging.DEBUG), "TensorRT: %s", message)

    return Logger()


class TensorRtRuntime:
    """One engine on the first visible GPU. The caller has verified its digest: an engine is code.

    Written from NVIDIA's documentation; never executed by us, for want of a GPU.

    Raises:
        NotRunnableHereError: no GPU, the flavour's package is missing or of another version, or the
            engine is for other GPUs. An engine is never deserialised before all that is known:
            TensorRT crashes on bytes that it cannot use.
    """

    def __init__(self, sealed: Sealed) -> None:
        facts = sealed.facts
        flavour = FLAVOURS[facts["runtime"]]
        self.name: str = flavour.name
        self.trt = require_runnable(sealed.name, flavour, facts["engine"])
        self.image_shape: tuple[int, int, int] = tuple(facts["image_shape"])
        self.largest = int(facts["batch"]["max"])
        self.settings: dict[str, Any] = {
            "provider": flavour.title, "version": self.trt.__version__, "capability": gpu_capability(),
            "arithmetic": facts["precision"],
        }  # fmt: skip
        self._load((sealed.folder / ENGINE_FILE).read_bytes(), sealed.name)

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        parts = [self._run(latents[i : i + self.largest].array(self.image_shape), labels[i : i + self.largest])
                 for i in range(0, len(labels), self.largest)]  # fmt: skip
        return np.concatenate(parts)

    def close(self) -> None:
        """Free the engine and its memory on the GPU."""
        del self.context, self.engine, self.runtime

    def _load(self, plan: bytes, name: str) -> None:  # pragma: no cover - needs an NVIDIA GPU
        import torch

        logger = logger_for(self.trt)
        logger.errors.clear()
        self.runtime = self.trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            reason = logger.errors[0].splitlines()[0] if logger.errors else "no reason given"
            raise NotRunnableHereError(
                f"{name}: TensorRT cannot load the engine ({reason})", "export it on this machine"
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def _run(self, noise: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:  # pragma: no cover - needs a GPU
        import torch

        with torch.cuda.stream(self.stream):
            feeds = {"latents": torch.from_numpy(noise).cuda(), "class_labels": torch.from_numpy(labels).cuda()}
            images = torch.empty_like(feeds["latents"])
            accepted = [self.context.set_input_shape(name, tuple(feed.shape)) for name, feed in feeds.items()]
            for name, tensor in {**feeds, "images": images}.items():
                accepted.append(self.context.set_tensor_address(name, tensor.data_ptr()))
            done = all(accepted) and self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        if not done:
            raise BackendError(f"TensorRT refused a batch of {len(labels)}", "draw batches inside the engine's profile")
        drawn: Images = images.cpu().numpy()
        return drawn


def require_runnable(name: str, flavour: Flavour, engine: dict[str, Any]) -> Any:
    """The flavour's Python package, if this machine can run such an engine.

    Raises:
        NotRunnableHereError: saying what is missing.
    """
    capability = gpu_capability()
    if capability is None:
        raise NotRunnableHereError(
            f"{name}: a {flavour.title} engine needs an NVIDIA GPU with its driver, and PyTorch sees none",
            "run it on a machine that has one; its graph runs in ONNX Runtime",
        )
    if capability not in engine["compute_capabilities"]:
        known = ", ".join(engine["compute_capabilities"])
        raise NotRunnableHereError(f"{name}: built for {known}, this GPU is {capability}", "export it on this machine")
    trt = flavour.module()
    if trt is None:
        raise NotRunnableHereError(f"{name}: {flavour.title} is not installed", flavour.mend)
    # A plan is read by the very version that wrote it; TensorRT for RTX promises no more.
    if trt.__version__ != engine["version"]:
        raise NotRunnableHereError(
            f"{name}: built by {flavour.title} {engine['version']}, installed is {trt.__version__}",
            "export it on this machine, or install that version",
        )
    return trt
