"""Audit: draw from every artefact on the same latents, judge, measure, decide, and seal the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sfd_deploy.audit.figures import Yardstick, subject_figures, teacher_figures
from sfd_deploy.audit.reference import teacher_reference
from sfd_deploy.audit.report import YARDSTICK, Pictures, render
from sfd_deploy.audit.rows import absent_row, judge_card, measured_row
from sfd_deploy.audit.samples import Samples, Seen, draw, look
from sfd_deploy.audit.selection import (
    Forget,
    Selection,
    find_judges,
    find_teacher,
    forget_labels,
    forget_labels_of_folder,
    require_parent,
)
from sfd_deploy.audit.subjects import Subject, run_subjects
from sfd_deploy.errors import ConfigError, LimitError
from sfd_deploy.evidence import AUDIT_JSON, REPORT_HTML, ArtefactRecord, AuditRecord, Figures
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Parent, Sealed, canonical_json, verify
from sfd_deploy.measure.judges import Judge, require_same_classes
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.policy.plan import Plan, Policy
from sfd_deploy.policy.verdict import Judgement, exit_code, judge
from sfd_deploy.progress import LOGGER
from sfd_deploy.runs import RUNS, Run, sealed_folder, write_json
from sfd_deploy.runtime import NotRunnableHereError, open_runtime
from sfd_deploy.runtime.seam import Runtime

Opener = Callable[[Sealed, str], Runtime]


@dataclass(frozen=True)
class Instruments:
    """What every subject is measured with."""

    policy: Policy
    judges: tuple[Judge, ...]
    teacher: Sealed
    device: str
    open: Opener

    def require_fit(self, labels: Labels, owner: str) -> None:
        """Refuse instruments that cannot measure a model with ``labels``.

        Raises:
            ConfigError: fewer than two judges.
            LabelError: a judge that knows other classes.
        """
        if len({judge.digest for judge in self.judges}) < 2:
            raise ConfigError(
                "an audit takes two different judges: a hit is what either of them says", "give --judge twice"
            )
        require_same_classes(self.judges, labels.class_names, owner)


def audit_run(
    run: Run, *, policy: Policy, judges: Sequence[Judge], teacher: Sealed, names: Sequence[str] = (),
    forget: Forget | None = None, device: str = "auto", open: Opener | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit a run's generator and all its artefacts, or those in ``names``, into ``RUN/audit``.

    Artefacts that no back end here can run get a row, and their verdict is that.

    Raises:
        RunError: an unknown name, a stale artefact, or a teacher that the generator was not distilled from.
        LabelError: no forget map, or judges of other classes.
        DigestError, ManifestError: any folder that is not whole.
        BackendError: a back end that is not installed.
    """
    generator = run.generator()
    labels = forget_labels(generator, forget or {})
    require_parent(generator, teacher)
    instruments = Instruments(policy, tuple(judges), teacher, device, open or open_runtime)
    instruments.require_fit(labels, run.name)
    subjects = run_subjects(run, generator, names)
    return _Audit(run.name, run.folder, Plan.of(policy, labels), instruments).carry_out(subjects, generator, names)


