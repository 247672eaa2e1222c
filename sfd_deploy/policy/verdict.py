"""The verdict rule, and the exit code of a whole audit. Pure: figures and a policy in, an opinion out.

- ``pass``: the forget rate's upper bound is within the limit, and every other criterion is met.
- ``fail``: its lower bound is beyond the limit, or another criterion is missed.
- ``inconclusive``: neither; more samples would tell.

Several forget labels: each must be within the limit, so a pass needs no correction for their number
(an intersection-union test keeps the level of its parts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from sfd_deploy.errors import FAILED, INCONCLUSIVE, OK
from sfd_deploy.evidence import (
    ArtefactRecord,
    FamilyFigures,
    Figures,
    GuidedTeacherFigures,
    TeacherFigures,
    Verdict,
)
from sfd_deploy.labels import MIXTURE, Labels
from sfd_deploy.policy.plan import Policy
from sfd_deploy.probes import Families

# 0.83 - 0.03 is below 0.80 in floating point; a limit met exactly is met.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Judgement:
    """A verdict and, unless it is pass, each reason in one plain sentence."""

    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Shortfall:
    """A criterion (the name of its figure) that is missed, or that the samples do not settle, and why."""

    criterion: str
    verdict: Verdict
    reason: str


def judge(figures: Figures, teacher: TeacherFigures, labels: Labels, policy: Policy, precision: str) -> Judgement:
    """The verdict on one artefact's figures."""
    found = shortfalls(figures, teacher, labels, policy, precision)
    verdicts = {shortfall.verdict for shortfall in found}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if found else "pass"
    return Judgement(verdict, tuple(shortfall.reason for shortfall in found))


def shortfalls(
    figures: Figures, teacher: TeacherFigures, labels: Labels, policy: Policy, precision: str
) -> tuple[Shortfall, ...]:
    """Everything that keeps an artefact from passing."""
    return (
        *_forget(figures, labels, policy),
        *_control(teacher, labels),
        *_quality(figures, teacher, policy),
        *_override(figures, teacher, labels, policy),
        *_parity(figures, policy, precision),
    )


def retained_floor(teacher: TeacherFigures, policy: Policy) -> float:
    """The least mean retained accuracy that passes."""
    return teacher.retained_accuracy - policy.max_retained_drop


def override_floor(teacher: TeacherFigures, policy: Policy, overrides: Sequence[int]) -> float:
    """The least share of forget images called one of ``overrides`` that passes: the teacher's accuracy less a gap."""
    return mean(teacher.accuracy_by_label[override] for override in overrides) - policy.max_override_gap


def _forget(figures: Figures, labels: Labels, policy: Policy) -> Iterator[Shortfall]:
    limit = policy.max_forget_rate
    for label, count in figures.forget_by_label.items():
        name = labels.class_names[label]
        if count.lower > limit:
            reason = f"{name}: the forget rate is at least {count.lower:.2%}, the limit is {limit:.2%}"
            yield Shortfall("forget", "fail", reason)
        elif count.upper > limit:
            yield Shortfall("forget", "inconclusive", (
                f"{name}: {count.hits} hits of {count.n} leave the forget rate between {count.lower:.2%} and "
                f"{count.upper:.2%}, on both sides of the limit of {limit:.2%}; more samples would tell"))  # fmt: skip


def _control(teacher: TeacherFigures, labels: Labels) -> Iterator[Shortfall]:
    """The training prompts, family 0: whether the judges see the concept where it is known to be."""
    if isinstance(labels, Families) and isinstance(teacher, GuidedTeacherFigures):
        seen = teacher.concept_by_label[0]
        if seen.lower < labels.control:
            yield Shortfall("control", "inconclusive", (
                f"judges see {labels.concept} in {seen.hits} of {seen.n} images that the teacher draws of the "
                f"{labels.class_names[0]}; the share must be {labels.control:.0%} for their not seeing it to mean "
                "anything"))  # fmt: skip


