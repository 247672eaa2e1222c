"""What this machine can run: each check imports or starts the real thing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """One back end: whether it works here, what was found, and the mend."""

    name: str
    works: bool
    detail: str
    mend: str


def examine() -> list[Finding]:
    """Check every back end; a missing one is a finding, never an error."""
    return [
        _package("pytorch", "torch", "torch", "pip install torch"),
        _cuda(),
        _package("onnxruntime", "onnxruntime", "onnxruntime", "pip install 'sfd-deploy[cpu]'"),
        _package(
            "trt-rtx compiler",
            "tensorrt_rtx_bindings",
            "tensorrt-rtx-cu12-bindings",
            "pip install 'sfd-deploy[trt-rtx]'",
        ),
        _package("tensorrt", "tensorrt", "tensorrt", "on a machine with an NVIDIA GPU: pip install 'sfd-deploy[gpu]'"),
        _package("tritonclient", "tritonclient.grpc", "tritonclient", "pip install 'sfd-deploy[serve]'"),
        _triton(),
    ]


def _package(name: str, module: str, distribution: str, mend: str) -> Finding:
    def probe() -> str:
        importlib.import_module(module)
        return metadata.version(distribution)

    return _finding(name, probe, mend)


def _finding(name: str, probe: Callable[[], str], mend: str) -> Finding:
    try:
        return Finding(name, True, probe(), "")
    except Exception as error:  # any failure of somebody else's library means the same here: it does not work
        return Finding(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:120], mend)


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("cuda gpu", True, torch.cuda.get_device_name(0), "")
    mend = "engines are built but not run here; audit and serve them on a machine with an NVIDIA GPU"
    return Finding("cuda gpu", False, "no CUDA GPU is visible to PyTorch", mend)


def _triton() -> Finding:
    folder = Path(os.environ.get("SFD_DEPLOY_TRITON", ".triton"))
    found = sorted(folder.glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    if found:
        return Finding("tritonserver", True, str(found[0]), "")
    return Finding("tritonserver", False, f"none in {folder}", "sfd-deploy serve --install-triton .triton")
