"""``sfd-deploy serve``: audited artefacts to Triton model repositories, and a local Triton."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from sfd_deploy.cli.options import json_option, run_argument, show, table

if TYPE_CHECKING:
    from sfd_deploy.manifest import Sealed
    from sfd_deploy.runs import Run
    from sfd_deploy.serving.install import Triton
    from sfd_deploy.serving.launch import Ports, Server
    from sfd_deploy.serving.repository import Probe

folder_type = click.Path(path_type=Path, file_okay=False)
port_type = click.IntRange(1, 65535)


@click.command(epilog="Example: sfd-deploy serve --launch --http-port 8000")
@run_argument
@click.option("--artefact", "artefacts", multiple=True, metavar="NAME", help="Repeatable  [default: all that passed]")
@click.option("--policy", default="default", show_default=True, metavar="FILE|NAME", help="The audit's policy.")
@click.option("--launch", is_flag=True, help="Start a local Triton on loopback and keep it until Ctrl-C.")
@click.option("--triton", type=folder_type, help="Triton's environment  [default: $SFD_DEPLOY_TRITON, or .triton]")
@click.option("--http-port", type=port_type, help="For --launch  [default: any free one]")
@click.option("--grpc-port", type=port_type, help="For --launch  [default: any free one]")
@click.option("--metrics-port", type=port_type, help="For --launch  [default: any free one]")
@click.option("--install-triton", "install", type=folder_type, metavar="DIR", help="Set Triton up in DIR, and no more.")
@json_option
def serve(
    run: str | None, artefacts: tuple[str, ...], policy: str, launch: bool, triton: Path | None, http_port: int | None,
    grpc_port: int | None, metrics_port: int | None, install: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write Triton model repositories of the artefacts whose audit passed."""
    from sfd_deploy.policy.plan import Policy
    from sfd_deploy.runs import Run
    from sfd_deploy.serving.install import open_triton, triton_folder
    from sfd_deploy.serving.launch import Ports
    from sfd_deploy.serving.stage import build_repository

    ports = Ports(http_port, grpc_port, metrics_port)
    if not launch and (triton or ports != Ports()):
        raise click.UsageError("--triton and the ports are for --launch; add it or leave them out.")
    if install is not None:
        if run or artefacts or launch:
            raise click.UsageError("--install-triton sets Triton up and does nothing else; give it alone.")
        set_up(install, as_json)
        return
    # Looked for first: a run is not worth opening for a server that is not there.
    server = open_triton(triton_folder(triton)) if launch else None
    opened = Run.named(run)
    repository = build_repository(opened, Policy.load(policy, "policy").digest, artefacts)
    if server is None:
        value = describe(repository)
        show(value, as_json, lambda console: print_repository(console, value))
    else:
        keep_running(opened, repository, server, ports, as_json)


def set_up(folder: Path, as_json: bool) -> None:
    """Install Triton into ``folder``."""
    from sfd_deploy.serving.install import install_triton

    triton = install_triton(folder)
    value = {"triton": str(triton.folder), "server": str(triton.server)}
    show(value, as_json, lambda console: console.print(f"{triton.folder}: Triton is set up", highlight=False))


def keep_running(run: Run, repository: Sealed, triton: Triton, ports: Ports, as_json: bool) -> None:
    """Serve the python repository until Ctrl-C or SIGTERM, which both end the server cleanly.

    Raises:
        KeyboardInterrupt: it was told to stop.
    """
    from sfd_deploy.serving.launch import launched, servable
    from sfd_deploy.serving.repository import PROBE, Probe

    models = servable(repository)
    with (
        handled_by(signal.default_int_handler),
        launched(models, triton, run.work / "triton.log", ports) as server,
        heard() as told,
    ):
        value = describe(repository, server)
        probe = Probe.load(models / server.models[0] / PROBE)
        show(value, as_json, lambda console: print_server(console, value, server, probe))
        server.wait(lambda: bool(told))
        raise KeyboardInterrupt


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``handler`` while the block runs, also where SIGINT was inherited as ignored."""
    before = {order: signal.signal(order, handler) for order in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for order, earlier in before.items():
            signal.signal(order, earlier)


@contextmanager
def heard() -> Iterator[list[int]]:
    """The signals that told the block to stop, so far.

    A list, as an exception raised by a handler can be lost where Python ignores exceptions (a destructor, a C
    callback), and a lock that a handler takes may be held by what it interrupted.
    """
    orders: list[int] = []
    with handled_by(lambda order, _frame: orders.append(order)):
        yield orders


def describe(repository: Sealed, server: Server | None = None) -> dict[str, Any]:
    """What was written and, if it runs, where it answers."""
    value = {"repository": str(repository.folder), "digest": repository.digest, **repository.facts}
    if server is not None:
        value["server"] = {"http": server.http, "grpc": server.grpc, "metrics": server.metrics, "log": str(server.log)}
    return value


def print_repository(console: Console, value: dict[str, Any]) -> None:
    """The models, and why others were left out."""
    rows = [(row["name"], row["repository"], row["runtime"], row["artefact_digest"][:12]) for row in value["models"]]
    console.print(table(value["repository"], ("model", "repository", "audited in", "artefact"), rows))
    for name, reason in value["left_out"].items():
        console.print(f"not served: {name} ({reason})", highlight=False, markup=False)


def print_server(console: Console, value: dict[str, Any], server: Server, probe: Probe) -> None:
    """The repository, the addresses, and a request to paste."""
    print_repository(console, value)
    console.print(f"HTTP {server.http}  gRPC {server.grpc}  metrics {server.metrics}; Ctrl-C stops", highlight=False)
    # Not through the console, which would break the line.
    click.echo(curl_example(server, probe))


def curl_example(server: Server, probe: Probe, seed: int = 7) -> str:
    """A shell command that draws one image of the first model, whose ``probe`` this is."""
    condition = ("class_labels", "INT64", 0) if probe.texts is None else ("prompt", "BYTES", probe.texts[-1])
    columns = (condition, ("seed", "INT64", seed))
    inputs = [{"name": name, "shape": [1, 1], "datatype": kind, "data": [value]} for name, kind, value in columns]
    body = shlex.quote(json.dumps({"inputs": inputs}))
    return f"curl -s http://{server.http}/v2/models/{server.models[0]}/infer -d {body}"
