"""``sfd-deploy train``: distil a teacher into a one-step generator that has forgotten."""

from __future__ import annotations

from pathlib import Path

import click

from sfd_deploy.cli.options import json_option, show, threads_option, use_threads


@click.command(epilog="Example: sfd-deploy train --config fashion-mnist")
@click.option("--config", required=True, metavar="FILE|NAME", help="A training config, or a preset's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder  [default: runs/<config's name>]")
@threads_option
@json_option
def train(config: str, output: Path | None, threads: int | None, as_json: bool) -> None:
    """Run score forgetting distillation; resumes when run again, and needs no data."""
    from sfd_deploy.runs import RUNS
    from sfd_deploy.training.config import TrainConfig
    from sfd_deploy.training.stage import train as run_training

    use_threads(threads)
    parsed = TrainConfig.load(config, "train")
    run = run_training(parsed, output or RUNS / Path(config).stem)
    sealed = run.generator()
    value = {"run": str(run.folder), "generator": sealed.digest, "labels": sealed.facts["labels"]}
    show(value, as_json, lambda console: console.print(f"{run.folder}  generator {sealed.digest[:12]}"))
