"""Audit records: what an audit found about each artefact, bound to digests, runtime, settings and policy.

Written by ``audit`` into ``runs/NAME/audit/audit.json`` (a sealed folder), read by ``serve`` and ``bench``.
Rates are from 0 to 1.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import FAILED, ManifestError, SfdError
from sfd_deploy.manifest import Sealed

AUDIT_JSON, REPORT_HTML = "audit.json", "report.html"
Verdict = Literal["pass", "fail", "inconclusive", "not-runnable-here"]


class EvidenceError(SfdError):
    """No audit record allows this artefact to be served."""

    exit_code = FAILED


class Count(StageConfig):
    """Hits of n with exact one-sided Clopper-Pearson bounds at the policy's confidence."""

    hits: int
    n: int
    rate: float
    lower: float
    upper: float


class Figures(StageConfig):
    """What was measured on one artefact.

    ``forget`` counts images of the forget label that either judge calls the forget label;
    ``override_error`` the same on images of the override label: the judges' own error.
    """

    forget: Count
    override_error: Count
    limited_by_judges: bool
    override_share: float
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
    figures: Figures | None = None
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
    teacher: dict[str, Any]
    artefacts: tuple[ArtefactRecord, ...]
    exit_code: int

    def row(self, name: str) -> ArtefactRecord | None:
        """The row of one artefact."""
        return next((row for row in self.artefacts if row.name == name), None)


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
        raise EvidenceError(f"{artefact.name}: audited with digest {row.digest[:12]}, is now {artefact.digest[:12]}", again)
    if record.policy_digest != policy_digest:
        raise EvidenceError(
            f"{artefact.name}: audited under policy {record.policy_digest[:12]}, asked for {policy_digest[:12]}", again
        )
    if (row.runtime, row.settings) != (runtime, settings):
        raise EvidenceError(
            f"{artefact.name}: audited in {row.runtime} with {row.settings}, would be served in {runtime} with {settings}",
            again,
        )
    if row.verdict != "pass":
        reasons = "; ".join(row.reasons) or "see the report"
        raise EvidenceError(f"{artefact.name}: verdict {row.verdict} ({reasons})", "serve an artefact that passed")
    return row
