"""``sfd-deploy sample``: draw a grid of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sfd_deploy.cli.options import device_option, json_option, run_argument, show

if TYPE_CHECKING:
    from sfd_deploy.manifest import Sealed
    from sfd_deploy.runtime.conditions import Conditions


@click.command(epilog="Example: sfd-deploy sample --artefact onnx-cpu-int8 --output int8.png")
@run_argument
@click.option("--artefact", help="An exported artefact  [default: the generator in PyTorch]")
@click.option("--label", "names", multiple=True, help="Class name or number; repeatable  [default: all]")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT",
              help="For a text-to-image run; repeatable  [default: a few it forgot, a few it kept]")  # fmt: skip
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=8, show_default=True, help="Images a row.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the latents.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@device_option
@json_option
def sample(
    run: str | None, artefact: str | None, names: tuple[str, ...], prompts: tuple[str, ...], count: int, seed: int,
    output: Path, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Draw images, one row a label or prompt, as a PNG grid."""
    import numpy as np

    from sfd_deploy.latents import Latents
    from sfd_deploy.pictures import grid, save_png
    from sfd_deploy.runs import Run
    from sfd_deploy.runtime.seam import draw_all, to_uint8

    opened = Run.named(run)
    sealed = opened.artefact(artefact) if artefact else opened.generator()
    asked, wanted = asked_for(sealed, names, prompts)
    runtime = asked.open(sealed, device)
    latents = Latents.of_stream("sample", seed, 0, count * len(wanted))
    images = draw_all(runtime, latents, np.repeat(np.array(wanted, np.int64), count), batch=64)
    save_png(grid(to_uint8(images), columns=count), output)
    rows = {"prompts": list(asked.names)} if asked.are_prompts else {"labels": wanted}
    value = {"file": str(output), **rows, "count": count, "seed": seed, "digest": sealed.digest}
    shown = ", ".join(asked.names[number] for number in wanted)
    # Prompts hold brackets, which are no markup.
    show(value, as_json, lambda console: console.print(f"{output}: {count} images a row; rows: {shown}", markup=False))


def asked_for(sealed: Sealed, names: tuple[str, ...], prompts: tuple[str, ...]) -> tuple[Conditions, list[int]]:
    """What a command line asks of a model, and its numbers in order.

    Raises:
        LabelError, PromptError: a label or prompt that it does not know, or that such a model is not asked for.
    """
    from sfd_deploy.errors import LabelError, PromptError
    from sfd_deploy.labels import Labels
    from sfd_deploy.prompts import draws_from_prompts
    from sfd_deploy.runtime.conditions import Conditions, conditions_of

    if draws_from_prompts(sealed.folder):
        if names:
            raise LabelError(f"{sealed.folder}: draws from prompts, and has no labels", "ask with --prompt TEXT")
        asked = Conditions.of_prompts(prompts) if prompts else conditions_of(sealed)
        return asked, list(range(len(asked.names)))
    if prompts:
        raise PromptError(f"{sealed.folder}: draws class labels, and takes no prompt", "ask with --label NAME")
    asked = conditions_of(sealed)
    labels = Labels(class_names=asked.names)
    return asked, [labels.find(name) for name in names] or list(range(labels.count))
