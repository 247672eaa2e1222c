"""What clients of a served text-to-image model see; expected images come from the artefact in this process."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from sfd_deploy.errors import BackendError
from sfd_deploy.latents import Latents
from sfd_deploy.runtime import open_text_runtime
from sfd_deploy.runtime.endpoint import TritonRuntime
from sfd_deploy.runtime.seam import draw_all, to_uint8
from tests.serving.fixtures import MODEL, Served

pytestmark = pytest.mark.triton

TEXTS = ("a red sandal", "a green bag", "", "Ｔｈｅ “grey” é 👢", "red " * 14)
COUNT = 60
LATENTS = Latents.of_stream("sample", 3, 0, COUNT)
NUMBERS = np.arange(COUNT, dtype=np.int64) % len(TEXTS)
TOO_LONG = "red " * 15


@pytest.fixture(scope="module")
def local_images(served_text: Served) -> np.ndarray:
    """(COUNT, 3, 16, 16) in 0..255, drawn in this process from the artefact's own files."""
    runtime = open_text_runtime(served_text.run.artefact(MODEL), TEXTS, "cpu")
    return to_uint8(draw_all(runtime, LATENTS, NUMBERS, 8)).astype(int)


def endpoint(served: Served, protocol: str = "grpc", **options: Any) -> closing[TritonRuntime]:
    return closing(TritonRuntime(getattr(served.server, protocol), MODEL, protocol, **options))


def ask(library: Any, address: str, prompts: list[bytes], seeds: list[int]) -> np.ndarray:
    """One request by NVIDIA's own client; nothing of ours takes part."""
    inputs = [library.InferInput("prompt", [len(prompts), 1], "BYTES"),
              library.InferInput("seed", [len(seeds), 1], "INT64")]  # fmt: skip
    inputs[0].set_data_from_numpy(np.array(prompts, np.object_).reshape(-1, 1))
    inputs[1].set_data_from_numpy(np.array(seeds, np.int64).reshape(-1, 1))
    with closing(library.InferenceServerClient(address)) as client:
        return client.infer(MODEL, inputs).as_numpy("images")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("rows", [1, 3, 0])
def test_served_images_are_the_local_artefacts_to_one_level(served_text, local_images, protocol, rows):
    with endpoint(served_text, protocol, texts=TEXTS, rows=rows) as runtime:
        assert runtime.image_shape == (3, 16, 16)
        found = runtime.draw_uint8(LATENTS, NUMBERS).astype(int)
    assert found.std() > 10
    assert np.abs(found - local_images).max() <= 1


def test_two_prompts_in_one_batch_get_their_own_images(served_text, local_images):
    first, second = (TEXTS[0].encode(), TEXTS[1].encode())
    seeds = [int(LATENTS.seeds[0]), int(LATENTS.seeds[1]), int(LATENTS.seeds[0])]
    found = ask(tritonclient.grpc, served_text.server.grpc, [first, second, second], seeds).astype(int)
    assert np.abs(found[:2] - local_images[:2]).max() <= 1
    assert np.abs(found[0] - found[2]).max() > 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    ("prompts", "seeds", "says"),
    [
        ([b"a bag", TOO_LONG.encode()], [1, 2], "has 17 tokens, start and end included; the text encoder reads 16"),
        ([b"caf\xe9"], [1], "is not UTF-8"),
        ([b"a bag"], [-3], "seed -3 is negative"),
    ],
)
def test_a_faulty_request_gets_its_sentence_and_the_server_lives_on(served_text, local_images, protocol, prompts,
                                                                    seeds, says):  # fmt: skip
    library = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    address = getattr(served_text.server, protocol)
    with pytest.raises(InferenceServerException, match=says):
        ask(library, address, prompts, seeds)
    found = ask(library, address, [TEXTS[0].encode()], [int(LATENTS.seeds[0])]).astype(int)
    assert np.abs(found - local_images[:1]).max() <= 1


def test_our_client_says_so_in_one_line(served_text):
    with (
        endpoint(served_text, texts=(TOO_LONG,)) as runtime,
        pytest.raises(BackendError, match=f"model {MODEL} at .*has 17 tokens") as caught,
    ):
        runtime.draw(LATENTS[:1], NUMBERS[:1])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_curl_with_a_prompt_and_a_seed_draws_the_image(served_text, local_images):
    inputs = [
        {"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": [TEXTS[3]]},
        {"name": "seed", "shape": [1, 1], "datatype": "INT64", "data": [int(LATENTS.seeds[3])]},
    ]
    url = f"http://{served_text.server.http}/v2/models/{MODEL}/infer"
    command = ["curl", "-sf", url, "-d", json.dumps({"inputs": inputs})]
    (output,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("images", "UINT8", [1, 3, 16, 16])
    assert np.abs(np.reshape(output["data"], (3, 16, 16)) - local_images[3]).max() <= 1


def test_a_request_without_a_prompt_is_status_400(served_text):
    body = {"inputs": [{"name": "seed", "shape": [1, 1], "datatype": "INT64", "data": [1]}]}
    with closing(HTTPConnection(served_text.server.http)) as connection:
        connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 400
        assert "expected 2 inputs but got 1 inputs" in json.loads(answer.read())["error"]


def test_a_client_of_class_labels_is_told_that_the_model_draws_from_prompts(served_text):
    with pytest.raises(BackendError, match="draws from prompts, and is asked for class labels; give it texts"):
        TritonRuntime(served_text.server.grpc, MODEL)


@pytest.mark.parametrize("number", [-1, len(TEXTS)])
def test_a_number_that_is_no_prompts_is_refused_before_it_is_sent(served_text, number):
    with (
        endpoint(served_text, texts=TEXTS) as runtime,
        pytest.raises(IndexError, match=f"prompt {number} is out of range: there are {len(TEXTS)}"),
    ):
        runtime.draw(LATENTS[:1], np.array([number]))
