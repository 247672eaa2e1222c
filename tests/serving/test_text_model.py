"""The python back end of prompts in this process: its arithmetic, and each refusal; the server runs the same files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfd_deploy.latents import Latents
from sfd_deploy.runtime.seam import to_uint8
from sfd_deploy.runtime.text import TextOnnxRuntime
from sfd_deploy.serving.stage import build_repository
from tests.serving.conftest import Tensor, TritonError
from tests.serving.fixtures import MODEL, POLICY

TEXTS = ("a red sandal", "a green bag", "", "Ｔｈｅ “red” man")


@pytest.fixture
def version(audited_text_run, tmp_path) -> Path:
    """A served model's version folder."""
    built = build_repository(audited_text_run, POLICY).folder / "python" / MODEL / "1"
    return Path(shutil.copytree(built, tmp_path / "models" / "1"))


def request(prompts: list[str | bytes], seeds: list[int]) -> dict[str, Tensor]:
    coded = [prompt if isinstance(prompt, bytes) else prompt.encode() for prompt in prompts]
    return {
        "prompt": Tensor("prompt", np.array(coded, np.object_).reshape(-1, 1)),
        "seed": Tensor("seed", np.array(seeds, np.int64).reshape(-1, 1)),
    }


def images_of(response: Any) -> np.ndarray:
    assert response.error is None, response.error.message
    return response.tensors[0].array.astype(int)


def test_requests_are_drawn_as_one_batch_and_each_prompt_gets_its_own_image(model, audited_text_run):
    responses = model.execute([request([TEXTS[0], TEXTS[1]], [11, 12]), request([TEXTS[2], TEXTS[3]], [13, 11])])
    local = TextOnnxRuntime(audited_text_run.artefact(MODEL).folder, "fp32", TEXTS)
    expected = to_uint8(local.draw(Latents(np.array([11, 12, 13, 11])), np.arange(4))).astype(int)
    found = [images_of(response) for response in responses]
    assert [len(part) for part in found] == [2, 2]
    assert np.abs(np.concatenate(found) - expected).max() <= 1
    assert np.abs(found[0][0] - found[1][1]).max() > 1  # one seed, two prompts


def test_each_distinct_prompt_of_a_batch_is_encoded_once(model, monkeypatch):
    encoder, fed = model.drawing.graphs["text_encoder"], []

    class Recorder:
        def run(self, names: Any, feeds: dict[str, np.ndarray]) -> Any:
            fed.append(len(feeds["input_ids"]))
            return encoder.run(names, feeds)

    monkeypatch.setitem(model.drawing.graphs, "text_encoder", Recorder())
    responses = model.execute([request(["a bag", "a coat", "a bag"], [1, 2, 3]), request(["a coat"], [2])])
    assert fed == [2]
    first, second = (images_of(response) for response in responses)
    assert np.array_equal(first[1], second[0])


def test_a_faulty_request_gets_its_own_error_and_spoils_no_other(model):
    good = request(["a red bag"], [11])
    alone = images_of(model.execute([good])[0])
    faulty = [request(["a bag", "a  bag " * 20], [1, 2]), request([b"caf\xe9"], [3]), request(["a bag"], [-5])]
    responses = model.execute([*faulty[:2], good, faulty[2]])
    assert [response.error.message if response.error else None for response in responses] == [
        f"prompt: '{'a bag ' * 13}a…' has 42 tokens, start and end included; the text encoder reads 16",
        "prompt: b'caf\\xe9' is not UTF-8 (byte 3)",
        None,
        "seed: seed -5 is negative; use 0 to 9223372036854775807",
    ]
    assert {response.error.code for response in responses if response.error} == {TritonError.INVALID_ARG}
    assert np.array_equal(images_of(responses[2]), alone)


def test_a_prompt_of_just_the_limit_is_drawn_and_one_token_more_is_refused(model):
    longest, longer = model.execute([request(["red " * 14], [1]), request(["red " * 15], [1])])
    assert images_of(longest).shape == (1, 3, 16, 16)
    assert "has 17 tokens" in longer.error.message


@pytest.mark.parametrize(
    "name", ["unet/model.onnx", "text_encoder/model.onnx", "tokenizer.json", "drawing.py", "latents.py", "model.py"]
)
def test_a_changed_file_is_refused_before_it_is_used(backend, version, name):
    path = version / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=f"{name}: sha256 is"):
        backend.TritonPythonModel().initialize({"model_repository": str(version.parent), "model_version": "1"})


def test_the_sessions_have_the_audits_threads(model):
    threads = {graph.get_session_options().intra_op_num_threads for graph in model.drawing.graphs.values()}
    assert threads == {1}
