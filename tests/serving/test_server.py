"""What clients of the real server see; expected images come from ONNX Runtime in this process."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from sfd_deploy import latents
from sfd_deploy.serving.install import Triton
from tests.serving.fixtures import MODEL, Served

pytestmark = pytest.mark.triton

COUNT = 210  # 70 images a label
LABELS = np.arange(COUNT, dtype=np.int64) % 3
SEEDS = np.arange(COUNT, dtype=np.int64) * 10**16  # seeds beyond 32 and 53 bits too


@pytest.fixture(scope="module")
def local_images(served: Served) -> NDArray[np.float32]:
    """(COUNT, 1, 16, 16) in [-1, 1], drawn in this process from the artefact's own file."""
    session = onnxruntime.InferenceSession(served.graph)
    noise = latents.standard_normal(SEEDS, (1, 16, 16))
    return session.run(["images"], {"latents": noise, "class_labels": LABELS})[0]


def ask(library: Any, address: str, labels: NDArray[Any], seeds: NDArray[Any]) -> NDArray[np.uint8]:
    """One request by NVIDIA's own client; nothing of ours takes part."""
    inputs = []
    for name, values in (("class_labels", labels), ("seed", seeds)):
        kind = {"int64": "INT64", "float32": "FP32"}[values.dtype.name]
        inputs.append(library.InferInput(name, [len(values), 1], kind))
        inputs[-1].set_data_from_numpy(values.reshape(-1, 1))
    with closing(library.InferenceServerClient(address)) as client:
        return client.infer(MODEL, inputs).as_numpy("images")


def post(served: Served, path: str, body: Any) -> tuple[int, Any]:
    """Status and answer of a raw request."""
    with closing(HTTPConnection(served.server.http)) as connection:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def one_image(label: Any, seed: Any, datatype: str = "INT64") -> dict[str, Any]:
    """The v2 protocol's JSON for one row."""
    columns = (("class_labels", label, datatype), ("seed", seed, "INT64"))
    return {
        "inputs": [{"name": name, "shape": [1, 1], "datatype": kind, "data": [value]} for name, value, kind in columns]
    }


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_every_image_is_within_one_level_of_onnx_runtime_in_this_process(served, local_images, protocol):
    library = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    address = getattr(served.server, protocol)
    parts = [ask(library, address, LABELS[i : i + 64], SEEDS[i : i + 64]) for i in range(0, COUNT, 64)]
    images = np.concatenate(parts)
    assert images.dtype == np.uint8
    assert images.shape == (COUNT, 1, 16, 16)
    assert np.abs(images - (local_images + 1) * 127.5).max() <= 1
    assert images.std() > 10


def test_label_and_seed_both_matter_and_the_forget_label_is_no_alias_of_its_override(served):
    images = ask(tritonclient.grpc, served.server.grpc, np.array([1, 2, 1, 1]), np.array([5, 5, 6, 5]))
    forget, override, other_seed, again = images.astype(int)
    assert np.abs(forget - override).max() > 1
    assert np.abs(forget - other_seed).max() > 1
    assert np.array_equal(forget, again)


def test_curl_with_a_label_and_a_seed_draws_the_image(served, local_images):
    command = [
        "curl",
        "-sf",
        f"http://{served.server.http}/v2/models/{MODEL}/infer",
        "-d",
        json.dumps(one_image(1, 10**16)),
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("images", "UINT8", [1, 1, 16, 16])
    assert np.abs(np.reshape(output["data"], (1, 16, 16)) - (local_images[1] + 1) * 127.5).max() <= 1


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (one_image(3, 0), "label 3 is out of range; use 0 to 2"),
        (one_image(-1, 0), "label -1 is out of range; use 0 to 2"),
        (one_image(0, -7), "seed -7 is negative"),
        (
            one_image(0.0, 0, "FP32"),
            "input 'class_labels' data-type is 'FP32', but model 'onnx-cpu-fp32' expects 'INT64'",
        ),
        ({"inputs": one_image(0, 0)["inputs"][:1]}, "expected 2 inputs but got 1 inputs"),
    ],
)
def test_a_faulty_request_is_status_400_with_a_sentence_that_names_the_fault(served, body, sentence):
    status, answer = post(served, f"/v2/models/{MODEL}/infer", body)
    assert status == 400
    assert sentence in answer["error"]


def test_one_bad_row_names_itself_over_grpc(served):
    with pytest.raises(InferenceServerException, match="label 9 is out of range"):
        ask(tritonclient.grpc, served.server.grpc, np.array([0, 9, 1]), np.array([1, 2, 3]))


