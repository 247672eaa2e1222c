"""Start the real Triton server on this machine, prove that it draws what was audited, and stop it.

Loopback only: the server in the wheel is an old one. It is called ready when an inference over each
protocol has returned the artefact's own images, since a server that reports health may still answer
with nothing. However this process ends, the server ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

from sfd_deploy.errors import BackendError, LimitError
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.runtime.endpoint import Transport, TritonRuntime
from sfd_deploy.serving.install import Triton
from sfd_deploy.serving.repository import PROBE, Probe

HOST = "127.0.0.1"
EXIT_TIMEOUT_S = 10
LISTEN_S = 0.1  # between looks at whether to stop
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps it
READY_TIMEOUT_S = 120.0
SAID = "sfd-deploy: "  # begins what serving/backend/model.py says
HARMLESS = "CudaDriverHelper has not been initialized"  # an error to every server without a GPU
# Nobody outside needs them, and old servers had holes there: closed by a key that is thrown away.
CLOSED = "shared-memory,model-repository,trace,logging"
# The child asks the kernel for SIGTERM at its parent's death, then becomes the server: a killed
# parent runs no clean-up of its own. 1 is PR_SET_PDEATHSIG; it outlives exec.
FOLLOW_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Ports:
    """Ports to listen on; None takes a free one."""

    http: int | None = None
    grpc: int | None = None
    metrics: int | None = None


@dataclass(frozen=True)
class Server:
    """A running server; addresses are ``host:port``."""

    http: str
    grpc: str
    metrics: str
    models: tuple[str, ...]
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self, told: Callable[[], bool]) -> None:
        """Return when told to, with the server still running.

        ``told`` is looked at ten times a second: a signal that comes in the instant before a wait without an
        end begins, or in another thread, would not be heard until that wait is over.

        Raises:
            BackendError: the server ended by itself; with the last error of its log.
        """
        while not told():
            if (status := self.process.poll()) is not None:
                raise BackendError(
                    f"Triton ended by itself, status {status} ({reason_in(self.log)})", f"see {self.log}"
                )
            time.sleep(LISTEN_S)


@contextmanager
def launched(
    repository: Path, triton: Triton, log: Path, ports: Ports | None = None, timeout_s: float = READY_TIMEOUT_S
) -> Iterator[Server]:
    """Serve the models of a python repository while the block runs, once each has drawn its audited images.

    Raises:
        BackendError: as ``started``.
        LimitError: a model answers with other images than its artefact drew.
    """
    with started(repository, triton, log, ports, timeout_s) as server:
        for model in server.models:
            require_audited_images(server, model, Probe.load(repository / model / PROBE))
        yield server


@contextmanager
def started(
    repository: Path, triton: Triton, log: Path, ports: Ports | None = None, timeout_s: float = READY_TIMEOUT_S
) -> Iterator[Server]:
    """A server that reports health and has loaded all of ``repository``; ``log`` receives what it says.

    It ends with the block, and at the latest with the thread that started it.

    Raises:
        BackendError: a port in use, a model that does not load, or no readiness within ``timeout_s``.
    """
    http, grpc, metrics = reserve(ports or Ports())
    prefix = f"sfd_deploy_{secrets.token_hex(8)}"
    command = _command(repository, triton, (http, grpc, metrics), prefix)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW_PARENT, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=triton.environment(),
            start_new_session=True,
        )  # fmt: skip
    try:
        models = tuple(sorted(path.parent.name for path in repository.glob("*/config.pbtxt")))
        server = Server(f"{HOST}:{http}", f"{HOST}:{grpc}", f"{HOST}:{metrics}", models, log, process)
        _await_ready(server, time.monotonic() + timeout_s)
        yield server
    finally:
        _stop(process, prefix)


def servable(repository: Sealed) -> Path:
    """The part of a sealed repository that the server in the wheel can run.

    Raises:
        BackendError: there is none: only engines were served.
    """
    folder = repository.folder / "python"
    if not folder.is_dir():
        raise BackendError(
            f"{repository.folder}: holds engines alone, which the local Triton cannot run",
            "mount its tensorrt folder on a stock Triton with the TensorRT back end",
        )
    return folder


def _command(repository: Path, triton: Triton, ports: tuple[int, int, int], prefix: str) -> list[str]:
    http, grpc, metrics = ports
    key = secrets.token_hex(16)
    return [
        str(triton.server.absolute()),
        f"--model-repository={repository.absolute()}",
        f"--backend-directory={triton.backends.absolute()}",
        f"--http-address={HOST}", f"--http-port={http}",
        f"--grpc-address={HOST}", f"--grpc-port={grpc}",
        f"--metrics-address={HOST}", f"--metrics-port={metrics}",
        f"--http-restricted-api={CLOSED}:closed={key}", f"--grpc-restricted-protocol={CLOSED}:closed={key}",
        "--allow-gpu-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
    ]  # fmt: skip


def reserve(ports: Ports) -> tuple[int, int, int]:
    """Three distinct ports (HTTP, gRPC, metrics): those that were asked for, if they are free, else any.

    Raises:
        BackendError: naming the port that is in use.
    """
    with contextlib.ExitStack() as held:
        found = [held.enter_context(_bind(port)).getsockname()[1] for port in (ports.http, ports.grpc, ports.metrics)]
    http, grpc, metrics = found
    return http, grpc, metrics


def _bind(port: int | None) -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((HOST, port or 0))
        held.listen()  # without it Linux would give one port twice
    except OSError as error:
        held.close()
        raise BackendError(
            f"port {port}: cannot listen there ({error.strerror})", "stop what uses it, or choose another port"
        ) from None
    return held


def _await_ready(server: Server, deadline: float) -> None:
    while not _is_ready(server.http):
        if server.process.poll() is not None:
            raise BackendError(f"Triton does not start: {reason_in(server.log)}", f"see {server.log}")
        if time.monotonic() > deadline:
            raise BackendError("Triton is not ready in time", f"see {server.log}")
        time.sleep(0.1)


def _is_ready(address: str) -> bool:
    connection = HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def reason_in(log: Path) -> str:
    """Why the server ended: what a model of ours said, else the last error in its log, else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(SAID) for line in lines if line.startswith(SAID)]
    errors = [line.split("]", 1)[1] for line in lines if line.startswith("E") and "]" in line and HARMLESS not in line]
    reason = (said or errors or lines or ["it said nothing"])[-1]
    return reason.split(r"\n", 1)[0].strip(' "')