def audit_folder(
    sealed: Sealed, labels: Labels, home: Path, *, policy: Policy, judges: Sequence[Judge], teacher: Sealed,
    device: str = "auto", open: Opener | None = None,
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit one teacher or generator folder of no run, asking about ``labels``, into ``home/audit``.

    Raises:
        As ``audit_run``.
    """
    instruments = Instruments(policy, tuple(judges), teacher, device, open or open_runtime)
    instruments.require_fit(labels, sealed.name)
    return _Audit(sealed.name, home, Plan.of(policy, labels), instruments).carry_out(
        (Subject(sealed),), None, (sealed.name,)
    )


def audit_selection(
    selection: Selection, *, policy: Policy, judges: Sequence[Path] = (), teacher: Path | None = None,
    forget: Forget | None = None, device: str = "auto",
) -> tuple[AuditRecord, Sealed]:  # fmt: skip
    """Audit what a command line selected, with the teacher and judges it named or those the model implies.

    A folder of no run is audited into ``runs/audit-of-NAME``, so that it never replaces a run's evidence.

    Raises:
        As ``audit_run``.
    """
    if selection.run is not None:
        generator = selection.run.generator()
        labels = forget_labels(generator, forget or {})
        return audit_run(
            selection.run, policy=policy, judges=find_judges(labels.class_names, judges),
            teacher=find_teacher(generator, teacher), names=selection.names, forget=forget, device=device,
        )  # fmt: skip
    if selection.folder is None:
        raise ValueError("an empty selection")
    labels = forget_labels_of_folder(selection.folder, forget or {})
    return audit_folder(
        selection.folder, labels, RUNS / f"audit-of-{selection.folder.name}", policy=policy,
        judges=find_judges(labels.class_names, judges), teacher=find_teacher(selection.folder, teacher), device=device,
    )  # fmt: skip


@dataclass
class _Audit:
    """One audit under way. ``measured`` holds what is known already, by model bytes, back end and settings."""

    name: str
    home: Path
    plan: Plan
    instruments: Instruments
    measured: dict[str, tuple[str, Figures | str]] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=dict)

    def carry_out(
        self, subjects: Sequence[Subject], generator: Sealed | None, named: Sequence[str]
    ) -> tuple[AuditRecord, Sealed]:
        """Draw, judge, decide, seal."""
        yardstick = self._yardstick()
        parity = None
        if generator is not None and any(subject.kind == "artefact" for subject in subjects):
            parity = self._parity(generator, yardstick)
        rows = tuple(self._row(subject, yardstick, parity) for subject in subjects)
        tools = self.instruments
        record = AuditRecord(
            run=self.name, policy_name=tools.policy.name, policy_digest=tools.policy.digest,
            policy=tools.policy.resolved(), plan_digest=self.plan.digest, plan=self.plan.resolved(),
            judges=tuple(judge_card(judge, self.plan.labels, judge is tools.judges[0]) for judge in tools.judges),
            teacher=yardstick.teacher, artefacts=rows, exit_code=exit_code(rows, named),
        )  # fmt: skip
        sealed = [*(subject.sealed for subject in subjects), tools.teacher, *filter(None, [generator])]
        return record, self._seal(record, [folder.as_parent() for folder in sealed])

    def _yardstick(self) -> Yardstick:
        """The yardstick, from samples on disk or drawn now."""
        sealed, judges = self.instruments.teacher, self.instruments.judges
        sampler = SamplerConfig.from_mapping(sealed.facts["sampler"], str(sealed.folder))
        with closing(self._open(sealed)) as runtime:
            samples = teacher_reference(self.home / "reference", sealed, runtime, self.plan)
        require_finite(samples, sealed)
        self.pictures[YARDSTICK] = samples.pictures()
        real = judges[0].reference
        figures = teacher_figures(look(samples, judges), self.plan.labels, sealed, real, sampler.network_evaluations)
        return Yardstick(figures, real)

    def _parity(self, generator: Sealed, yardstick: Yardstick) -> Seen:
        """What artefacts must agree with: the PyTorch generator on their latents, audited itself or not."""
        subject = Subject(generator)
        with closing(self._open(generator)) as runtime:
            samples = draw(runtime, self.plan, self.plan.subject_cells, "audit generator")
            key = measured_key(subject, runtime)
        require_finite(samples, generator)
        seen = look(samples, self.instruments.judges)
        self.pictures[subject.name] = samples.pictures()
        self.measured[key] = (subject.name, self._figures(seen, yardstick, None))
        return seen

    def _row(self, subject: Subject, yardstick: Yardstick, parity: Seen | None) -> ArtefactRecord:
        try:
            runtime = self._open(subject.sealed)
        except NotRunnableHereError as error:
            return absent_row(subject, error)
        with closing(runtime):
            key = measured_key(subject, runtime)
            if key not in self.measured:
                self.measured[key] = (subject.name, self._measure(subject, runtime, yardstick, parity))
        owner, found = self.measured[key]
        self.pictures[subject.name] = self.pictures[owner]
        if isinstance(found, str):
            figures, judgement = None, Judgement("fail", (found,))
        else:
            figures = found
            judgement = judge(found, yardstick.teacher, self.plan.labels, self.instruments.policy, subject.precision)
        LOGGER.info("audit %s: %s %s", subject.name, judgement.verdict, "; ".join(judgement.reasons))
        return measured_row(subject, runtime, figures, judgement, twin="" if owner == subject.name else owner)

    def _measure(self, subject: Subject, runtime: Runtime, yardstick: Yardstick, parity: Seen | None) -> Figures | str:
        """Figures, or why there are none: an image with holes in it is a failure, not a number."""
        samples = draw(runtime, self.plan, self.plan.subject_cells, f"audit {subject.name}")
        self.pictures[subject.name] = samples.pictures()
        if samples.broken:
            return f"{samples.broken} of {len(samples.images)} images hold values that are not finite"
        return self._figures(look(samples, self.instruments.judges), yardstick, parity)

    def _figures(self, seen: Seen, yardstick: Yardstick, parity: Seen | None) -> Figures:
        return subject_figures(seen, self.plan, self.instruments.policy, yardstick, parity)

    def _open(self, sealed: Sealed) -> Runtime:
        return self.instruments.open(sealed, self.instruments.device)

    def _seal(self, record: AuditRecord, parents: Sequence[Parent]) -> Sealed:
        everything = [
            *parents,
            *(Parent(kind="judge", name=card["name"], digest=card["digest"]) for card in record.judges),
        ]
        unique = tuple({parent.digest: parent for parent in everything}.values())
        policy = self.instruments.policy
        target = self.home / "audit"
        facts = {"exit_code": record.exit_code, "verdicts": {row.name: row.verdict for row in record.artefacts}}
        with sealed_folder(
            target, "audit", parents=unique, config=policy.resolved(), seed=policy.seed, facts=facts
        ) as folder:
            write_json(folder / AUDIT_JSON, record.resolved())
            (folder / REPORT_HTML).write_text(render(record, self.pictures), encoding="utf-8")
        return verify(target, "audit")


def measured_key(subject: Subject, runtime: Runtime) -> str:
    """What decides a subject's images: the bytes of its model, the back end, its settings."""
    return canonical_json([subject.model_files, runtime.name, dict(runtime.settings)])


def require_finite(samples: Samples, sealed: Sealed) -> None:
    """Refuse a yardstick with holes in it.

    Raises:
        LimitError: naming the folder.
    """
    if samples.broken:
        raise LimitError(
            f"{sealed.folder}: {samples.broken} of {len(samples.images)} images hold values that are not finite",
            "train it again: nothing can be compared with these",
        )
