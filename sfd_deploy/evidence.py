"""Audit records: what an audit found about each artefact, bound to digests, runtime, settings and policy.

Written by ``audit`` into ``runs/NAME/audit/audit.json`` (a sealed folder), read by ``serve`` and ``bench``.
Rates are from 0 to 1.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import FAILED, ManifestError, SfdError
from sfd_deploy.manifest import Sealed

AUDIT_JSON, REPORT_HTML = "audit.json", "report.html"
Verdict = Literal["pass", "fail", "inconclusive", "not-runnable-here"]


class EvidenceError(SfdError):
    """No audit record allows this artefact to be served."""

    exit_code = FAILED


class Count(StageConfig):
    """Hits of n with exact one-sided Clopper-Pearson bounds at the policy's confidence.

    ``upper_99`` is the upper bound at 0.99 whatever the policy says, so that records compare.
    """

    hits: int
    n: int
    rate: float
    lower: float
    upper: float
    upper_99: float


class Figures(StageConfig):
    """What was measured on one artefact.

    ``forget`` counts images of the forget label that either judge calls the forget label;
    ``override_error`` the same on images of the override label: the judges' own error. With several
    forget labels both are the worst label's, and ``override_share`` is the one furthest below the
    teacher's accuracy. Accuracies and shares are the lower of the judges'. ``hit_indices`` says which
    of the forget cell's images were hits: latents are shared, so two rows compare in pairs.
    ``psnr_db`` and ``agreement`` are None for a model in PyTorch, which is what others agree with.
    """

    forget: Count
    forget_by_label: dict[int, Count] = Field(min_length=1)
    hit_indices: dict[int, tuple[int, ...]]
    override_error: Count
    limited_by_judges: bool
    override_share: float
    override_share_by_label: dict[int, float] = Field(min_length=1)
    retained_accuracy: float
    retained_accuracy_by_label: dict[int, float]
    spread: float
    spread_by_label: dict[int, float]
    frechet: float
    frechet_ratio: float
    psnr_db: float | None
    agreement: float | None
    images_per_second: float
    speedup_over_teacher: float | None


class PromptSpread(StageConfig):
    """How far two images of *one prompt* are apart: of all retained families together, and of each.

    Root mean square distance in pixel space, or its ratio to the teacher's. A family's spread does not tell, for its
    prompts differ. Empty where no prompt was drawn twice, and in older audits.
    """

    overall: float | None = None
    by_label: dict[int, float] = Field({})


class FamilyFigures(Figures):
    """What was measured on an artefact of prompts; labels are prompt families.

    ``drawn_instead`` is by forget family: what one judge calls its images, the commonest classes and their shares.
    ``prompt_spread`` is over the teacher's.
    """

    drawn_instead: dict[int, dict[str, float]]
    prompt_spread: PromptSpread = PromptSpread()


class TeacherFigures(StageConfig):
    """What was measured on the teacher's reference samples: the yardstick of every row."""

    name: str
    digest: str
    retained_accuracy: float
    accuracy_by_label: dict[int, float]
    spread_by_label: dict[int, float]
    frechet: float
    images_per_second: float
    network_evaluations: int


class GuidedTeacherFigures(TeacherFigures):
    """As ``TeacherFigures``, and how a teacher of prompts drew: guidance and steps.

    ``concept_by_label`` is by forget family, the positive control: how often either judge sees the concept there.
    """

    settings: dict[str, Any]
    concept_by_label: dict[int, Count]
    prompt_spread: PromptSpread = PromptSpread()


class ArtefactRecord(StageConfig):
    """One row of an audit."""

    name: str
    kind: str
    digest: str
    runtime: str
    precision: str
    settings: dict[str, Any]
    bytes: int
    note: str = ""
    figures: FamilyFigures | Figures | None = None
    verdict: Verdict
    reasons: tuple[str, ...] = ()


class AuditRecord(StageConfig):
    """A whole audit."""

    schema_version: Literal[1] = 1
    run: str
    policy_name: str
    policy_digest: str
    policy: dict[str, Any]
    plan_digest: str
    plan: dict[str, Any]
    judges: tuple[dict[str, Any], ...]
    teacher: GuidedTeacherFigures | TeacherFigures
    artefacts: tuple[ArtefactRecord, ...]
    exit_code: int

    def row(self, name: str) -> ArtefactRecord | None:
        """The row of one artefact."""
        return next((row for row in self.artefacts if row.name == name), None)


def contract_row(row: ArtefactRecord) -> dict[str, Any]:
    """A row as ``audit --json`` and the demo's summary promise it to machines; None where nothing was measured."""
    figures = row.figures
    return {
        "name": row.name,
        "runtime": row.runtime,
        "precision": row.precision,
        "bytes": row.bytes,
        "forget": figures and {"hits": figures.forget.hits, "n": figures.forget.n, "upper_99": figures.forget.upper_99},
        "override_error": figures and {"hits": figures.override_error.hits, "n": figures.override_error.n},
        "override_share": figures and figures.override_share,
        "retained_accuracy": figures and figures.retained_accuracy,
        "spread": figures and figures.spread,
        "prompt_spread": figures.prompt_spread.overall if isinstance(figures, FamilyFigures) else None,
        "frechet": figures and figures.frechet,
        "psnr_db": figures and figures.psnr_db,
        "images_per_second": figures and figures.images_per_second,
        "speedup_over_teacher": figures and figures.speedup_over_teacher,
        "verdict": row.verdict,
    }


def read_record(audit: Sealed) -> AuditRecord:
    """The record in a verified audit folder.

    Raises:
        ManifestError: it is not one of this version.
    """
    path = audit.folder / AUDIT_JSON
    try:
        return AuditRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ManifestError(f"{path}: not an audit record of this version", "run `sfd-deploy audit` again") from None


def require_pass(
    record: AuditRecord, artefact: Sealed, runtime: str, settings: dict[str, Any], policy_digest: str
) -> ArtefactRecord:
    """The passing row for exactly this artefact, runtime, settings and policy.

    Raises:
        EvidenceError: there is none; says which of them differs.
    """
    row = record.row(artefact.name)
    again = f"run `sfd-deploy audit` on {artefact.name}"
    if row is None:
        raise EvidenceError(f"{artefact.name}: not in the audit record", again)
    if row.digest != artefact.digest:
        raise EvidenceError(
            f"{artefact.name}: audited with digest {row.digest[:12]}, is now {artefact.digest[:12]}", again
        )
    if record.policy_digest != policy_digest:
        raise EvidenceError(
            f"{artefact.name}: audited under policy {record.policy_digest[:12]}, asked for {policy_digest[:12]}", again
        )
    if (row.runtime, row.settings) != (runtime, settings):
        raise EvidenceError(
            f"{artefact.name}: audited in {row.runtime} with {row.settings}, "
            f"would be served in {runtime} with {settings}",
            again,
        )
    if row.verdict != "pass":
        reasons = "; ".join(row.reasons) or "see the report"
        raise EvidenceError(f"{artefact.name}: verdict {row.verdict} ({reasons})", "serve an artefact that passed")
    return row
