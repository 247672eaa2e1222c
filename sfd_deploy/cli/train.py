"""``sfd-deploy train``: distil a teacher into a one-step generator that has forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sfd_deploy.cli.options import device_option, json_option, show, threads_option, use_threads
from sfd_deploy.errors import INTERRUPTED

if TYPE_CHECKING:
    from sfd_deploy.runs import Run


@click.command(epilog="Example: sfd-deploy train --config fashion-mnist")
@click.option("--config", metavar="FILE|NAME", help="A training config, or a preset's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder  [default: runs/<config's name>]")
@click.option("--init-from", metavar="RUN", help="Start from this run: a second stage, or a further label to forget.")
@click.option("--resume", "resumed", metavar="RUN", type=click.Path(path_type=Path),
              help="Go on with this run folder's training, under the config it was started with.")  # fmt: skip
@device_option
@threads_option
@json_option
def train(
    config: str | None, output: Path | None, init_from: str | None, resumed: Path | None, device: str,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Run score forgetting distillation; resumes when run again, and needs no data."""
    if (config is None) == (resumed is None):
        raise click.UsageError("give either --config or --resume")
    if resumed is not None and (output or init_from):
        raise click.UsageError("--resume takes everything from the run: leave --output and --init-from out")
    from sfd_deploy.runs import RUNS

    use_threads(threads)
    folder = resumed or output or RUNS / Path(str(config)).stem
    try:
        run = _train(config, folder, init_from, device)
    except KeyboardInterrupt:
        click.echo(f"stopped and saved; go on with: sfd-deploy train --resume {folder}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    sealed = run.generator()
    value = {"run": str(run.folder), "generator": sealed.digest, "labels": sealed.facts["labels"]}
    show(value, as_json, lambda console: console.print(f"{run.folder}  generator {sealed.digest[:12]}"))


def _train(config: str | None, folder: Path, init_from: str | None, device: str) -> Run:
    from sfd_deploy.training.config import TrainConfig
    from sfd_deploy.training.stage import resume
    from sfd_deploy.training.stage import train as run_training

    if config is None:
        return resume(folder, device)
    parsed = TrainConfig.load(config, "train")
    if init_from is not None:
        parsed = parsed.model_copy(update={"init_from": init_from})
    return run_training(parsed, folder, device)