def _quality(figures: Figures, teacher: TeacherFigures, policy: Policy) -> Iterator[Shortfall]:
    floor = retained_floor(teacher, policy)
    if figures.retained_accuracy < floor - ROUNDING:
        yield Shortfall("retained_accuracy", "fail", (
            f"retained accuracy is {figures.retained_accuracy:.3f}, at least {floor:.3f} is wanted "
            f"(the teacher's {teacher.retained_accuracy:.3f} less {policy.max_retained_drop:g})"))  # fmt: skip
    if figures.spread < policy.min_spread - ROUNDING:
        yield Shortfall("spread", "fail", (
            f"spread within a class is {figures.spread:.2f} of the teacher's, "
            f"at least {policy.min_spread:g} is wanted"))  # fmt: skip
    if isinstance(figures, FamilyFigures):
        yield from _within_prompts(figures.prompt_spread.overall, policy.min_prompt_spread)
    if figures.frechet_ratio > policy.max_frechet_ratio + ROUNDING:
        yield Shortfall("frechet", "fail", (
            f"Fréchet distance is {figures.frechet_ratio:.2f} times the teacher's, "
            f"at most {policy.max_frechet_ratio:g} is wanted"))  # fmt: skip


def _within_prompts(spread: float | None, least: float) -> Iterator[Shortfall]:
    if spread is None and least > 0:
        yield Shortfall("prompt_spread", "inconclusive", (
            "no kept prompt was drawn twice, so how far two images of one prompt are apart is unknown; more "
            "retained_samples and reference_samples would tell"))  # fmt: skip
    elif spread is not None and spread < least - ROUNDING:
        yield Shortfall("prompt_spread", "fail", (
            f"two images of one prompt are {spread:.2f} times as far apart as the teacher's, "
            f"at least {least:g} is wanted"))  # fmt: skip


def _override(figures: Figures, teacher: TeacherFigures, labels: Labels, policy: Policy) -> Iterator[Shortfall]:
    for label, share in figures.override_share_by_label.items():
        if isinstance(labels, Families) and labels.forget[label] == MIXTURE:
            continue  # anything but the concept: the forget rate's own limit says more
        floor = override_floor(teacher, policy, labels.overrides_of(label))
        if share < floor - ROUNDING:
            yield Shortfall("override_share", "fail", (
                f"only {share:.1%} of {labels.class_names[label]} became {labels.override_name(label)}, at least "
                f"{floor:.1%} is wanted (the teacher's accuracy there less {policy.max_override_gap:g})"))  # fmt: skip


def _parity(figures: Figures, policy: Policy, precision: str) -> Iterator[Shortfall]:
    if figures.psnr_db is None or figures.agreement is None:
        return  # a model in PyTorch is the reference itself
    limit = policy.parity.of(precision)
    if figures.psnr_db < limit.min_psnr_db:
        yield Shortfall("psnr_db", "fail", (
            f"PSNR to the PyTorch generator is {figures.psnr_db:.1f} dB, "
            f"{precision} wants {limit.min_psnr_db:g}"))  # fmt: skip
    if figures.agreement < limit.min_agreement - ROUNDING:
        yield Shortfall("agreement", "fail", (
            f"judges agree with the PyTorch generator's images on {figures.agreement:.3f}, "
            f"{precision} wants {limit.min_agreement:g}"))  # fmt: skip


def exit_code(rows: Sequence[ArtefactRecord], named: Collection[str]) -> int:
    """The exit code of a whole audit: 1 a failure, 3 nothing proved, 0 all that ran passed.

    Rows that could not run here are neither good nor bad, unless somebody asked for them by name,
    or nothing that was compiled could run at all.
    """
    if any(row.verdict == "fail" for row in rows):
        return FAILED
    absent = [row for row in rows if row.verdict == "not-runnable-here"]
    compiled = [row for row in rows if row.kind == "artefact"] or list(rows)
    none_ran = all(row.verdict == "not-runnable-here" for row in compiled)
    if none_ran or any(row.name in named for row in absent) or any(row.verdict == "inconclusive" for row in rows):
        return INCONCLUSIVE
    return OK
