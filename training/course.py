"""The course of one training: resume, say how long, iterate, look, save, stop when asked, and what to export.

Everything around ``SfdLoop.iterate`` that a run of hours needs, and no mathematics.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sfd_deploy.errors import DivergedError
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.progress import LOGGER, progress_bar, stderr_console
from sfd_deploy.training.checkpoint import Checkpoint
from sfd_deploy.training.distributed import whole_state
from sfd_deploy.training.gaps import gap_figures
from sfd_deploy.training.interrupt import interrupt_between_steps
from sfd_deploy.training.loop import Pass, SfdLoop
from sfd_deploy.training.losses import gap_energy
from sfd_deploy.training.memory import saying_what_fits
from sfd_deploy.training.rating import Rating
from sfd_deploy.training.steps import LOWER_SFD_RATES, say_estimate
from sfd_deploy.training.tensorboard import Scalars

RECORD_EVERY = 10
MOST_RECORDS = 1000
# With more (prompts), figures are by part alone: a label is rarely twice in a batch.
MOST_FOLLOWED = 100
LAST_RULE = "the last step's average"
BEST_RULE = "the best look by a judge on the select stream: healthy first, then the forget rate's bound"


class Onlooker(Protocol):
    """What looks at the averaged generator now and then: ``Watch`` of class labels, or ``TextOnlooker``."""

    @property
    def rating(self) -> Rating | None:
        """What its looks are rated by, and which is the best; None: nobody judges."""

    def due(self, step: int, last: bool = False) -> bool:
        """Whether ``step`` is one to look at."""

    def look(self, step: int, generator: OneStepGenerator) -> dict[str, float]:
        """Look; returns figures."""


@dataclass
class Course:
    """One training, from wherever its checkpoint is to its end.

    Args:
        loop: the networks, as they start.
        file: the checkpoint.
        identity: what the checkpoint belongs to besides the config, such as the teacher's digest.
        watch: looks at the averaged generator; None for none.
        scalars: makes the TensorBoard writer for a first step; None for none.
        bounded: whether images lie in [-1, 1]; latents do not.

    Raises:
        ConfigError, ManifestError: the checkpoint is of another config, or damaged.
    """

    loop: SfdLoop
    file: Path
    identity: dict[str, Any] = field(default_factory=dict)
    watch: Onlooker | None = None
    scalars: Callable[[int], Scalars] | None = None
    bounded: bool = True
    record: list[dict[str, float]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        loop = self.loop
        networks = {"generator": loop.generator, "fake_score": loop.fake_score, "ema": loop.ema.network}
        self.best: OneStepGenerator | None = None
        self.rating = None if self.watch is None else self.watch.rating
        if self.rating is not None:
            self.best = copy.deepcopy(loop.averaged())
            networks["best"] = self.best
        self.checkpoint = Checkpoint(
            self.file, networks, {"generator_adam": loop.generator_adam, "fake_score_adam": loop.fake_score_adam},
            {**loop.config.bound(), "labels": loop.labels.resolved(), **self.identity}, loop.workers.is_main,
        )  # fmt: skip
        total = loop.config.iterations
        self.record_every = max(RECORD_EVERY, total // MOST_RECORDS)
        self._restore()

    def run(self) -> OneStepGenerator:
        """Train to the end; returns the generator to export.

        Raises:
            DivergedError: gradients stayed non-finite, or were in most steps.
            MemoryLimitError: the batch does not fit, with the one that would; the last checkpoint is kept.
            KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
        """
        with saying_what_fits(self.loop):
            self._estimate()
            self._iterate_to_the_end()
        self._require_taken()
        if self.loop.workers.is_main:
            self._say_doubts()
        averaged = self.loop.averaged()  # every process takes part in gathering it, and looks are in one alone
        looked = self.rating is not None and self.rating.best is not None
        return self.best if self.best is not None and looked else averaged

    @property
    def _skips(self) -> str:
        return f"{self.loop.skipped} of {2 * self.loop.config.iterations} steps skipped: non-finite gradients"

    def _require_taken(self) -> None:
        """Most steps were taken: a training may be too short for as many skips in a row as stop it."""
        if self.loop.skipped > self.loop.config.iterations:
            raise DivergedError(f"training diverged: {self._skips}", LOWER_SFD_RATES)

    def _say_doubts(self) -> None:
        doubts = [self._skips] if self.loop.skipped else []
        if self.rating is not None and self.rating.doubt:
            doubts.append(self.rating.doubt)
        for doubt in doubts:
            LOGGER.warning("train: %s", doubt)
            stderr_console().print(f"train: {doubt}", highlight=False)

    @property
    def exported(self) -> dict[str, Any]:
        """Which step's weights are exported, and by what rule."""
        best = None if self.rating is None else self.rating.best
        if best is None:
            return {"step": self.step, "rule": LAST_RULE}
        return {"step": best.step, "rule": BEST_RULE}

    def _iterate_to_the_end(self) -> None:
        total = self.loop.config.iterations
        began, first = time.monotonic(), self.step
        scalars = Scalars(self.file.parent, enabled=False) if self.scalars is None else self.scalars(self.step)
        with progress_bar("train", total, self.step) as advance, interrupt_between_steps() as asked, scalars:
            gap = ""
            while self.step < total:
                last = self.step + 1 == total
                recorded = last or (self.step + 1) % self.record_every == 0
                fake, theta = self.loop.iterate(self.step, watched=recorded)
                self.step += 1
                figures = self._figures(fake, theta) if recorded else {}
                looks = self._look(last)
                gap = f"gap {figures['gap_retained']:.4f}, " if figures else gap
                rate = (self.step - first) / (time.monotonic() - began)
                advance(1, f"{gap}{rate:.2f} it/s")
                if (figures or looks) and self.loop.workers.is_main:
                    scalars.write(self.step, figures | looks)
                stop = self.loop.workers.any_of(asked())[0]
                if last or stop or self.step % self.loop.config.checkpoint_every == 0:
                    self._save()
                if stop and not last:
                    raise KeyboardInterrupt

    def _restore(self) -> None:
        self.step, notes = self.checkpoint.restore()
        self.record, self.loop.skipped = notes.get("record", []), notes.get("skipped", 0)
        self.loop.skips_in_a_row |= notes.get("skips_in_a_row", {})
        if self.rating is not None:
            self.rating.restore(notes.get("watch", {}))

    def _save(self) -> None:
        notes = {"record": self.record, "skipped": self.loop.skipped, "skips_in_a_row": self.loop.skips_in_a_row}
        if self.rating is not None:
            notes["watch"] = self.rating.state()
        self.checkpoint.save(self.step, notes)

    def _estimate(self) -> None:
        loop, left = self.loop, self.loop.config.iterations - self.step
        counts = loop.skipped, dict(loop.skips_in_a_row)
        say_estimate(
            "train", loop.iterate, left, [loop.generator, loop.fake_score, loop.ema.network],
            [loop.generator_adam, loop.fake_score_adam], str(loop.workers.device), aloud=loop.workers.is_main,
        )  # fmt: skip
        # The probes' own skips are not the training's.
        loop.skipped, loop.skips_in_a_row = counts

    def _figures(self, fake: Sequence[Pass], theta: Sequence[Pass]) -> dict[str, float]:
        """Figures of an iteration over all processes; the few that tell its course go into the record."""
        ours = {name: self._all(theta, name) for name in ("sigma", "x", "x_phi", "x_psi", "loss")}
        labels, forgotten = (
            self.loop.workers.together(torch.cat([getattr(part.rows, name) for part in theta]))
            for name in ("labels", "forgotten")
        )
        size = ours["x"][0].numel()
        energy = gap_energy(ours["x_phi"], ours["x_psi"])
        course = {
            "fake_score_loss": self._all(fake, "loss").mean().item() / size,
            "generator_loss": ours["loss"].mean().item() / size,
            "gap_retained": energy[~forgotten].mean().item(),
        }
        if bool(forgotten.any()):
            course["gap_forget"] = energy[forgotten].mean().item()
        self.record.append({"step": self.step, **course})
        LOGGER.info("train %s", self.record[-1])
        conditions = self.loop.labels
        gaps = gap_figures(
            labels, forgotten, ours["sigma"], ours["x"], ours["x_phi"], ours["x_psi"],
            by_label=len(conditions.retained) + len(conditions.forget) <= MOST_FOLLOWED, bounded=self.bounded,
        )  # fmt: skip
        return course | gaps | self.loop.gradient_figures

    def _all(self, passes: Sequence[Pass], name: str) -> Tensor:
        return self.loop.workers.together(torch.cat([getattr(part, name) for part in passes]))

    def _look(self, last: bool) -> dict[str, float]:
        if self.watch is None or not self.watch.due(self.step, last):
            return {}
        generator = self.loop.averaged()  # every process takes part in gathering it, one looks
        if not self.loop.workers.is_main:
            return {}
        figures = self.watch.look(self.step, generator)
        best = None if self.rating is None else self.rating.best
        if self.best is not None and best is not None and best.step == self.step:
            self.best.load_state_dict(whole_state(generator))
        LOGGER.info("look at step %d %s", self.step, figures)
        return figures
