"""The python back end's own arithmetic and refusals, in this process; the real server runs the same file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sfd_deploy.latents import standard_normal
from sfd_deploy.runtime.seam import to_uint8
from sfd_deploy.serving.stage import build_repository
from tests.serving.conftest import Tensor, TritonError
from tests.serving.fixtures import MODEL, POLICY


@pytest.fixture
def version(audited_run, tmp_path) -> Path:
    """A served model's version folder."""
    built = build_repository(audited_run, POLICY).folder / "python" / MODEL / "1"
    return Path(shutil.copytree(built, tmp_path / "models" / "1"))


def request(labels: list[int], seeds: list[int]) -> dict[str, Tensor]:
    columns = {"class_labels": labels, "seed": seeds}
    return {name: Tensor(name, np.array(values, np.int64).reshape(-1, 1)) for name, values in columns.items()}


def test_requests_are_drawn_as_one_batch_and_parted_in_order(model, version):
    responses = model.execute([request([0, 1], [11, 12]), request([2], [13])])
    session = onnxruntime.InferenceSession(version / "model.onnx")
    feeds = {"latents": standard_normal(np.array([11, 12, 13]), (1, 16, 16)), "class_labels": np.array([0, 1, 2])}
    expected = (session.run(["images"], feeds)[0] + 1) * 127.5
    found = [response.tensors[0].array for response in responses]
    assert [len(part) for part in found] == [2, 1]
    assert np.abs(np.concatenate(found) - expected).max() <= 1


def test_a_faulty_request_gets_its_own_error_and_spoils_no_other(model):
    good = request([0], [11])
    alone = model.execute([good])[0].tensors[0].array
    responses = model.execute([request([0, 3], [1, 2]), good, request([1], [-5]), request([-1], [5])])
    assert [response.error.message if response.error else None for response in responses] == [
        "class_labels: label 3 is out of range; use 0 to 2",
        None,
        "seed: seed -5 is negative; use 0 to 9223372036854775807",
        "class_labels: label -1 is out of range; use 0 to 2",
    ]
    assert {response.error.code for response in responses if response.error} == {TritonError.INVALID_ARG}
    assert np.array_equal(responses[1].tensors[0].array, alone)


def test_with_faulty_requests_alone_nothing_is_drawn(model):
    (response,) = model.execute([request([7], [0])])
    assert response.error is not None


@pytest.mark.parametrize("name", ["model.onnx", "latents.py", "drawing.py", "model.py"])
def test_a_changed_file_is_refused_before_it_is_used(backend, version, name):
    path = version / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=f"{name}: sha256 is"):
        backend.TritonPythonModel().initialize({"model_repository": str(version.parent), "model_version": "1"})


def test_bytes_are_rounded_exactly_as_everywhere_else(backend):
    images = np.linspace(-1, 1, 20001, dtype=np.float32).reshape(1, 1, 1, -1)
    assert np.array_equal(backend.answer(images).tensors[0].array, to_uint8(images))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_an_error_and_never_a_black_pixel(backend, value):
    images = np.zeros((1, 1, 2, 2), np.float32)
    images[0, 0, 1, 1] = value
    assert "not finite" in backend.answer(images).error.message
    assert backend.answer(images).error.code == TritonError.INTERNAL


def test_the_session_has_the_audits_threads_and_provider(backend, version):
    settings = json.loads((version / "serving.json").read_text())["settings"]
    session = backend.open_session(version / "model.onnx", {**settings, "threads": 2})
    assert session.get_session_options().intra_op_num_threads == 2
    assert session.get_providers() == ["CPUExecutionProvider"]
