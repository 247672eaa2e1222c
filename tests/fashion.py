"""What the tests on the shipped Fashion-MNIST models share."""

from __future__ import annotations

import json
from pathlib import Path

from sfd_deploy.embedded import judges_for, resolve
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.runs import Run

TROUSER, BAG = 1, 8


def shipped_judges() -> list[Judge]:
    """The two of Fashion-MNIST's classes."""
    names = tuple(resolve("fashion-mnist", "teacher").facts["labels"]["class_names"])
    return [open_judge(folder) for folder in judges_for(names)]


def policy_file(folder: Path, values: dict[str, object]) -> str:
    """Where a policy of ``values`` is."""
    file = folder / f"{values['name']}.yaml"
    file.write_text(json.dumps(values))
    return str(file)


def rows(run: Run) -> dict[str, dict]:
    """The rows of a run's audit record, by name."""
    record = json.loads((run.folder / "audit" / "audit.json").read_text())
    return {row["name"]: row for row in record["artefacts"]}
