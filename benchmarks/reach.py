"""The race to a row: both schedules train in turns until their generators match the figures of a finished run.

Figures are looked at on the ``select`` stream, since when to stop is a choice; looks are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import page
from benchmarks.measured import Measured, Sizes, measure
from benchmarks.sides import SIDES, Side, Task
from sfd_deploy.embedded import judges_for
from sfd_deploy.labels import Labels
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.models.generator import OneStepGenerator, load_generator
from sfd_deploy.runs import Run
from sfd_deploy.runtime.pytorch import GeneratorRuntime

# How near counts as the same figures: about twice the standard error of a look.
FORGET_TOLERANCE = 0.005
RETAINED_TOLERANCE = 0.01
FRECHET_TOLERANCE = 0.1  # of the target's
LOOK = Sizes(forget=1000, override=1, retained=200, reference=200, teacher_forget=1)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Figures:
    """What must be matched."""

    forget_rate: float
    retained_accuracy: float
    frechet: float

    @classmethod
    def of(cls, found: Measured) -> Figures:
        """The three of a measured generator; the worst forget label's rate."""
        return cls(found.forget[found.worst].rate, found.retained_accuracy, found.frechet)

    def matches(self, target: Figures) -> bool:
        """Whether all three are the target's or better, within the tolerances."""
        return (
            self.forget_rate <= target.forget_rate + FORGET_TOLERANCE
            and self.retained_accuracy >= target.retained_accuracy - RETAINED_TOLERANCE
            and self.frechet <= target.frechet * (1 + FRECHET_TOLERANCE)
        )

    def __str__(self) -> str:
        return f"forget rate {self.forget_rate:.4f}, retained {self.retained_accuracy:.4f}, Fréchet {self.frechet:.3f}"


@dataclass
class Lap:
    """One side's training so far."""

    side: Side
    seconds: float = 0.0
    figures: list[Figures] = field(default_factory=list)
    arrived: bool = False


@dataclass(frozen=True)
class Race:
    """How far each side came, and how long it trained for that."""

    target: Figures
    laps: dict[str, Lap]

    @property
    def ratio(self) -> float:
        """The official schedule's time over ours: a lower bound if it never arrived."""
        return self.laps["official"].seconds / self.laps["ours"].seconds

    def missed(self, least: float) -> bool:
        """Whether ours did not arrive, or not fast enough."""
        return not self.laps["ours"].arrived or self.ratio < least


def race(
    task: Task, run: Path, judges: Sequence[Path], device: str, every: int, limit: int, say: Say,
    clock: Callable[[], float] = time.perf_counter,
) -> Race:  # fmt: skip
    """Train both sides ``every`` iterations at a turn, a look after each, until each matches or is at ``limit``."""
    opened = [open_judge(folder) for folder in judges or judges_for(task.labels.class_names)]
    target = _figures(load_generator(Run(run).generator()), task.labels, opened, device)
    say(f"target: {target}")
    laps = {name: Lap(task.side(name, device)) for name in SIDES}
    while running := [lap for lap in laps.values() if not lap.arrived and lap.side.step < limit]:
        for lap in running:
            began = clock()
            lap.side.go(min(every, limit - lap.side.step), device)
            lap.seconds += clock() - began
            lap.figures.append(_figures(lap.side.generator, task.labels, opened, device))
            lap.arrived = lap.figures[-1].matches(target)
            say(f"{_name(laps, lap)}, iteration {lap.side.step}, {lap.seconds:.0f} s: {lap.figures[-1]}")
    return Race(target, laps)


def _name(laps: dict[str, Lap], lap: Lap) -> str:
    return next(name for name, other in laps.items() if other is lap)


def _figures(generator: OneStepGenerator, labels: Labels, judges: Sequence[Judge], device: str) -> Figures:
    runtime = GeneratorRuntime(generator, device)
    return Figures.of(measure(runtime, sorted(labels.forget), labels.retained, judges, LOOK, 0.0, "select"))


def text(found: Race, least: float) -> str:
    """The race as a table, and the ratio."""
    rows = [["target", "", "", *_cells(found.target)]]
    for name, lap in found.laps.items():
        when = str(lap.side.step) if lap.arrived else f"not within {lap.side.step}"
        rows.append([name, when, f"{lap.seconds:.0f}", *_cells(lap.figures[-1])])
    columns = ("schedule", "iterations", "seconds", "forget rate, %", "retained accuracy, %", "Fréchet")
    beyond = "" if found.laps["official"].arrived else "at least "
    return "\n".join([
        page.table(columns, rows),
        "",
        f"- The official schedule takes {beyond}{found.ratio:.2f} times our time. Criterion: at least {least}.",
        f"- Reached: forget rate within {100 * FORGET_TOLERANCE:g} and retained accuracy within "
        f"{100 * RETAINED_TOLERANCE:g} points of the target, Fréchet within {100 * FRECHET_TOLERANCE:g} %, or better, "
        f"on the `select` stream, {LOOK.forget} images of the forget label and {LOOK.retained} of each other.",
    ])  # fmt: skip


def _cells(figures: Figures) -> list[str]:
    return [
        f"{100 * figures.forget_rate:.2f}", f"{100 * figures.retained_accuracy:.2f}", f"{figures.frechet:.3f}"
    ]  # fmt: skip
