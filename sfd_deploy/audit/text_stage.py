"""The audit stage for prompts: families of them are asked for as labels are, by the one procedure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sfd_deploy.audit.panel import Panel
from sfd_deploy.audit.procedure import Audit, Instruments
from sfd_deploy.audit.selection import Selection, find_teacher, home_of, require_parent
from sfd_deploy.audit.subjects import Subject, run_subjects
from sfd_deploy.audit.text_selection import find_family_judges, find_probes, forget_prompts_of
from sfd_deploy.evidence import AuditRecord
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import Judge
from sfd_deploy.models.text.sampler import TextSampler
from sfd_deploy.models.text.tokens import read_tokenizer, require_within_limit
from sfd_deploy.policy.plan import Plan, Policy
from sfd_deploy.probes import Families, Probes
from sfd_deploy.prompts import Prompts, prompts_in
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_text_runtime
from sfd_deploy.runtime.families import FamilyRuntime
from sfd_deploy.runtime.seam import Runtime


class TextOpener(Protocol):
    """``open_text_runtime``, or what stands for it."""

    def __call__(self, sealed: Sealed, texts: Sequence[str], device: str, sampler: TextSampler | None) -> Runtime:
        """A back end asked for ``texts`` by position."""
        ...


def audit_text_run(
    run: Run, *, policy: Policy, probes: Probes, judges: Sequence[Judge], teacher: Sealed, names: Sequence[str] = (),
    device: str = "auto", open: TextOpener | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit a run of prompts, its generator and all its artefacts or those in ``names``, into ``RUN/audit``.

    Raises:
        RunError: an unknown name, a stale artefact, or a teacher that the generator was not distilled from.
        PromptError: a prompt beyond the token limit, or one that asks for what was forgotten and should not.
        LabelError: a class that fewer than two judges know.
        DigestError, ManifestError: any folder that is not whole.
        BackendError: a back end that is not installed.
    """
    generator = run.generator()
    require_parent(generator, teacher)
    families = _families(generator, probes, prompts_in(generator.folder), judges)
    instruments = _instruments(policy, probes, families, judges, teacher, device, open)
    subjects = run_subjects(run, generator, names)
    return Audit(run.name, run.folder, Plan.of(policy, families), instruments).carry_out(subjects, generator, names)


def audit_text_folder(
    sealed: Sealed, prompts: Prompts, home: Path, *, policy: Policy, probes: Probes, judges: Sequence[Judge],
    teacher: Sealed, device: str = "auto", open: TextOpener | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit one teacher or generator of no run; the training prompts are those that ``prompts`` forget.

    Raises:
        As ``audit_text_run``.
    """
    families = _families(sealed, probes, prompts, judges)
    instruments = _instruments(policy, probes, families, judges, teacher, device, open)
    return Audit(sealed.name, home, Plan.of(policy, families), instruments).carry_out(
        (Subject(sealed),), None, (sealed.name,)
    )


def audit_text_selection(
    selection: Selection, sealed: Sealed, *, policy: Policy, probes: str | None, judges: Sequence[Path],
    teacher: Path | None, device: str,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit what a command line selected; ``sealed`` is the selected run's generator or the folder of no run.

    Raises:
        As ``audit_text_run``; ConfigError where nothing says which probes.
    """
    prompts = forget_prompts_of(sealed)
    asked = find_probes(sealed, prompts, probes)
    seen_by = find_family_judges(asked, judges)
    yardstick = find_teacher(sealed, teacher)
    if selection.run is not None:
        return audit_text_run(
            selection.run, policy=policy, probes=asked, judges=seen_by, teacher=yardstick, names=selection.names,
            device=device,
        )  # fmt: skip
    return audit_text_folder(
        sealed, prompts, home_of(sealed), policy=policy, probes=asked, judges=seen_by, teacher=yardstick, device=device
    )


def _families(sealed: Sealed, probes: Probes, prompts: Prompts, judges: Sequence[Judge]) -> Families:
    families = probes.bind(prompts, {judge.name: judge.class_names for judge in judges})
    require_within_limit(read_tokenizer(sealed.folder / "tokenizer"), families.texts)  # before anything is drawn
    return families


def _instruments(
    policy: Policy, probes: Probes, families: Families, judges: Sequence[Judge], teacher: Sealed, device: str,
    open: TextOpener | None,
) -> Instruments:  # fmt: skip
    sampler, opened = TextSampler.of(teacher, probes.teacher.given()), open or open_text_runtime
    return Instruments(
        policy, Panel.of_families(judges, families), teacher, sampler.network_evaluations, device,
        lambda sealed, where: FamilyRuntime(opened(sealed, families.texts, where, sampler), families),
    )  # fmt: skip
