"""``sfd-deploy serve`` as its users meet it: output, exit codes, and a server that stops when told."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sfd_deploy.cli.main import exit_code_of, main
from sfd_deploy.cli.serve import curl_example, heard
from sfd_deploy.policy.plan import Policy
from sfd_deploy.runs import Run
from sfd_deploy.serving import install
from sfd_deploy.serving.launch import Server
from sfd_deploy.serving.repository import Probe
from tests.serving.fixtures import MODEL, row_of, seal_artefact, seal_audit


@pytest.fixture
def run(audited_run: Run, tiny_graph: bytes) -> Run:
    """A run whose artefact passed under the default policy, and one that did not."""
    rows = [row_of(audited_run.artefact(MODEL))]
    rows.append(row_of(seal_artefact(audited_run, tiny_graph, "onnx-cpu-int8"), verdict="fail"))
    seal_audit(audited_run, *rows, policy_digest=Policy.load("default", "policy").digest)
    return audited_run


@pytest.fixture
def text_run(audited_text_run: Run) -> Run:
    """A run of prompts whose artefact passed under the default policy."""
    row = row_of(audited_text_run.artefact(MODEL))
    seal_audit(audited_text_run, row, policy_digest=Policy.load("default", "policy").digest)
    return audited_text_run


def test_the_json_document_names_models_digests_and_what_was_left_out(run, capsys):
    assert exit_code_of(["serve", str(run.folder), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["repository"] == str(run.folder / "repository")
    assert {(row["name"], row["repository"]) for row in value["models"]} == {(MODEL, "python"), (MODEL, "onnxruntime")}
    assert {row["artefact_digest"] for row in value["models"]} == {run.artefact(MODEL).digest}
    assert value["left_out"] == {"onnx-cpu-int8": "verdict fail"}


def test_people_read_which_models_were_written_and_why_others_were_not(run, capsys):
    assert exit_code_of(["serve", str(run.folder), "--artefact", MODEL]) == 0
    assert MODEL in capsys.readouterr().out
    assert exit_code_of(["serve", str(run.folder)]) == 0
    assert "not served: onnx-cpu-int8 (verdict fail)" in capsys.readouterr().out


def test_an_artefact_that_failed_is_exit_1(run, capsys):
    assert exit_code_of(["serve", str(run.folder), "--artefact", "onnx-cpu-int8"]) == 1
    assert "onnx-cpu-int8: verdict fail" in capsys.readouterr().err


def test_another_policy_is_exit_1(run, capsys, tmp_path):
    (tmp_path / "stricter.yaml").write_text("max_forget_rate: 0.005\n")
    assert exit_code_of(["serve", str(run.folder), "--policy", str(tmp_path / "stricter.yaml")]) == 1
    assert "audited under policy" in capsys.readouterr().err


def test_a_tampered_artefact_is_exit_2_and_names_the_file(run, capsys):
    graph = run.folder / "artefacts" / MODEL / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\n")
    assert exit_code_of(["serve", str(run.folder)]) == 2
    assert str(graph) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--http-port", "8000"], "are for --launch"),
        (["--triton", "somewhere"], "are for --launch"),
        (["a-run", "--install-triton", "x"], "give it alone"),
        (["--launch", "--install-triton", "x"], "give it alone"),
        (["--http-port", "70000", "--launch"], "70000 is not in the range"),
        (["no-such-run"], "no such run"),
    ],
)
def test_misuse_is_exit_2_with_one_sentence(arguments, says, capsys):
    assert exit_code_of(["serve", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_triton_launch_says_how_to_set_it_up_before_anything_is_written(run, capsys, tmp_path):
    assert exit_code_of(["serve", str(run.folder), "--launch", "--triton", str(tmp_path / "none")]) == 2
    assert "sfd-deploy serve --install-triton" in capsys.readouterr().err
    assert not (run.folder / "repository").exists()


def test_install_triton_needs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "_is_current", lambda folder: True)
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(["serve", "--install-triton", "here", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["triton"] == "here"


def test_help_shows_an_example():
    result = CliRunner().invoke(main, ["serve", "--help"])
    assert "Example: sfd-deploy serve --launch --http-port 8000" in result.output


@pytest.mark.triton
def test_a_port_in_use_is_exit_2_and_named(run, triton, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code = exit_code_of(["serve", str(run.folder), "--launch", "--triton", str(triton.folder), "--grpc-port", port])
    assert code == 2
    assert f"port {port}: cannot listen there" in capsys.readouterr().err


@contextmanager
def running(run: Run, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, killed at the end if it is still there."""
    # A job in the background inherits an ignored SIGINT; the command must stop all the same.
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from sfd_deploy.cli.main import run; run()"
    command = [sys.executable, "-c", code, "serve", str(run.folder), "--launch", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], last: str) -> str:
    """What the process prints up to a line that starts with ``last``."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(last):
            return "".join(lines)
    raise AssertionError(f"it ended: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.triton
@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
def test_launch_prints_where_it_answers_and_stops_cleanly_when_told(run, triton, order):
    with running(run, "--triton", str(triton.folder), "--json") as process:
        server = json.loads(read_until(process, "}"))["server"]
        host, port = server["http"].split(":")
        with socket.create_connection((host, int(port))):
            pass
        process.send_signal(order)
        assert process.wait(60) == 130
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
    assert "Signal (15) received" in (run.work / "triton.log").read_text()


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_interrupts_no_call_of_the_main_thread_is_heard(order):
    with subprocess.Popen(["sleep", "60"]) as process, heard() as told:
        server = Server("localhost:1", "localhost:2", "localhost:3", ("m",), Path("log"), process)
        here = threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), order))
        here.start()
        server.wait(lambda: bool(told))
        assert process.poll() is None
        process.kill()
    assert told == [order]


@pytest.mark.triton
@pytest.mark.parametrize(("kind", "shape"), [("run", [1, 1, 16, 16]), ("text_run", [1, 3, 16, 16])])
def test_the_printed_curl_command_draws_an_image(kind, shape, request, triton, capsys, monkeypatch):
    run, answers = request.getfixturevalue(kind), []

    def paste(server: Server, told: Callable[[], bool]) -> None:
        command = capsys.readouterr().out.splitlines()[-1]
        answers.append(json.loads(subprocess.run(command, shell=True, capture_output=True, check=True).stdout))
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "wait", paste)
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code_of(["serve", str(run.folder), "--launch", "--triton", str(triton.folder)]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert answers[0]["outputs"][0]["shape"] == shape


def test_a_prompt_with_a_quote_in_it_is_pasted_whole():
    server = Server("localhost:1", "localhost:2", "localhost:3", ("m",), Path("log"), None)
    nothing = np.zeros(0, np.int64)
    command = shlex.split(curl_example(server, Probe(nothing, nothing, nothing, ('a man\'s "red" bag',))))
    assert command[:3] == ["curl", "-s", "http://localhost:1/v2/models/m/infer"]
    assert json.loads(command[4])["inputs"][0]["data"] == ['a man\'s "red" bag']


def test_a_text_run_is_served_by_the_python_back_end_alone(text_run, capsys):
    assert exit_code_of(["serve", str(text_run.folder), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [(row["name"], row["repository"]) for row in models] == [(MODEL, "python")]
