"""Starting and stopping the real server, and every way in which that must fail aloud."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tritonclient.http import InferenceServerClient, InferInput

from sfd_deploy.errors import BackendError, LimitError
from sfd_deploy.latents import standard_normal
from sfd_deploy.runs import Run
from sfd_deploy.serving.config import ServingConfig
from sfd_deploy.serving.install import Triton
from sfd_deploy.serving.launch import HARMLESS, HOST, Ports, Server, launched, reason_in, reserve, servable, started
from sfd_deploy.serving.repository import Entry, Probe, write_model
from sfd_deploy.serving.stage import build_repository
from tests.conftest import seal_tiny_run
from tests.serving.fixtures import MODEL, POLICY, SETTINGS, seal_artefact


@pytest.fixture
def repository(audited_run: Run) -> Path:
    """A servable folder that a test may damage."""
    return build_repository(audited_run, POLICY).folder


def server_processes(mark: str) -> list[str]:
    """Names of the servers and stubs whose command line holds ``mark``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if any(mark in word for word in words):
            found.append(Path(words[0]).name)
    return sorted(name for name in found if name in {"tritonserver", "triton_python_backend_stub"})


def shared_memory(server: Server) -> set[str]:
    """What this server shares with its stubs: others may run beside it."""
    (prefix,) = (part.rpartition("=")[2] for part in server.process.args if "shm-region-prefix-name" in part)
    return {path.name for path in Path("/dev/shm").glob(f"{prefix}*")}


