"""The table of methods as Markdown, and what it must show: two differences with their intervals. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks import page
from benchmarks.intervals import Difference, of_rates, over_samples, over_seeds
from benchmarks.measured import Looked, Measured, Sizes, spread_ratio
from sfd_deploy.labels import Labels
from sfd_deploy.policy.verdict import ROUNDING

TITLES = {
    "teacher": "teacher", "distilled": "distilled only", "sfd": "**SFD**", "two-stage": "SFD two-stage",
    "remap": "label remap", "retrained": "retrained",
}  # fmt: skip
COLUMNS = (
    "row", "seeds", "forget rate, %", "99 % bound, %", "judges' own error, %", "retained accuracy, %", "spread",
    "Fréchet", "minutes",
)  # fmt: skip
MAX_RETAINED_LOSS = 0.01
MAX_FORGET_EXCESS = 0.005


@dataclass(frozen=True)
class Facts:
    """All that the table is made of: rows by name and seed, and by teacher its row and the judges' error.

    ``teacher_of`` maps seeds to teachers; ``errors`` are what the judges call a teacher's samples of the override
    label, by teacher and forget label.
    """

    labels: Labels
    sizes: Sizes
    rows: Mapping[str, Mapping[int, Measured]]
    teacher_of: Mapping[int, int]
    errors: Mapping[int, Mapping[int, Looked]]
    shipped: bool

    def teacher(self, seed: int) -> Measured:
        """The teacher row that a seed's rows compare with."""
        return self.rows["teacher"][self.teacher_of[seed]]

    def error_rate(self, seed: int, label: int) -> float:
        """How often either judge calls a seed's teacher's samples of the override label the forget label."""
        return self.errors[self.teacher_of[seed]][label].counted(label).rate


def report(facts: Facts) -> str:
    """The table."""
    return page.table(COLUMNS, [_cells(facts, name, seeds) for name, seeds in facts.rows.items()])


def _cells(facts: Facts, name: str, seeds: Mapping[int, Measured]) -> list[str]:
    results = list(seeds.values())
    counts = [result.forget[result.worst] for result in results]
    errors = [facts.error_rate(seed, result.worst) for seed, result in seeds.items()]
    ratios = [spread_ratio(result, facts.teacher(seed)) for seed, result in seeds.items()]
    minutes = page.mean_sd([result.seconds / 60 for result in results], 1)
    return [
        TITLES[name],
        str(len(results)),
        f"{page.mean_sd([found.rate for found in counts], 2, 100)} (n = {counts[0].n:,})",
        f"{100 * max(found.upper_99 for found in counts):.2f}",
        page.mean_sd(errors, 2, 100),
        page.mean_sd([result.retained_accuracy for result in results], 2, 100),
        page.mean_sd(ratios, 2),
        page.mean_sd([result.frechet for result in results], 3),
        "shipped" if name == "teacher" and facts.shipped else minutes,
    ]


@dataclass(frozen=True)
class Criteria:
    """The two comparisons below the table; None where their rows are missing."""

    retained_seeds: Difference | None
    retained_samples: Difference | None
    excess: Difference | None

    @property
    def missed(self) -> list[str]:
        """What was missed, in words."""
        missed = []
        if self.retained_seeds is not None and self.retained_seeds.value < -MAX_RETAINED_LOSS - ROUNDING:
            missed.append(f"SFD loses more than {100 * MAX_RETAINED_LOSS:g} point of retained accuracy")
        if self.excess is not None and self.excess.value > MAX_FORGET_EXCESS + ROUNDING:
            missed.append(f"SFD's forget rate is more than {100 * MAX_FORGET_EXCESS:g} points above the judges' error")
        return missed


def criteria(facts: Facts) -> Criteria:
    """Compare SFD with plain distillation, seed by seed on the same latents, and with the judges' own error."""
    sfd, plain = facts.rows.get("sfd", {}), facts.rows.get("distilled", {})
    excess = _excess(facts, sfd) if sfd else None
    if not (both := sorted(sfd.keys() & plain.keys())):
        return Criteria(None, None, excess)
    each = [sfd[seed].retained_accuracy - plain[seed].retained_accuracy for seed in both]
    return Criteria(over_seeds(each), over_samples(np.stack([_pairs(sfd[seed], plain[seed]) for seed in both])), excess)


def _pairs(one: Measured, other: Measured) -> NDArray[np.float64]:
    return np.stack([one.right(label) - other.right(label) for label in one.retained])  # (labels, n)


def _excess(facts: Facts, sfd: Mapping[int, Measured]) -> Difference:
    """Forget rate minus the judges' error, pooled over seeds; of several forget labels the worst difference."""
    found = []
    for label in facts.labels.forget:
        counts = [result.forget[label] for result in sfd.values()]
        # A teacher that several seeds share was looked at once: its images count once.
        errors = [facts.errors[teacher][label].counted(label) for teacher in {facts.teacher_of[seed] for seed in sfd}]
        found.append(of_rates(
            sum(count.hits for count in counts), sum(count.n for count in counts),
            sum(error.hits for error in errors), sum(error.n for error in errors),
        ))  # fmt: skip
    return max(found, key=lambda difference: difference.value)


def text(facts: Facts, verdict: Criteria, origin: str) -> str:
    """The table with what stands below it: criteria and their intervals, definitions, where it came from."""
    lines = [*_criteria_lines(verdict), *(f"- **Missed:** {what}." for what in verdict.missed)]
    names = facts.labels.class_names
    forget = ", ".join(f"{names[label]} → {facts.labels.override_name(label)}" for label in facts.labels.forget)
    lines.append(
        f"- Forget → override: {forget}. A hit is what either judge calls the forget label; the bound is exact, "
        f"one-sided, of the worst seed. Judges' own error: the same on {facts.sizes.override:,} samples of the "
        "override label that the teacher drew. Spread: the least label's, over the teacher's. Fréchet: to real "
        f"held-out images, {facts.sizes.reference} samples a label. Minutes: trainings after the teacher's, and for "
        "the retrained row its own teacher's. `audit` stream, the same latents in every row and seed; ± is one "
        "standard deviation over seeds."
    )
    return "\n".join([report(facts), "", *lines, f"- {origin}."])


def _criteria_lines(verdict: Criteria) -> list[str]:
    lines = []
    if verdict.retained_seeds is not None:
        lines.append(
            f"- Retained accuracy, SFD minus distilled only: {verdict.retained_seeds} over seeds (95 %, Student's t, "
            f"paired by seed); {verdict.retained_samples} over images (95 %, normal, paired by latent, these seeds "
            f"given). Criterion: a loss of at most {100 * MAX_RETAINED_LOSS:g} point."
        )
    if verdict.excess is not None:
        lines.append(
            f"- SFD's forget rate minus the judges' own error: {verdict.excess} (95 %, Newcombe 1998, seeds pooled). "
            f"Criterion: at most {100 * MAX_FORGET_EXCESS:g} points."
        )
    return lines or ["- Criteria: not measured, their rows are missing."]
