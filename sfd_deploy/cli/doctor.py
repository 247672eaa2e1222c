"""``sfd-deploy doctor``: which back ends this machine can run, and the mend for each it can't."""

from __future__ import annotations

import click

from sfd_deploy.cli.options import json_option, show, table


@click.command(epilog="Example: sfd-deploy doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Check each back end and say what is missing."""
    from sfd_deploy.doctor import examine

    findings = examine()
    rows = [(item.name, "yes" if item.works else "no", item.detail, item.mend) for item in findings]
    value = {"back_ends": [item._asdict() for item in findings]}
    show(value, as_json, lambda console: console.print(table("Back ends", ("name", "works", "found", "mend"), rows)))
