"""Triton's stub as the back end sees it, so that its own arithmetic and refusals run in this process."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sfd_deploy.serving.repository import BACKEND


class Tensor(SimpleNamespace):
    """Triton's tensor as the back end sees it: a name and an array."""

    def __init__(self, name: str, array: Any) -> None:
        super().__init__(name=name, array=array)

    def as_numpy(self) -> Any:
        return self.array


class TritonError(SimpleNamespace):
    """Triton's error: a message and a code."""

    INVALID_ARG, INTERNAL = 3, 1

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message=message, code=code)


class InferenceResponse(SimpleNamespace):
    """Triton's response: tensors or an error."""

    def __init__(self, tensors: list[Tensor], error: TritonError | None = None) -> None:
        super().__init__(tensors=tensors, error=error)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file that is copied into repositories, with the transport of Triton's stub stood in for."""
    transport = ModuleType("triton_python_backend_utils")
    vars(transport).update(
        Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=lambda request, name: request[name],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", transport)
    for name in ("latents", "drawing"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # put back what loading replaces
    spec = importlib.util.spec_from_file_location("served_model", BACKEND / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(backend, version):
    """The module's ``version`` folder as Triton opens it."""
    opened = backend.TritonPythonModel()
    opened.initialize({"model_repository": str(version.parent), "model_version": "1"})
    yield opened
    opened.finalize()
