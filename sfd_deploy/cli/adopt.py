"""``sfd-deploy adopt``: make a run of a one-step generator that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sfd_deploy.cli.options import json_option, show, threads_option, use_threads

if TYPE_CHECKING:
    from rich.console import Console

    from sfd_deploy.runs import Run


# What a generator of one kind can be told and one of the other cannot.
OF_LABELS = ("class_names", "forget", "image_size")
OF_PROMPTS = ("prompts", "forget_prompts", "concept", "substitute")


@click.command(epilog="Example: sfd-deploy adopt my-generator -o runs/mine --forget airplane=automobile")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--convert", "checkpoint", type=click.Path(path_type=Path),
              help="Read this official SFD checkpoint instead of a diffusers folder.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Run folder to write.")
@click.option("--teacher", metavar="REF", help="What it was distilled from; audits compare with it.")
@click.option("--class-names", metavar="A,B,C|FILE", help="In label order  [default: the teacher's, or numbers]")
@click.option("--forget", multiple=True, metavar="FORGET=OVERRIDE", help="Claimed to be forgotten; repeatable.")
@click.option("--prompts", metavar="FILE", help="Text-to-image: prompts that it draws  [default: its prompts.json]")
@click.option("--forget-prompts", metavar="FILE", help="Text-to-image: prompts claimed to be forgotten.")
@click.option("--concept", metavar="PHRASE", help="The phrase that each of those holds.")
@click.option("--substitute", metavar="WORDS", help="What is drawn instead of the phrase.")
@click.option("--sigma-init", type=float, help="Noise level of its one step, where its scheduler does not say.")
@click.option("--timestep", type=float, help="The same as a timestep  [default of --convert: 440]")
@click.option("--image-size", type=int, help="Pixels; a checkpoint does not say.")
@threads_option
@json_option
def adopt(
    folder: Path | None, checkpoint: Path | None, output: Path, threads: int | None, as_json: bool, **claimed: Any
) -> None:
    """Make a run of a one-step generator trained elsewhere: then export, audit, bench and serve work on it.

    FOLDER is a stock diffusers folder: a ConsistencyModelPipeline, unet/ and scheduler/, or a
    StableDiffusionPipeline. Its weights are copied and checked to draw the same images.
    """
    from sfd_deploy.prompts import draws_from_prompts

    if (folder is None) == (checkpoint is None):
        raise click.UsageError("give a FOLDER, or a checkpoint with --convert FILE")
    use_threads(threads)
    by_prompt = folder is not None and draws_from_prompts(folder)
    said = {key: value for key, value in claimed.items() if value not in {None, ()}}
    _refuse_others(said, by_prompt)
    asked = {"source": str(folder or checkpoint), **said}
    run = _adopt_text(asked, output) if by_prompt else _adopt(asked, output, checkpoint is not None)
    value = _told(run)
    show(value, as_json, lambda console: _print(console, value))


def _refuse_others(said: dict[str, Any], by_prompt: bool) -> None:
    kind, others = ("prompts", OF_LABELS) if by_prompt else ("class labels", OF_PROMPTS)
    for option in others:
        if option in said:
            raise click.UsageError(f"--{option.replace('_', '-')} says nothing of a generator that draws from {kind}")


def _adopt(asked: dict[str, Any], output: Path, convert: bool) -> Run:
    from sfd_deploy.adopt.config import AdoptConfig, read_class_names
    from sfd_deploy.adopt.stage import adopt_checkpoint, adopt_folder

    asked |= {"class_names": read_class_names(asked.get("class_names")), "forget": _claims(asked.get("forget", ()))}
    config = AdoptConfig.from_mapping(asked, "command line")
    return adopt_checkpoint(config, output) if convert else adopt_folder(config, output)


def _adopt_text(asked: dict[str, Any], output: Path) -> Run:
    from sfd_deploy.adopt.config import TextAdoptConfig
    from sfd_deploy.adopt.text_stage import adopt_text_folder

    return adopt_text_folder(TextAdoptConfig.from_mapping(asked, "command line"), output)


def _told(run: Run) -> dict[str, Any]:
    from sfd_deploy.prompts import PROMPTS_FILE, prompts_in

    sealed = run.generator()
    value = {"run": str(run.folder), "generator": sealed.digest, "teacher": sealed.facts.get("teacher"),
             "sigma_init": sealed.facts["sigma_init"], "adopted": sealed.facts["adopted"]}  # fmt: skip
    if (sealed.folder / PROMPTS_FILE).is_file():
        prompts = prompts_in(sealed.folder)
        return value | {"prompts": {"retained": len(prompts.retained), "forget": len(prompts.forget)}}
    return value | {"labels": sealed.facts["labels"]}


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
    adopted, by_prompt = value["adopted"], "prompts" in value
    lines = [f"{value['run']}  generator {value['generator'][:12]}  draws at sigma {value['sigma_init']:.4g}"]
    if by_prompt:
        lines.append(f"taken for one unguided step from timestep {adopted['timestep']} ({adopted['level']})")
    if adopted.get("null_label_dropped"):
        lines.append("its null label is left behind: it was never retrained, and can draw what was forgotten")
    if adopted.get("safety_checker_dropped"):
        lines.append("its safety checker is left behind: what is audited and served is the generator alone")
    if not (value["prompts"] if by_prompt else value["labels"])["forget"]:
        claim = "--forget-prompts FILE --concept PHRASE --substitute WORDS" if by_prompt else "--forget LABEL=OVERRIDE"
        lines.append(f"no claim: an audit needs {claim}")
    if value["teacher"] is None:
        same = "latents" if by_prompt else "classes and image size"
        lines.append(f"no teacher: export works; an audit needs --teacher REF, a yardstick of the same {same}")
    console.print("\n".join(lines), markup=False, highlight=False)