def test_a_batch_larger_than_the_artefacts_is_refused(served):
    with pytest.raises(InferenceServerException, match="batch-size must be <= 64"):
        ask(tritonclient.grpc, served.server.grpc, np.zeros(65, np.int64), np.zeros(65, np.int64))


def metric(served: Served, name: str) -> int:
    """The sum of a counter of our model, as Prometheus scrapes it."""
    with closing(HTTPConnection(served.server.metrics)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    ours = [line for line in lines if line.startswith(f"{name}{{") and f'model="{MODEL}"' in line]
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in ours))


def test_lone_requests_are_gathered_into_batches_and_the_metrics_count_both(served, local_images):
    counters = ("nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count")
    before = [metric(served, name) for name in counters]
    rows = [slice(i, i + 1) for i in range(COUNT)]
    with ThreadPoolExecutor(48) as pool:
        parts = list(pool.map(lambda row: ask(tritonclient.grpc, served.server.grpc, LABELS[row], SEEDS[row]), rows))
    requests, images, executions = (metric(served, name) - was for name, was in zip(counters, before, strict=True))
    assert (requests, images) == (COUNT, COUNT)
    assert executions < COUNT
    # A batch mixes clients; each still gets its own image.
    assert np.abs(np.concatenate(parts) - (local_images + 1) * 127.5).max() <= 1


def test_bad_requests_among_good_ones_spoil_none(served, local_images):
    labels = np.where(np.arange(COUNT) % 5 == 0, 99, LABELS)

    def outcome(row: int) -> NDArray[np.uint8] | str:
        try:
            return ask(tritonclient.grpc, served.server.grpc, labels[row : row + 1], SEEDS[row : row + 1])
        except InferenceServerException as error:
            return str(error.message())

    with ThreadPoolExecutor(48) as pool:
        outcomes = list(pool.map(outcome, range(COUNT)))
    for row, found in enumerate(outcomes):
        if labels[row] == 99:
            assert "label 99" in str(found)
        else:
            assert np.abs(found - (local_images[row] + 1) * 127.5).max() <= 1


def test_the_configuration_that_clients_read_names_the_audited_artefact(served):
    with closing(tritonclient.http.InferenceServerClient(served.server.http)) as client:
        parameters = client.get_model_config(MODEL)["parameters"]
    assert parameters["sfd_deploy.artefact_digest"]["string_value"] == served.run.artefact(MODEL).digest
    assert parameters["sfd_deploy.audit_digest"]["string_value"] == served.run.audit().digest


@pytest.mark.parametrize("path", ["/v2/repository/index", f"/v2/repository/models/{MODEL}/unload", "/v2/logging"])
def test_calls_that_change_the_server_are_closed(served, path):
    status, answer = post(served, path, {})
    assert status == 403
    assert "restricted" in answer["error"]


def test_the_server_listens_on_loopback_alone(served):
    ports = {
        int(address.rsplit(":", 1)[1]) for address in (served.server.http, served.server.grpc, served.server.metrics)
    }
    listening = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == "0A" and int(port, 16) in ports:
                listening.setdefault(int(port, 16), set()).add(address)
    loopback = ({"0100007F"}, {"0000000000000000FFFF00000100007F"})  # 127.0.0.1, low byte first; the same in IPv6
    assert listening.keys() == ports
    assert all(addresses in loopback for addresses in listening.values())


# By a Philox4x64-10 and a Box-Muller written in plain Python integers and math, not by numpy.
PINNED = {
    0: [-2.745759682, -1.68544626, -0.361550822, -1.176225131, -0.025201819, 2.063509818],
    7: [-0.433471817, 1.354921917, -0.433387175, 0.29302803, 0.776705101, -1.243668609],
    2**63 - 1: [-0.391237538, 1.406327851, 0.977539725, 0.033358361, -1.197692477, -0.053724291],
}
PRINT_LATENTS = """
import importlib.util, json, sys
import numpy
spec = importlib.util.spec_from_file_location("latents", sys.argv[1])
module = sys.modules["latents"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seeds = numpy.array(json.loads(sys.argv[2]), numpy.int64)
print(json.dumps([numpy.__version__, module.standard_normal(seeds, (6,)).tolist()]))
"""


def test_latents_in_the_servers_own_environment_are_the_pinned_numbers(triton: Triton):
    command = [triton.python, "-c", PRINT_LATENTS, latents.__file__, json.dumps(list(PINNED))]
    done = subprocess.run(command, env=triton.environment(), capture_output=True, check=True)
    version, found = json.loads(done.stdout)
    assert version.startswith("1.")
    assert np.abs(np.array(found) - np.array(list(PINNED.values()))).max() < 1e-6
