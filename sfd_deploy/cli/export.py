"""``sfd-deploy export``: a run's generator to ONNX graphs and TensorRT engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sfd_deploy.cli.options import json_option, run_argument, show, table

if TYPE_CHECKING:
    from sfd_deploy.manifest import Sealed


@click.command(epilog="Example: sfd-deploy export --trt --fp16")
@run_argument
@click.option("--onnx", "backends", flag_value="onnx", multiple=True, help="Write ONNX graphs (the default).")
@click.option("--trt", "backends", flag_value="trt", multiple=True, help="Build TensorRT engines, and their graphs.")
@click.option("--fp32", "precisions", flag_value="fp32", multiple=True, help="In FP32 (the default).")
@click.option("--fp16", "precisions", flag_value="fp16", multiple=True, help="In FP16, for GPUs.")
@click.option("--int8", "precisions", flag_value="int8", multiple=True, help="In INT8, calibrated without data.")
@click.option("--opset", type=int, help="ONNX operator set, 18 to 20  [default: 20]")
@click.option("--min-batch", type=int, help="Smallest batch of an engine  [default: 1]")
@click.option("--opt-batch", type=int, help="Batch that an engine is tuned for  [default: 16; text-to-image: 1]")
@click.option("--max-batch", type=int, help="Largest batch  [default: 64; text-to-image: 8]")
@json_option
def export(
    run: str | None, backends: tuple[str, ...], precisions: tuple[str, ...], opset: int | None, min_batch: int | None,
    opt_batch: int | None, max_batch: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Compile a run's generator (default: the latest run's); back ends and precisions add up."""
    from sfd_deploy.export.kinds import export_any
    from sfd_deploy.runs import Run

    asked = {"opset": opset, "min_batch": min_batch, "opt_batch": opt_batch, "max_batch": max_batch}
    given = {key: value for key, value in asked.items() if value is not None}
    artefacts = [_row(sealed) for sealed in export_any(Run.named(run), backends, precisions, given)]
    columns = ("artefact", "precision", "runtime", "MB", "PSNR dB", "digest")
    rows = [[row["name"], row["precision"], row["runtime"], _size(row["bytes"]), _decibels(row["psnr_db"]),
             row["digest"][:12]] for row in artefacts]  # fmt: skip
    show({"artefacts": artefacts}, as_json, lambda console: console.print(table("Exported", columns, rows)))


def _row(sealed: Sealed) -> dict[str, Any]:
    facts = sealed.facts
    return {
        "name": sealed.name, "folder": str(sealed.folder), "precision": facts["precision"], "runtime": facts["runtime"],
        "bytes": sum(item.bytes for item in sealed.manifest.files.values()), "psnr_db": facts["psnr_db"],
        "digest": sealed.digest,
    }  # fmt: skip


def _decibels(psnr_db: float | None) -> str:
    return "not run" if psnr_db is None else f"{psnr_db:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f}"
