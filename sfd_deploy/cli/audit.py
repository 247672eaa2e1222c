"""``sfd-deploy audit``: measure each artefact, decide, write the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sfd_deploy.cli.options import device_option, json_option, show, table, threads_option, use_threads

if TYPE_CHECKING:
    from rich.console import Console

    from sfd_deploy.evidence import ArtefactRecord, AuditRecord
    from sfd_deploy.manifest import Sealed


@click.command(epilog="Example: sfd-deploy audit onnx-cpu-int8 --policy strict.yaml")
@click.argument("subjects", nargs=-1, metavar="[RUN|ARTEFACT]...")
@click.option("--policy", default="default", show_default=True, metavar="FILE|NAME", help="The limits, as YAML.")
@click.option("--judge", "judges", type=click.Path(path_type=Path), multiple=True,
              help="A judge folder; give two or more  [default: the shipped ones for the run's classes]")  # fmt: skip
@click.option("--teacher", type=click.Path(path_type=Path), help="The teacher's folder  [default: where the run says]")
@click.option("--forget", multiple=True, metavar="LABEL=OVERRIDE",
              help="Ask about this label, where the model records none as forgotten; repeatable.")  # fmt: skip
@click.option("--probes", metavar="FILE|NAME",
              help="What to ask a run of prompts for, as YAML  [default: the shipped ones, if they fit]")  # fmt: skip
@device_option
@threads_option
@json_option
def audit(
    subjects: tuple[str, ...], policy: str, judges: tuple[Path, ...], teacher: Path | None, forget: tuple[str, ...],
    probes: str | None, device: str, threads: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Audit what was exported: forget rate with exact bounds, retained quality, parity; verdict and HTML report.

    Without arguments: everything that the latest run exported. An argument is a run, the name or folder
    of one of its artefacts, or the folder of a teacher. Exit code: 0 passed, 1 failed, 3 not proved.
    """
    from sfd_deploy.audit.selection import select
    from sfd_deploy.audit.stage import audit_selection
    from sfd_deploy.evidence import contract_row
    from sfd_deploy.policy.plan import Policy

    use_threads(threads)
    record, sealed = audit_selection(
        select(subjects), policy=Policy.load(policy, "policy"), judges=judges, teacher=teacher,
        forget=_forget_map(forget), device=device, probes=probes,
    )  # fmt: skip
    value = {
        "exit_code": record.exit_code,
        "policy_digest": record.policy_digest,
        "artefacts": [contract_row(row) for row in record.artefacts],
    }
    show(value, as_json, lambda console: _print(console, record, sealed))
    return record.exit_code


def _forget_map(pairs: tuple[str, ...]) -> dict[str | int, str | int]:
    found: dict[str | int, str | int] = {}
    for pair in pairs:
        label, equals, override = pair.partition("=")
        if not equals or not label.strip() or not override.strip():
            raise click.BadParameter(
                f"{pair!r} is not LABEL=OVERRIDE, such as 1=8 or Trouser=Bag", param_hint="--forget"
            )
        found[label.strip()] = override.strip()
    return found


def _print(console: Console, record: AuditRecord, sealed: Sealed) -> None:
    columns = ("artefact", "verdict", "forget ≤", "retained", "spread", "Fréchet", "dB", "img/s")
    console.print(table(f"Audit of {record.run}", columns, [_cells(row) for row in record.artefacts]))
    for row in record.artefacts:
        for sentence in (*row.reasons, row.note):
            if sentence:
                console.print(f"{row.name}: {sentence}", markup=False, highlight=False)
    console.print(f"policy {record.policy_name} {record.policy_digest[:12]}; report: {sealed.folder / 'report.html'}",
                  markup=False, highlight=False)  # fmt: skip


def _cells(row: ArtefactRecord) -> tuple[str, ...]:
    found = row.figures
    if found is None:
        return (row.name, row.verdict, *["-"] * 6)
    return (
        row.name, row.verdict, f"{found.forget.upper:.2%}", f"{found.retained_accuracy:.3f}", f"{found.spread:.2f}",
        f"{found.frechet_ratio:.2f}x", "-" if found.psnr_db is None else f"{found.psnr_db:.1f}",
        f"{found.images_per_second:.0f}",
    )  # fmt: skip
