"""``sfd-deploy demo``: everything in order."""

from __future__ import annotations

from pathlib import Path

import click

from sfd_deploy.cli.options import json_option, show, table, threads_option, use_threads


@click.command(epilog="Example: sfd-deploy demo")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option(
    "--triton", type=click.Path(path_type=Path), help="Triton's environment; set up if missing  [default: .triton]"
)
@click.option("--set-up-seconds", type=float, default=0.0, help="What set-up took, for the summary.")
@threads_option
@json_option
def demo(output: Path, triton: Path | None, set_up_seconds: float, threads: int | None, as_json: bool) -> int:
    """Train, export, audit, serve and ask, on the shipped Fashion-MNIST teacher: about ten minutes on two cores."""
    from sfd_deploy.demo import run_demo, table_rows
    from sfd_deploy.serving.install import install_triton, triton_folder

    use_threads(threads)
    summary = run_demo(output, install_triton(triton_folder(triton)), set_up_seconds=set_up_seconds)
    columns, rows = table_rows(summary)
    title = f"set-up {summary['seconds']['set_up']:.0f} s, run {summary['seconds']['run']:.0f} s; {output}/summary.json"
    show(summary, as_json, lambda console: console.print(table(title, columns, rows)))
    return int(summary["exit_code"])