def free(address: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex((HOST, int(address.rsplit(":", 1)[1]))) != 0


@pytest.mark.triton
def test_after_the_block_no_process_port_or_shared_memory_is_left(repository, triton, tmp_path):
    with launched(repository / "python", triton, tmp_path / "log") as server:
        assert server.models == (MODEL,)
        assert server_processes(str(repository)) == ["triton_python_backend_stub", "tritonserver"]
        assert shared_memory(server)
    assert server.process.returncode == 0
    assert server_processes(str(repository)) == []
    assert not shared_memory(server)
    assert all(free(address) for address in (server.http, server.grpc, server.metrics))


@pytest.mark.triton
def test_an_error_in_the_block_stops_the_server_and_passes_through(repository, triton, tmp_path):
    def fail_inside() -> None:
        with launched(repository / "python", triton, tmp_path / "log"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert server_processes(str(repository)) == []


@pytest.mark.triton
def test_a_server_that_ends_by_itself_is_reported(repository, triton, tmp_path):
    servers = []

    def kill_inside() -> None:
        with launched(repository / "python", triton, tmp_path / "log") as server:
            servers.append(server)
            server.process.kill()
            server.wait(lambda: False)

    with pytest.raises(BackendError, match="ended by itself, status -9"):
        kill_inside()
    assert server_processes(str(repository)) == []
    assert not shared_memory(servers[0])


PARENT = """
import sys
from pathlib import Path
from sfd_deploy.serving.install import Triton
from sfd_deploy.serving.launch import launched
with launched(Path(sys.argv[1]), Triton(Path(sys.argv[2])), Path(sys.argv[3])) as server:
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.mark.triton
def test_the_server_ends_when_the_process_that_launched_it_is_killed(repository, triton, tmp_path):
    command = [sys.executable, "-c", PARENT, str(repository / "python"), str(triton.folder), str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as parent:
        assert parent.stdout.readline() == b"up\n", parent.stdout.read().decode()
        assert "tritonserver" in server_processes(str(repository))
        parent.kill()
    for _ in range(300):
        if not server_processes(str(repository)):
            break
        time.sleep(0.1)
    assert server_processes(str(repository)) == []


@pytest.mark.triton
def test_a_graph_with_a_flipped_byte_is_refused_at_load_and_named(repository, triton, tmp_path):
    graph = repository / "python" / MODEL / "1" / "model.onnx"
    flipped = bytearray(graph.read_bytes())
    flipped[100] ^= 1
    graph.write_bytes(flipped)
    with (
        pytest.raises(BackendError, match=r"does not start: .*model\.onnx: sha256 is"),
        launched(repository / "python", triton, tmp_path / "log"),
    ):
        pytest.fail("a changed graph was served")
    assert server_processes(str(repository)) == []


@pytest.mark.triton
def test_a_ready_server_that_draws_other_images_is_not_called_ready(repository, triton, tmp_path):
    path = repository / "python" / MODEL / "probe.npz"
    probe = Probe.load(path)
    planted = probe.images.copy()
    planted[1, 0, 3, 3] ^= 4
    Probe(probe.labels, probe.seeds, planted).save(path)
    with (
        pytest.raises(LimitError, match=f"model {MODEL} over http: served images are 4 of 255 levels") as caught,
        launched(repository / "python", triton, tmp_path / "log"),
    ):
        pytest.fail("other images were served")
    assert caught.value.exit_code == 1
    assert server_processes(str(repository)) == []


@pytest.mark.triton
def test_a_server_that_takes_too_long_is_stopped(repository, triton, tmp_path):
    with (
        pytest.raises(BackendError, match="not ready in time"),
        launched(repository / "python", triton, tmp_path / "log", timeout_s=0),
    ):
        pytest.fail("it cannot be ready at once")
    assert server_processes(str(repository)) == []


def bare_repository(tmp_path: Path, flavour: str) -> Path:
    """A model of the onnxruntime or tensorrt back end; the plan is no engine, but nothing here could load one."""
    run = seal_tiny_run(tmp_path / "run")
    artefact = seal_artefact(run, b"bytes", runtime="trt" if flavour == "tensorrt" else "onnxruntime")
    nothing = Probe(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 1, 16, 16), np.uint8))
    write_model(
        tmp_path / flavour, flavour, Entry(artefact, SETTINGS, {"audit_digest": "ab" * 32}, nothing), ServingConfig()
    )
    return tmp_path / flavour


@pytest.mark.triton
@pytest.mark.parametrize("flavour", ["onnxruntime", "tensorrt"])
def test_the_bare_back_ends_are_accepted_up_to_their_missing_library(tmp_path, triton, flavour):
    folder = bare_repository(tmp_path, flavour)
    with (
        pytest.raises(BackendError, match=f"unable to find backend library for backend '{flavour}'"),
        started(folder, triton, tmp_path / "log"),
    ):
        pytest.fail("the wheel has no such back end")
    errors = [
        line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("E") and HARMLESS not in line
    ]
    assert len(errors) == 1


# Stands in for the missing library behind the very configuration that is written for it.
BARE_BACK_END = """
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(f"{args['model_repository']}/1/model.onnx")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = ("latents", "class_labels")
        feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        (images,) = self.session.run(["images"], feeds)
        return pb_utils.InferenceResponse([pb_utils.Tensor("images", images)])
"""


def behind_the_python_back_end(folder: Path, graph: bytes) -> Path:
    config = folder / MODEL / "config.pbtxt"
    config.write_text(re.sub('backend: ".*"', 'backend: "python"', config.read_text()))
    (folder / MODEL / "1" / "model.onnx").write_bytes(graph)
    (folder / MODEL / "1" / "model.py").write_text(BARE_BACK_END)
    return folder


@pytest.mark.triton
def test_the_bare_configuration_feeds_the_graph_what_it_takes(tmp_path, triton, tiny_graph):
    folder = behind_the_python_back_end(bare_repository(tmp_path, "onnxruntime"), tiny_graph)
    noise, labels = standard_normal(np.arange(5), (1, 16, 16)), np.array([0, 1, 2, 1, 0])
    inputs = [InferInput("latents", noise.shape, "FP32"), InferInput("class_labels", [5, 1], "INT64")]
    inputs[0].set_data_from_numpy(noise)
    inputs[1].set_data_from_numpy(labels.reshape(5, 1))
    with (
        started(folder, triton, tmp_path / "log") as server,
        closing(InferenceServerClient(server.http)) as client,
    ):
        served = client.infer(MODEL, inputs).as_numpy("images")
    session = onnxruntime.InferenceSession(tiny_graph)
    local = session.run(["images"], {"latents": noise, "class_labels": labels})[0]
    assert np.abs(served - local).max() < 1e-5


@pytest.mark.triton
def test_a_wrong_bare_configuration_would_be_found_so(tmp_path, triton, tiny_graph):
    folder = behind_the_python_back_end(bare_repository(tmp_path, "onnxruntime"), tiny_graph)
    config = folder / MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: 16", "dims: 0", 1))
    with (
        pytest.raises(BackendError, match="dimension must be integer >= 1, or -1"),
        started(folder, triton, tmp_path / "log"),
    ):
        pytest.fail("dimension 0 was accepted")


@pytest.mark.parametrize("which", ["http", "grpc", "metrics"])
def test_a_port_in_use_is_named(which):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BackendError, match=f"port {port}: cannot listen there") as caught:
            reserve(Ports(**{which: port}))
    assert caught.value.exit_code == 2


def test_one_port_asked_for_twice_is_named():
    (port, *_) = reserve(Ports())
    with pytest.raises(BackendError, match=f"port {port}"):
        reserve(Ports(http=port, grpc=port))


def test_free_ports_are_three_different_ones():
    assert len(set(reserve(Ports()))) == 3


def test_a_port_that_was_asked_for_is_taken():
    (port, *_) = reserve(Ports())
    assert reserve(Ports(grpc=port))[1] == port


def test_a_repository_of_engines_alone_cannot_be_launched_here(audited_run):
    repository = build_repository(audited_run, POLICY)
    shutil.rmtree(repository.folder / "python")
    with pytest.raises(BackendError, match="holds engines alone"):
        servable(repository)


def test_a_binary_that_cannot_be_started_is_one_line(tmp_path):
    (tmp_path / "repository").mkdir()
    with (
        pytest.raises(BackendError, match=r"does not start: .*No such file or directory"),
        launched(tmp_path / "repository", Triton(tmp_path / "nowhere"), tmp_path / "log"),
    ):
        pytest.fail("there is no server")


def test_the_reason_is_the_models_own_words_else_the_last_error_else_the_last_line(tmp_path):
    log = tmp_path / "log"
    log.write_text('I1 a.cc:1] "fine"\nE2 b.cc:2] "first"\nE3 c.cc:3] "no such model\\n\\nAt:\\n  line 3"\nbye\n')
    assert reason_in(log) == "no such model"
    log.write_text('sfd-deploy: model.onnx changed\nE3 c.cc:3] "giving up"\nwhat(): lock_exception\n')
    assert reason_in(log) == "model.onnx changed"
    log.write_text("Error: nothing but words\n")
    assert reason_in(log) == "Error: nothing but words"
    log.write_text("")
    assert reason_in(log) == "it said nothing"
