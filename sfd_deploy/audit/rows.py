"""Rows of an audit record, and the plain words that stand beside their figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_deploy.audit.panel import Panel
from sfd_deploy.audit.subjects import Subject
from sfd_deploy.evidence import ArtefactRecord, Figures
from sfd_deploy.labels import Labels
from sfd_deploy.policy.verdict import Judgement
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.seam import Runtime


def measured_row(
    subject: Subject, runtime: Runtime, figures: Figures | None, judgement: Judgement, twin: str
) -> ArtefactRecord:
    """The row of a subject that ran; ``twin`` names the row whose samples it shares, or is empty."""
    settings = dict(runtime.settings)
    notes = [arithmetic_note(subject.precision, settings)]
    if twin:
        notes.append(f"The same model file in the same back end and settings as {twin}: these are its figures.")
    return ArtefactRecord(
        name=subject.name, kind=subject.kind, digest=subject.sealed.digest, runtime=runtime.name,
        precision=subject.precision, settings=settings, bytes=subject.bytes, note=" ".join(filter(None, notes)),
        figures=figures, verdict=judgement.verdict, reasons=judgement.reasons,
    )  # fmt: skip


def absent_row(subject: Subject, error: NotRunnableHereError) -> ArtefactRecord:
    """The row of an artefact that this machine cannot run: no figure, and no figure borrowed either."""
    note = f"Not run here: {error.what}."
    if subject.graphs:
        note += (f" The engine itself was NOT audited. The graph it was built from is {', '.join(subject.graphs)}; "
                 "figures in that row are the graph's, not the engine's.")  # fmt: skip
    return ArtefactRecord(
        name=subject.name, kind=subject.kind, digest=subject.sealed.digest, runtime=subject.runtime,
        precision=subject.precision, settings={}, bytes=subject.bytes, note=note, verdict="not-runnable-here",
        reasons=(f"{error.what}; {error.mend}",),
    )  # fmt: skip


def arithmetic_note(precision: str, settings: Mapping[str, Any]) -> str:
    """Says so when a back end computes in another arithmetic than the artefact is made for; else empty."""
    arithmetic = settings.get("arithmetic", precision)
    if arithmetic == precision:
        return ""
    return (f"Computed in {arithmetic.upper()} arithmetic, as this back end does with {precision.upper()} graphs: "
            f"evidence for the rounded weights, not for {precision.upper()} arithmetic.")  # fmt: skip


def judge_card(panel: Panel, row: int, labels: Labels) -> dict[str, Any]:
    """A judge as records name it, with its own error where it matters: real override images called the forget label.

    A judge that knows neither has no such error.
    """
    judge, numbers = panel.judges[row], panel.classes[row]
    truth, called = judge.held_out
    confusions = {}
    for label in labels.forget:
        overrides = [int(numbers[override]) for override in labels.overrides_of(label) if numbers[override] >= 0]
        if overrides and numbers[label] >= 0:
            confusions[str(label)] = float(np.mean(called[np.isin(truth, overrides)] == numbers[label]))
    return {
        "name": judge.name, "digest": judge.digest, "accuracy": judge.accuracy, "held_out_images": len(truth),
        "calls_real_override_the_forget_label": confusions, "frechet_features": row == panel.extractor,
    }  # fmt: skip
