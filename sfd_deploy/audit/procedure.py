"""One audit under way: draw from every subject on the same latents, judge, measure, decide, seal the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sfd_deploy.audit.figures import Yardstick, count, prompt_spread, spread_over, subject_figures, teacher_figures
from sfd_deploy.audit.panel import Panel
from sfd_deploy.audit.reference import teacher_reference
from sfd_deploy.audit.report import YARDSTICK, Pictures, render
from sfd_deploy.audit.rows import absent_row, judge_card, measured_row
from sfd_deploy.audit.samples import Samples, Seen, draw
from sfd_deploy.audit.subjects import Subject
from sfd_deploy.errors import LimitError
from sfd_deploy.evidence import (
    AUDIT_JSON,
    REPORT_HTML,
    ArtefactRecord,
    AuditRecord,
    FamilyFigures,
    Figures,
    GuidedTeacherFigures,
)
from sfd_deploy.manifest import Parent, Sealed, canonical_json, verify
from sfd_deploy.measure.judges import require_sight
from sfd_deploy.policy.plan import Plan, Policy
from sfd_deploy.policy.verdict import Judgement, exit_code, judge
from sfd_deploy.probes import Families
from sfd_deploy.progress import LOGGER
from sfd_deploy.runs import sealed_folder, write_json
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.seam import Runtime

Opener = Callable[[Sealed, str], Runtime]


@dataclass(frozen=True)
class Instruments:
    """What every subject is measured with; an image of the teacher takes so many ``network_evaluations``."""

    policy: Policy
    panel: Panel
    teacher: Sealed
    network_evaluations: int
    device: str
    open: Opener


@dataclass
class Audit:
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
            judges=tuple(judge_card(tools.panel, row, self.plan.labels) for row in range(len(tools.panel.judges))),
            teacher=yardstick.teacher, artefacts=rows, exit_code=exit_code(rows, named),
        )  # fmt: skip
        sealed = [*(subject.sealed for subject in subjects), tools.teacher, *filter(None, [generator])]
        return record, self._seal(record, [folder.as_parent() for folder in sealed])

    def _yardstick(self) -> Yardstick:
        """The yardstick, from samples on disk or drawn now."""
        sealed, panel = self.instruments.teacher, self.instruments.panel
        with closing(self._open(sealed)) as runtime:
            require_sight(panel.judges, runtime.image_shape)
            samples = teacher_reference(self.home / "reference", sealed, runtime, self.plan)
            settings = dict(runtime.settings)
        require_finite(samples, sealed)
        self.pictures[YARDSTICK] = samples.pictures()
        evaluations = self.instruments.network_evaluations
        seen, labels = panel.look(samples), self.plan.labels
        figures = teacher_figures(seen, labels, sealed, panel.real, evaluations)
        if isinstance(labels, Families):
            confidence = self.instruments.policy.confidence
            shown = {label: count(seen.hits("control", label, label), confidence) for label in labels.forget}
            figures = GuidedTeacherFigures(
                **dict(figures), settings=settings, concept_by_label=shown,
                prompt_spread=prompt_spread(seen, self.plan, labels, "reference"),
            )  # fmt: skip
        return Yardstick(figures, panel.real)

    def _parity(self, generator: Sealed, yardstick: Yardstick) -> Seen:
        """What artefacts must agree with: the PyTorch generator on their latents, audited itself or not."""
        subject = Subject(generator)
        with closing(self._open(generator)) as runtime:
            samples = draw(runtime, self.plan, self.plan.subject_cells, "audit generator")
            key = measured_key(subject, runtime)
        require_finite(samples, generator)
        seen = self.instruments.panel.look(samples)
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
        return self._figures(self.instruments.panel.look(samples), yardstick, parity)

    def _figures(self, seen: Seen, yardstick: Yardstick, parity: Seen | None) -> Figures:
        figures = subject_figures(seen, self.plan, self.instruments.policy, yardstick, parity)
        labels, teacher = self.plan.labels, yardstick.teacher
        if not isinstance(labels, Families) or not isinstance(teacher, GuidedTeacherFigures):
            return figures
        panel = self.instruments.panel
        instead = {label: panel.called_most(seen, "forget", label) for label in labels.forget}
        spread = spread_over(prompt_spread(seen, self.plan, labels, "retained"), teacher.prompt_spread)
        return FamilyFigures(**dict(figures), drawn_instead=instead, prompt_spread=spread)

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