def require_audited_images(server: Server, model: str, probe: Probe) -> None:
    """Ask for the probe's images over both protocols and compare.

    Raises:
        LimitError: an image differs by more than one of 256 levels.
    """
    addresses: dict[Transport, str] = {"http": server.http, "grpc": server.grpc}
    for protocol, address in addresses.items():
        with contextlib.closing(TritonRuntime(address, model, protocol, texts=probe.texts)) as endpoint:
            served = endpoint.draw_uint8(Latents(probe.seeds), probe.labels)
        if (gap := int(np.abs(served.astype(np.int16) - probe.images).max())) > 1:
            raise LimitError(
                f"model {model} over {protocol}: served images are {gap} of 255 levels from the audited artefact's",
                "set Triton up again with `sfd-deploy serve --install-triton DIR`, then `serve` again",
            )


def _stop(process: subprocess.Popen[bytes], prefix: str) -> None:
    """SIGTERM, a bounded wait, then SIGKILL for whatever is left of its process group."""
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * EXIT_TIMEOUT_S)
    finally:  # also when a second Ctrl-C cuts the wait short
        process.kill()
        process.wait()
        _kill_group(process.pid, time.monotonic() + EXIT_TIMEOUT_S)
        # A server that was killed leaves the memory that it shared with its stubs.
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            path.unlink(missing_ok=True)


def _kill_group(group: int, deadline: float) -> None:
    """Kill what a dead leader left, and return when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)
