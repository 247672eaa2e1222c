"""``sfd-deploy bench``: latency and throughput, one run, ratios."""

from __future__ import annotations

import click

from sfd_deploy.cli.options import device_option, json_option, run_argument, show, table, threads_option, use_threads


@click.command(epilog="Example: sfd-deploy bench --batch-size 1 --batch-size 16")
@run_argument
@click.option(
    "--batch-size", "batches", type=click.IntRange(1, 1024), multiple=True, help="Repeatable  [default: 1, 16]"
)
@click.option("--rounds", type=click.IntRange(min=3), default=7, show_default=True, help="Interleaved rounds.")
@device_option
@threads_option
@json_option
def bench(
    run: str | None, batches: tuple[int, ...], rounds: int, device: str, threads: int | None, as_json: bool
) -> None:
    """Time the teacher, the generator and every artefact that runs here, side by side.

    Text-to-image artefacts also part by part: text encoder, U-Net, decoder.
    """
    from sfd_deploy import bench as measure
    from sfd_deploy.runs import Run

    use_threads(threads)
    rows = measure.latency(Run.named(run), batches or (1, 16), rounds, device)
    columns = ("name", "batch", "ms", "images/s", "x generator", "x teacher")
    cells = [(row.name, str(row.batch), f"{row.latency_ms:.1f}", f"{row.images_per_second:.0f}",
              f"{row.times_generator:.2f}", _times(row.times_teacher)) for row in rows]  # fmt: skip
    title = "Medians of interleaved rounds"
    show({"rows": measure.as_json(rows)}, as_json, lambda console: console.print(table(title, columns, cells)))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
