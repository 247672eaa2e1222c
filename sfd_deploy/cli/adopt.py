"""``sfd-deploy adopt``: make a run of a one-step generator that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sfd_deploy.cli.options import json_option, show, threads_option, use_threads

if TYPE_CHECKING:
    from rich.console import Console


@click.command(epilog="Example: sfd-deploy adopt my-generator -o runs/mine --forget airplane=automobile")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--convert", "checkpoint", type=click.Path(path_type=Path),
              help="Read this official SFD checkpoint instead of a diffusers folder.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Run folder to write.")
@click.option("--teacher", metavar="REF", help="What it was distilled from; audits compare with it.")
@click.option("--class-names", metavar="A,B,C|FILE", help="In label order  [default: the teacher's, or numbers]")
@click.option("--forget", multiple=True, metavar="FORGET=OVERRIDE", help="Claimed to be forgotten; repeatable.")
@click.option("--sigma-init", type=float, help="Noise level of its one step, where its scheduler does not say.")
@click.option("--timestep", type=float, help="The same as a timestep  [default of --convert: 440]")
@click.option("--image-size", type=int, help="Pixels; a checkpoint does not say.")
@threads_option
@json_option
def adopt(
    folder: Path | None, checkpoint: Path | None, output: Path, teacher: str | None, class_names: str | None,
    forget: tuple[str, ...], sigma_init: float | None, timestep: float | None, image_size: int | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Make a run of a one-step generator trained elsewhere: then export, audit, bench and serve work on it.

    FOLDER is a stock diffusers folder: a ConsistencyModelPipeline, or unet/ and scheduler/. Its weights are
    copied and checked to draw the same images.
    """
    from sfd_deploy.adopt.config import AdoptConfig, read_class_names
    from sfd_deploy.adopt.stage import adopt_checkpoint, adopt_folder

    if (folder is None) == (checkpoint is None):
        raise click.UsageError("give a FOLDER, or a checkpoint with --convert FILE")
    use_threads(threads)
    asked: dict[str, Any] = {
        "source": str(folder or checkpoint), "teacher": teacher, "class_names": read_class_names(class_names),
        "forget": _claims(forget), "sigma_init": sigma_init, "timestep": timestep, "image_size": image_size,
    }  # fmt: skip
    config = AdoptConfig.from_mapping(asked, "command line")
    run = adopt_folder(config, output) if checkpoint is None else adopt_checkpoint(config, output)
    sealed = run.generator()
    value = {"run": str(run.folder), "generator": sealed.digest, "teacher": sealed.facts.get("teacher"),
             "labels": sealed.facts["labels"], "sigma_init": sealed.facts["sigma_init"],
             "adopted": sealed.facts["adopted"]}  # fmt: skip
    show(value, as_json, lambda console: _print(console, value))


def _claims(pairs: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        label, equals, override = (part.strip() for part in pair.partition("="))
        if not equals or not label or not override:
            raise click.BadParameter(f"{pair!r} is not FORGET=OVERRIDE, such as 1=8", param_hint="--forget")
        if label in found:
            raise click.BadParameter(f"{label} is named twice", param_hint="--forget")
        found[label] = override
    return found


def _print(console: Console, value: dict[str, Any]) -> None:
    lines = [f"{value['run']}  generator {value['generator'][:12]}  draws at sigma {value['sigma_init']:.4g}"]
    if value["adopted"]["null_label_dropped"]:
        lines.append("its null label is left behind: it was never retrained, and can draw what was forgotten")
    if not value["labels"]["forget"]:
        lines.append("no claim: an audit needs --forget LABEL=OVERRIDE")
    if value["teacher"] is None:
        lines.append(
            "no teacher: export works; an audit needs --teacher REF, a yardstick of the same classes and image size"
        )
    console.print("\n".join(lines), markup=False, highlight=False)
