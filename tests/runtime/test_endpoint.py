"""Served models behind the runtime seam: real answers, and one line for each thing that can be wrong."""

from __future__ import annotations

import socket
import sys
from contextlib import closing

import numpy as np
import onnxruntime
import pytest

from sfd_deploy.errors import BackendError, PromptError
from sfd_deploy.latents import Latents
from sfd_deploy.runtime.endpoint import TritonRuntime
from tests.serving.fixtures import MODEL, Served

pytestmark = pytest.mark.triton

COUNT = 100
LATENTS = Latents.of_stream("sample", 3, 0, COUNT)
LABELS = np.arange(COUNT, dtype=np.int64) % 3


def endpoint(served: Served, protocol: str = "grpc", **options: int) -> closing[TritonRuntime]:
    return closing(TritonRuntime(getattr(served.server, protocol), MODEL, protocol, **options))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("rows", [1, 7, 0])
def test_images_come_back_in_order_however_they_are_parted_into_requests(served, protocol, rows):
    session = onnxruntime.InferenceSession(served.graph)
    expected = session.run(["images"], {"latents": LATENTS.array((1, 16, 16)), "class_labels": LABELS})[0]
    with endpoint(served, protocol, rows=rows) as runtime:
        drawn, levels = runtime.draw(LATENTS, LABELS), runtime.draw_uint8(LATENTS, LABELS)
    assert drawn.dtype == np.float32
    assert np.abs(drawn - expected).max() <= 1.5 / 127.5
    assert levels.dtype == np.uint8
    assert np.abs(levels - (expected + 1) * 127.5).max() <= 1


def test_levels_0_and_255_are_the_ends_of_the_range(served):
    with endpoint(served) as runtime:
        runtime.draw_uint8 = lambda latents, labels: np.array([0, 255], np.uint8)
        assert runtime.draw(LATENTS, LABELS).tolist() == [-1.0, 1.0]


def test_shape_and_settings_are_the_servers_own(served):
    with endpoint(served, rows=500) as runtime:
        assert runtime.name == "triton"
        assert runtime.image_shape == (1, 16, 16)
        assert runtime.settings["rows"] == 64  # the model takes no more
        assert runtime.settings["server"] == "2.51.0"


def test_no_images_asked_for_are_no_images(served):
    with endpoint(served) as runtime:
        assert runtime.draw(LATENTS[:0], LABELS[:0]).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_servers_refusal_is_one_line_with_its_sentence(served, protocol):
    with (
        endpoint(served, protocol) as runtime,
        pytest.raises(BackendError, match=f"model {MODEL} at .*: class_labels: label 5 is out of range") as caught,
    ):
        runtime.draw(LATENTS[:1], np.array([5]))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_labels_of_another_type_are_refused_before_they_are_sent(served):
    with (
        endpoint(served) as runtime,
        pytest.raises(BackendError, match="input `class_labels`: wants INT64, got float32"),
    ):
        runtime.draw(LATENTS[:1], np.array([1.0], np.float32))


def test_seeds_of_another_type_are_refused_before_they_are_sent(served):
    with endpoint(served) as runtime, pytest.raises(BackendError, match="input `seed`: wants INT64, got int32"):
        runtime.draw(Latents(np.array([1], np.int32)), np.array([1]))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_unknown_model_is_named(served, protocol):
    with pytest.raises(BackendError, match=r"model nobody at .*: .*unknown model"):
        TritonRuntime(getattr(served.server, protocol), "nobody", protocol)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_address_where_nothing_answers_is_named(protocol):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(BackendError, match=f"model m at {address}: .*(refused|failed to connect)"):
            TritonRuntime(address, "m", protocol)


def test_an_address_with_a_scheme_is_refused_in_one_line():
    with pytest.raises(BackendError, match=r"http://127.0.0.1:8000: has a scheme"):
        TritonRuntime("http://127.0.0.1:8000", "m", "http")


class Described(TritonRuntime):
    """A client of a model that describes itself with other tensors."""

    def __init__(self, metadata: dict, texts: tuple[str, ...] | None = None) -> None:
        self.address, self.model, self.prompts = "somewhere", "m", texts
        self._require_contract(metadata)


def tensor(name: str, datatype: str) -> dict:
    return {"name": name, "datatype": datatype}


def test_a_model_that_takes_latents_is_refused_as_not_ours():
    metadata = {"inputs": [tensor("latents", "FP32"), tensor("class_labels", "INT64")], "outputs": []}
    with pytest.raises(BackendError, match="model m at somewhere: has no tensor `seed`"):
        Described(metadata)


def test_a_model_with_another_type_is_refused_in_one_sentence():
    inputs = [tensor("class_labels", "INT64"), tensor("seed", "INT64")]
    with pytest.raises(BackendError, match="`images` is FP32, wants UINT8"):
        Described({"inputs": inputs, "outputs": [tensor("images", "FP32")]})


def test_a_client_and_a_model_of_different_kinds_are_told_apart():
    outputs = [tensor("images", "UINT8")]
    labels = {"inputs": [tensor("class_labels", "INT64"), tensor("seed", "INT64")], "outputs": outputs}
    prompts = {"inputs": [tensor("prompt", "BYTES"), tensor("seed", "INT64")], "outputs": outputs}
    Described(labels)
    Described(prompts, ("a bag",))
    with pytest.raises(BackendError, match="model m at somewhere: draws class labels, and is asked for prompts"):
        Described(labels, ("a bag",))
    with pytest.raises(BackendError, match="model m at somewhere: draws from prompts, and is asked for class labels"):
        Described(prompts)


def test_a_text_that_no_server_can_be_sent_is_refused_first():
    with pytest.raises(PromptError, match="is not UTF-8 text"):
        TritonRuntime("127.0.0.1:1", "m", texts=("caf\udce9",))


class Answer:
    """An answer of the client library with planted images; bytes that do not fit their shape raise, as there."""

    def __init__(self, images: np.ndarray | None, shape: tuple[int, ...] | None = None) -> None:
        self.images, self.shape = images, shape

    def as_numpy(self, name: str) -> np.ndarray | None:
        return self.images if self.images is None or self.shape is None else self.images.reshape(self.shape)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(None),
        Answer(np.zeros((0,), np.uint8)),
        Answer(np.zeros((0,), np.uint8), (1, 1, 16, 16)),  # measured: what a server with numpy 2 sends
        Answer(np.zeros((1, 1, 16, 16), np.float32)),
    ],
)
def test_an_empty_or_foreign_answer_is_refused_with_its_known_cause(served, answer):
    with endpoint(served) as runtime:
        runtime.client.infer = lambda model, inputs: answer
        with pytest.raises(BackendError, match=r"wants uint8 .*numpy below 2"):
            runtime.draw_uint8(LATENTS[:1], LABELS[:1])


def test_fewer_images_than_labels_are_refused(served):
    with endpoint(served) as runtime:
        runtime.client.infer = lambda model, inputs: Answer(np.zeros((1, 1, 16, 16), np.uint8))
        with pytest.raises(BackendError, match="1 images for 3 labels"):
            runtime.draw_uint8(LATENTS[:3], LABELS[:3])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_missing_client_library_is_one_line_with_its_extra(monkeypatch, protocol):
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)
    with pytest.raises(BackendError, match=r"tritonclient is not installed.*sfd-deploy\[serve\]"):
        TritonRuntime("127.0.0.1:1", "m", protocol)
