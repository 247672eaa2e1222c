"""``sfd-deploy train``: distil a teacher into a one-step generator that has forgotten."""

from __future__ import annotations

import os
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
@click.option("--teacher", metavar="FOLDER|ID", help="Another teacher than the config's.")
@click.option("--init-from", metavar="RUN", help="Start from this run: a second stage, or a further label to forget.")
@click.option("--concept", metavar="WORDS", help="Text to image: the name of what is forgotten.")
@click.option("--substitute", metavar="WORDS", help="Text to image: what is drawn in its place.")
@click.option("--resume", "resumed", metavar="RUN", type=click.Path(path_type=Path),
              help="Go on with this run folder's training, under the config it was started with.")  # fmt: skip
@device_option
@threads_option
@json_option
def train(
    config: str | None, output: Path | None, teacher: str | None, init_from: str | None, concept: str | None,
    substitute: str | None, resumed: Path | None, device: str, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Run score forgetting distillation; resumes when run again, and needs no data."""
    if (config is None) == (resumed is None):
        raise click.UsageError("give either --config or --resume")
    changes = {"teacher": teacher, "init_from": init_from, "concept": concept, "substitute": substitute}
    if resumed is not None and (output or any(changes.values())):
        raise click.UsageError("--resume takes everything from the run: leave the other options out")
    from sfd_deploy.runs import RUNS

    use_threads(threads)
    folder = resumed or output or RUNS / Path(str(config)).stem
    try:
        run = _train(config, folder, changes, device)
    except KeyboardInterrupt:
        if _speaks():
            click.echo(_stopped(folder), err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    if not _speaks():
        return
    sealed = run.generator()
    value = {"run": str(run.folder), "generator": sealed.digest}
    value |= {key: sealed.facts[key] for key in ("labels", "prompts") if key in sealed.facts}
    show(value, as_json, lambda console: console.print(f"{run.folder}  generator {sealed.digest[:12]}"))


def _speaks() -> bool:
    """Whether this is the first of the processes that a launcher started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def _stopped(folder: Path) -> str:
    from sfd_deploy.training.stage import CHECKPOINT

    if (folder / "work" / CHECKPOINT).is_file():
        return f"stopped and saved; go on with: sfd-deploy train --resume {folder}"
    return "stopped before anything was saved; start again with the same command"


def _train(config: str | None, folder: Path, changes: dict[str, str | None], device: str) -> Run:
    from sfd_deploy.training.kinds import changed, load_config, resume, run_training

    if config is None:
        return resume(folder, device)
    return run_training(changed(load_config(config), **changes), folder, device)
