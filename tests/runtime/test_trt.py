"""TensorRT engines at run time: what is refused and why. Running one needs a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sfd_deploy.errors import BackendError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.runtime import NotRunnableHereError, open_runtime, trt
from sfd_deploy.runtime.trt import CLASSIC, FLAVOURS, RTX, Flavour, TensorRtRuntime, gpu_capability, require_runnable

ENGINE = {"version": "1.7.1.116", "compute_capabilities": ["SM80", "SM89"]}


@pytest.fixture(params=["trt", "trt-rtx"])
def junk_engine(request: pytest.FixtureRequest, tmp_path: Any) -> Sealed:
    """An artefact whose plan is no engine: deserialising it crashes some versions of TensorRT."""
    facts = {
        "runtime": request.param,
        "image_shape": [1, 16, 16],
        "precision": "fp16",
        "batch": {"max": 64},
        "engine": ENGINE,
    }
    with sealed_folder(tmp_path / "engine", "artefact", facts=facts) as folder:
        (folder / "model.plan").write_bytes(b"junk")
    return verify(tmp_path / "engine", "artefact")


def test_without_a_gpu_an_engine_is_refused_before_its_bytes_are_read(
    junk_engine: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableHereError, match="needs an NVIDIA GPU with its driver"):
        open_runtime(junk_engine)


def test_the_refusal_is_bad_input_not_a_bug(junk_engine: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError) as caught:
        TensorRtRuntime(junk_engine)
    assert caught.value.exit_code == 2


def test_the_capability_is_named_as_tensorrt_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert gpu_capability() == "SM120"


def test_an_engine_for_other_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "gpu_capability", lambda: "SM90")
    with pytest.raises(NotRunnableHereError, match="built for SM80, SM89, this GPU is SM90"):
        require_runnable("trt-rtx-fp16", RTX, ENGINE)


def test_a_missing_package_is_refused_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "gpu_capability", lambda: "SM89")
    monkeypatch.setattr(Flavour, "module", lambda self: None)
    with pytest.raises(NotRunnableHereError, match=r"TensorRT is not installed; pip install 'sfd-deploy\[gpu\]'"):
        require_runnable("trt-gpu-fp16", CLASSIC, ENGINE)


def test_an_engine_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "gpu_capability", lambda: "SM89")
    monkeypatch.setattr(Flavour, "module", lambda self: type("module", (), {"__version__": "1.8"}))
    with pytest.raises(NotRunnableHereError, match=r"built by TensorRT for RTX 1\.7\.1\.116, installed is 1\.8"):
        require_runnable("trt-rtx-fp16", RTX, ENGINE)


def test_an_engine_that_fits_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("module", (), {"__version__": ENGINE["version"]})
    monkeypatch.setattr(trt, "gpu_capability", lambda: "SM89")
    monkeypatch.setattr(Flavour, "module", lambda self: module)
    assert require_runnable("trt-rtx-fp16", RTX, ENGINE) is module


@pytest.mark.parametrize("fault", [ImportError("no module"), OSError("libnvinfer.so.11: cannot open")])
def test_a_package_whose_libraries_do_not_load_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(name: str) -> None:
        raise fault

    monkeypatch.setattr(trt.importlib, "import_module", fail)
    assert RTX.module() is None


def test_every_call_that_running_makes_exists_in_nvidias_own_bindings() -> None:
    module = RTX.module() or pytest.skip(f"needs TensorRT for RTX: {RTX.mend}")
    for owner, names in {
        module: ("Runtime", "ILogger", "__version__"),
        module.Runtime: ("deserialize_cuda_engine",),
        module.ICudaEngine: ("create_execution_context",),
        module.IExecutionContext: ("set_input_shape", "set_tensor_address", "execute_async_v3"),
        module.ILogger: ("INTERNAL_ERROR", "ERROR", "WARNING"),
    }.items():
        for name in names:
            assert hasattr(owner, name), f"{owner}.{name}"


def test_flavours_are_found_by_the_runtime_that_artefacts_record() -> None:
    assert {name: flavour.target for name, flavour in FLAVOURS.items()} == {"trt": "gpu", "trt-rtx": "rtx"}
    assert all(flavour.extra in flavour.mend for flavour in FLAVOURS.values())


@pytest.mark.gpu
def test_an_engine_draws_what_its_graph_draws(tmp_path: Any) -> None:
    if gpu_capability() is None:
        pytest.skip("needs an NVIDIA GPU that PyTorch can see, and TensorRT for it")
    from sfd_deploy.export.stage import export_run
    from tests.conftest import seal_tiny_run

    run: Run = seal_tiny_run(tmp_path / "run")
    graph, engine = (open_runtime(item, "cpu") for item in export_run(run, ("trt",), ("fp32",)))
    for batch in (1, 3, 64, 65):
        latents, labels = Latents.of_stream("sample", 0, 0, batch), (np.arange(batch) % 3).astype(np.int64)
        np.testing.assert_allclose(engine.draw(latents, labels), graph.draw(latents, labels), atol=1e-3)
    engine.close()
