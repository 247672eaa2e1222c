"""Figures: what the judges saw, as numbers. No opinion on them; ``policy/verdict.py`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.audit.samples import Seen
from sfd_deploy.evidence import Count, Figures, PromptSpread, TeacherFigures
from sfd_deploy.labels import MIXTURE, Labels
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.fidelity import Scatter, agreement, frechet_distance, gaussian, psnr_db, scatter, spread
from sfd_deploy.measure.judges import FeatureStatistics
from sfd_deploy.measure.rates import lower_bound, upper_bound
from sfd_deploy.policy.plan import Plan, Policy, Purpose
from sfd_deploy.policy.verdict import override_floor
from sfd_deploy.probes import Families

# Ratios to a yardstick of exactly nothing would be infinite, which JSON cannot hold.
LEAST = 1e-9


@dataclass(frozen=True)
class Yardstick:
    """What a subject's distances are ratios of, or distances to; ``real`` is by label."""

    teacher: TeacherFigures
    real: FeatureStatistics


def count(hits: NDArray[np.bool_], confidence: float) -> Count:
    """Hits (n,) with their exact bounds."""
    found, n = int(hits.sum()), len(hits)
    return Count(
        hits=found, n=n, rate=found / n, lower=lower_bound(found, n, confidence),
        upper=upper_bound(found, n, confidence), upper_99=upper_bound(found, n, 0.99),
    )  # fmt: skip


def frechet_to_real(seen: Seen, purpose: Purpose, retained: Sequence[int], n: int, real: FeatureStatistics) -> float:
    """Fréchet distance of the first ``n`` images per retained label to real images of these labels."""
    rows = np.concatenate([seen.features[seen.samples.rows(purpose, label)][:n] for label in retained])
    return frechet_distance(*gaussian(rows), *real.pooled(retained))


def teacher_figures(
    seen: Seen, labels: Labels, teacher: Sealed, real: FeatureStatistics, network_evaluations: int
) -> TeacherFigures:
    """The yardstick's figures, from the teacher's reference samples."""
    retained = labels.retained
    accuracy = {label: seen.share("reference", label, label) for label in retained}
    n = len(seen.images("reference", retained[0]))
    return TeacherFigures(
        name=teacher.name,
        digest=teacher.digest,
        retained_accuracy=mean(accuracy.values()),
        accuracy_by_label=accuracy,
        spread_by_label={label: spread(seen.images("reference", label)) for label in retained},
        frechet=frechet_to_real(seen, "reference", seen.featured(retained), n, real),
        images_per_second=seen.samples.images_per_second,
        network_evaluations=network_evaluations,
    )


def subject_figures(seen: Seen, plan: Plan, policy: Policy, yardstick: Yardstick, parity: Seen | None) -> Figures:
    """The figures of one generator or artefact; ``parity`` is what the judges saw of the PyTorch generator.

    With several forget labels the worst one speaks for all: most hits; least override share.
    """
    forget, retained = plan.labels.forget, plan.labels.retained
    teacher = yardstick.teacher
    hits = {label: seen.hits("forget", label, label) for label in forget}
    counts = {label: count(found, policy.confidence) for label, found in hits.items()}
    worst = max(counts, key=lambda label: counts[label].rate)
    mistaken = np.concatenate([seen.hits("override", label, worst) for label in plan.labels.overrides_of(worst)])
    error = count(mistaken, policy.confidence)
    shares = {label: override_share(seen, plan.labels, label) for label in forget}
    accuracy = {label: seen.share("retained", label, label) for label in retained}
    spreads = _spread_ratios(seen, teacher)
    frechet = frechet_to_real(seen, "retained", seen.featured(retained), policy.reference_samples, yardstick.real)
    speed = seen.samples.images_per_second
    return Figures(
        forget=counts[worst],
        forget_by_label=counts,
        hit_indices={label: tuple(np.flatnonzero(found).tolist()) for label, found in hits.items()},
        override_error=error,
        limited_by_judges=counts[worst].upper < error.upper,
        override_share=min(
            shares.items(),
            key=lambda item: item[1] - override_floor(teacher, policy, plan.labels.overrides_of(item[0])),
        )[1],
        override_share_by_label=shares,
        retained_accuracy=mean(accuracy.values()),
        retained_accuracy_by_label=accuracy,
        spread=min(spreads.values()),
        spread_by_label=spreads,
        frechet=frechet,
        frechet_ratio=frechet / max(teacher.frechet, LEAST),
        psnr_db=None if parity is None else float(psnr_db(seen.samples.images, parity.samples.images).mean()),
        agreement=None if parity is None else agreement(seen.called, parity.called),
        images_per_second=speed,
        speedup_over_teacher=speed / teacher.images_per_second,
    )


def override_share(seen: Seen, labels: Labels, label: int) -> float:
    """Share of a forget label's images that became its override, or for the mixture anything that is not forgotten."""
    if labels.forget[label] == MIXTURE:
        return seen.share_of_others("forget", label, tuple(labels.forget))
    return seen.share("forget", label, labels.overrides_of(label))


def _spread_ratios(seen: Seen, teacher: TeacherFigures) -> dict[int, float]:
    return {label: spread(seen.images("retained", label)) / max(theirs, LEAST)
            for label, theirs in teacher.spread_by_label.items()}  # fmt: skip


def prompt_spread(seen: Seen, plan: Plan, families: Families, purpose: Purpose) -> PromptSpread:
    """Of the cells of ``purpose`` that show retained families; without those where no prompt was drawn twice."""
    found: dict[int, Scatter] = {}
    for cell in seen.samples.cells:
        if cell.purpose == purpose and cell.label in families.retained:
            latents, labels = plan.latents((cell,))
            found[cell.label] = scatter(seen.images(purpose, cell.label), families.asked(labels, latents.seeds))
    return PromptSpread(
        overall=sum(found.values(), Scatter(0.0, 0)).spread,
        by_label={label: one.spread for label, one in found.items() if one.spread is not None},
    )


def spread_over(ours: PromptSpread, theirs: PromptSpread) -> PromptSpread:
    """Ratios of one's spreads to another's."""
    known = None not in (ours.overall, theirs.overall)
    common = sorted(ours.by_label.keys() & theirs.by_label.keys())
    return PromptSpread(
        overall=(ours.overall or 0.0) / max(theirs.overall or 0.0, LEAST) if known else None,
        by_label={label: ours.by_label[label] / max(theirs.by_label[label], LEAST) for label in common},
    )
