"""``sfd-deploy info``: lineage, what came from what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sfd_deploy.cli.options import json_option, run_argument, show

if TYPE_CHECKING:
    from rich.console import Console


@click.command(epilog="Example: sfd-deploy info runs/demo")
@run_argument
@json_option
def info(run: str | None, as_json: bool) -> None:
    """Verify every sealed folder of a run and print its lineage with digests."""
    from sfd_deploy.manifest import MANIFEST, verify
    from sfd_deploy.runs import Run

    opened = Run.named(run)
    folders = sorted(path.parent for path in opened.folder.rglob(MANIFEST))
    rows: list[dict[str, Any]] = []
    for folder in folders:
        sealed = verify(folder)
        rows.append({
            "folder": folder.relative_to(opened.folder).as_posix(),
            "kind": sealed.manifest.kind,
            "digest": sealed.digest,
            "created": sealed.manifest.created,
            "bytes": sum(record.bytes for record in sealed.manifest.files.values()),
            "parents": [parent.model_dump() for parent in sealed.manifest.parents],
        })  # fmt: skip
    show({"run": str(opened.folder), "folders": rows}, as_json, lambda console: _print_tree(console, opened.name, rows))


def _print_tree(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    from rich.tree import Tree

    tree = Tree(f"[bold]{name}[/bold] (every digest verified)")
    for row in rows:
        branch = tree.add(f"{row['folder']}  {row['kind']}  {row['digest'][:12]}  {row['bytes']:,} bytes")
        for parent in row["parents"]:
            branch.add(f"from {parent['kind']} {parent['name']}  {parent['digest'][:12]}")
    console.print(tree)
