"""``sfd-deploy sample``: draw a grid of images."""

from __future__ import annotations

from pathlib import Path

import click

from sfd_deploy.cli.options import device_option, json_option, run_argument, show


@click.command(epilog="Example: sfd-deploy sample --artefact onnx-cpu-int8 --output int8.png")
@run_argument
@click.option("--artefact", help="An exported artefact  [default: the generator in PyTorch]")
@click.option("--label", "names", multiple=True, help="Class name or number; repeatable  [default: all]")
@click.option("--count", type=click.IntRange(1, 1000), default=8, show_default=True, help="Images a label.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the latents.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@device_option
@json_option
def sample(
    run: str | None, artefact: str | None, names: tuple[str, ...], count: int, seed: int, output: Path, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Draw images, one row a label, as a PNG grid."""
    import numpy as np

    from sfd_deploy.latents import Latents
    from sfd_deploy.models.generator import labels_of
    from sfd_deploy.pictures import grid, save_png
    from sfd_deploy.runs import Run
    from sfd_deploy.runtime import open_runtime
    from sfd_deploy.runtime.seam import draw_all, to_uint8

    opened = Run.named(run)
    sealed = opened.artefact(artefact) if artefact else opened.generator()
    known = labels_of(sealed)
    wanted = [known.find(name) for name in names] or list(range(known.count))
    runtime = open_runtime(sealed, device)
    latents = Latents.of_stream("sample", seed, 0, count * len(wanted))
    images = draw_all(runtime, latents, np.repeat(np.array(wanted, np.int64), count), batch=64)
    save_png(grid(to_uint8(images), columns=count), output)
    value = {"file": str(output), "labels": wanted, "count": count, "seed": seed, "digest": sealed.digest}
    rows = ", ".join(known.class_names[label] for label in wanted)
    show(value, as_json, lambda console: console.print(f"{output}: {count} images a row; rows: {rows}"))
