"""The audit stage: what is asked, of a run or of one folder, with which instruments; class labels here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfd_deploy.audit.panel import Panel
from sfd_deploy.audit.procedure import Audit, Instruments, Opener
from sfd_deploy.audit.selection import (
    Forget,
    Selection,
    find_judges,
    find_teacher,
    forget_labels,
    forget_labels_of_folder,
    home_of,
    require_parent,
)
from sfd_deploy.audit.subjects import Subject, run_subjects
from sfd_deploy.audit.text_stage import audit_text_selection
from sfd_deploy.errors import ConfigError
from sfd_deploy.evidence import AuditRecord
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import Judge
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.policy.plan import Plan, Policy
from sfd_deploy.prompts import draws_from_prompts
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime


def audit_run(
    run: Run, *, policy: Policy, judges: Sequence[Judge], teacher: Sealed, names: Sequence[str] = (),
    forget: Forget | None = None, device: str = "auto", open: Opener | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit a run's generator and all its artefacts, or those in ``names``, into ``RUN/audit``.

    Artefacts that no back end here can run get a row, and their verdict is that.

    Raises:
        RunError: an unknown name, a stale artefact, or a teacher that the generator was not distilled from.
        ConfigError: fewer than two judges.
        LabelError: no forget map, or judges of other classes.
        DigestError, ManifestError: any folder that is not whole.
        BackendError: a back end that is not installed.
    """
    generator = run.generator()
    labels = forget_labels(generator, forget or {})
    require_parent(generator, teacher)
    instruments = _instruments(policy, Panel.of_labels(judges, labels, run.name), teacher, device, open)
    subjects = run_subjects(run, generator, names)
    return Audit(run.name, run.folder, Plan.of(policy, labels), instruments).carry_out(subjects, generator, names)


def audit_folder(
    sealed: Sealed, labels: Labels, home: Path, *, policy: Policy, judges: Sequence[Judge], teacher: Sealed,
    device: str = "auto", open: Opener | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit one teacher or generator folder of no run, asking about ``labels``, into ``home/audit``.

    Raises:
        As ``audit_run``.
    """
    instruments = _instruments(policy, Panel.of_labels(judges, labels, sealed.name), teacher, device, open)
    return Audit(sealed.name, home, Plan.of(policy, labels), instruments).carry_out(
        (Subject(sealed),), None, (sealed.name,)
    )


def audit_selection(
    selection: Selection, *, policy: Policy, judges: Sequence[Path] = (), teacher: Path | None = None,
    forget: Forget | None = None, device: str = "auto", probes: str | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit what a command line selected, with the teacher and judges it named or those the model implies.

    ``probes`` names what a model of prompts is asked for, ``forget`` what one of labels is. A folder of no run is
    audited into ``runs/audit-of-NAME``, so that it never replaces a run's evidence.

    Raises:
        As ``audit_run`` and ``audit_text_run``; ConfigError where a model is asked for the other one's.
    """
    sealed = selection.sealed()
    if draws_from_prompts(sealed.folder):
        if forget:
            raise ConfigError(f"{sealed.folder}: draws from prompts, --forget is of class labels", "give --probes")
        return audit_text_selection(
            selection, sealed, policy=policy, probes=probes, judges=judges, teacher=teacher, device=device
        )
    if probes is not None:
        raise ConfigError(f"{sealed.folder}: draws class labels, --probes are of prompts", "leave --probes out")
    if selection.run is not None:
        labels = forget_labels(sealed, forget or {})
        return audit_run(
            selection.run, policy=policy, judges=find_judges(labels.class_names, judges),
            teacher=find_teacher(sealed, teacher), names=selection.names, forget=forget, device=device,
        )  # fmt: skip
    labels = forget_labels_of_folder(sealed, forget or {})
    return audit_folder(
        sealed, labels, home_of(sealed), policy=policy, judges=find_judges(labels.class_names, judges),
        teacher=find_teacher(sealed, teacher), device=device,
    )  # fmt: skip


def _instruments(policy: Policy, panel: Panel, teacher: Sealed, device: str, open: Opener | None) -> Instruments:
    sampler = SamplerConfig.from_mapping(teacher.facts["sampler"], str(teacher.folder))
    return Instruments(policy, panel, teacher, sampler.network_evaluations, device, open or open_runtime)
