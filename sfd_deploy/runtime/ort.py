"""ONNX graphs in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.errors import BackendError, ManifestError
from sfd_deploy.latents import Latents
from sfd_deploy.runtime.seam import Images

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime:
    """One ONNX graph with inputs ``latents`` and ``class_labels`` and output ``images``.

    Raises:
        BackendError: ONNX Runtime or the provider is not installed.
        ManifestError: the graph cannot be loaded.
    """

    name = "onnxruntime"

    def __init__(self, model: Path, precision: str, device: str = "cpu", threads: int = 0) -> None:
        device = resolve_device(device)
        self.session = open_session(model, device, threads)
        self.settings = settings_of(device, precision, threads)
        channels, height, width = self.session.get_inputs()[0].shape[1:]
        self.image_shape = (int(channels), int(height), int(width))

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        feeds = {"latents": latents.array(self.image_shape), "class_labels": labels}
        return self.session.run(["images"], feeds)[0]  # type: ignore[no-any-return]

    def close(self) -> None:
        """Free the session."""
        del self.session


def open_session(model: Path, device: str, threads: int = 0) -> Any:
    """An ONNX Runtime session of one graph; ``device`` is cpu or cuda.

    Raises:
        BackendError: ONNX Runtime is not installed.
        ManifestError: the graph cannot be loaded.
    """
    ort = _import()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=[PROVIDERS[device]])
    except Exception as error:  # ONNX Runtime raises its own unexported types
        reason = str(error).splitlines()[0]
        raise ManifestError(f"{model}: ONNX Runtime cannot load it ({reason})", "export it again") from None


def settings_of(device: str, precision: str, threads: int) -> dict[str, Any]:
    """What shapes the numbers of a graph of ``precision`` on ``device``."""
    # The CPU provider computes FP16 operators in FP32: such a row is evidence for FP32 arithmetic only.
    arithmetic = "fp32" if (device, precision) == ("cpu", "fp16") else precision
    return {"provider": PROVIDERS[device], "arithmetic": arithmetic, "threads": threads}


def resolve_device(name: str) -> str:
    """``auto`` to cuda where ONNX Runtime has that provider, else cpu.

    Raises:
        BackendError: cuda was asked for and ONNX Runtime lacks it.
    """
    available = PROVIDERS["cuda"] in _import().get_available_providers()
    if name == "auto":
        return "cuda" if available and Path("/dev/nvidiactl").exists() else "cpu"
    if name == "cuda" and not available:
        raise BackendError(
            "ONNX Runtime here has no CUDA provider", "pip install 'sfd-deploy[gpu]', or use --device cpu"
        )
    return name


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "onnxruntime is not installed", "pip install 'sfd-deploy[cpu]' or 'sfd-deploy[gpu]'"
        ) from None
    return onnxruntime
