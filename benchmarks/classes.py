"""Forget each class in turn, several at once, and one after another: ``python -m benchmarks.classes``.

Every run has the preset's length. Overrides are not picked by hand: see ``override_for``. Resumable as
``benchmarks.rows`` is. Also draws the picture asked for × drawn, one row a run that forgot one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import expect, page
from benchmarks.ledger import Ledger
from benchmarks.measured import Looked, Measured, Sizes, look_at, measure
from benchmarks.rows import images_folder
from benchmarks.workshop import Workshop
from sfd_deploy.errors import OK
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import either_matrix
from sfd_deploy.pictures import grid, save_png
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime
from sfd_deploy.runtime.seam import Runtime, to_uint8

SIZES = Sizes(forget=2000, override=2000, retained=200, reference=200, teacher_forget=1)
COLUMNS = (
    "forgotten → override", "hits", "forget rate, %", "99 % bound, %", "judges' own error, %", "retained accuracy, %",
    "minutes",
)  # fmt: skip
SEED = 0


def override_for(label: int, forgotten: Sequence[int], matrix: NDArray[np.float64]) -> int:
    """The override of ``label``: the class that is mistaken for it least.

    ``matrix`` (K, K) is the share of real held-out images of the row's class that either judge calls the column's.
    Least in the forget label's column; of equals the one the forget label itself is called least, then the first.
    """
    others = [other for other in range(len(matrix)) if other not in {label, *forgotten}]
    return min(others, key=lambda other: (matrix[other, label], matrix[label, other], other))


@dataclass(frozen=True)
class Task:
    """One run: what it forgets, and the task whose run it goes on from."""

    name: str
    forget: dict[int, int]
    after: Task | None = None

    @property
    def all_forgotten(self) -> dict[int, int]:
        """What its generator has forgotten, earlier labels included."""
        return (self.after.all_forgotten if self.after else {}) | self.forget


def tasks_for(matrix: NDArray[np.float64]) -> list[Task]:
    """Each class by itself, the first two and the first three at once, and the second after the first."""
    count = len(matrix)
    single = [Task(f"class-{label}", {label: override_for(label, (), matrix)}) for label in range(count)]
    several = [
        Task(name, {label: override_for(label, range(n), matrix) for label in range(n)})
        for name, n in (("two-at-once", 2), ("three-at-once", 3))
    ]
    # The second's override must not be what was forgotten, nor the second what stands for the first.
    first = Task("first-of-two", {0: override_for(0, (0, 1), matrix)})
    first = single[0] if single[0].forget == first.forget else first
    second = Task("one-after-the-other", {1: override_for(1, (0, 1), matrix)}, after=first)
    return [*single, *several, second]


@dataclass
class Classes:
    """Makes, measures and draws the tasks; what the ledger holds is not made again."""

    workshop: Workshop
    ledger: Ledger
    sizes: Sizes

    def run(self, task: Task) -> Run:
        """A task's run, and first the one it goes on from."""
        changes: dict[str, Any] = {"forget": {str(label): str(override) for label, override in task.forget.items()}}
        if task.after is not None:
            changes["init_from"] = str(self.run(task.after).folder)
        return self.workshop.generator(task.name, SEED, self.workshop.teacher(SEED), **changes)

    def measured(self, task: Task) -> Measured:
        """A task's figures."""
        return self.ledger.result(task.name, Measured, lambda: self._measure(task))

    def _measure(self, task: Task) -> Measured:
        sealed, shop = self.run(task).generator(), self.workshop
        forgotten = sorted(task.all_forgotten)
        retained = [label for label in range(shop.labels.count) if label not in forgotten]
        seconds = shop.seconds(SEED, *(part.name for part in _line(task)))
        with closing(self._open(sealed)) as runtime:
            return measure(runtime, forgotten, retained, shop.judges, self.sizes, seconds)

    def judges_error(self, override: int) -> Looked:
        """What the judges call the teacher's own samples of a label."""

        def draw_and_look() -> Looked:
            with closing(self._open(self.workshop.teacher(SEED))) as runtime:
                return look_at(runtime, "override", override, self.sizes.override, self.workshop.judges)

        return self.ledger.result(f"override-{override}", Looked, draw_and_look)

    def _open(self, sealed: Sealed) -> Runtime:
        return open_runtime(sealed, self.workshop.device)

    def rows(self, task: Task) -> list[list[str]]:
        """A table row for each label that the task's generator has forgotten."""
        found = self.measured(task)
        return [self._row(task, found, label, override) for label, override in task.all_forgotten.items()]

    def _row(self, task: Task, found: Measured, label: int, override: int) -> list[str]:
        names, count = self.workshop.labels.class_names, found.forget[label]
        return [
            f"{names[label]} → {names[override]}{'' if task.name.startswith('class-') else f' ({task.name})'}",
            f"{count.hits} of {count.n:,}",
            f"{100 * count.rate:.2f}",
            f"{100 * count.upper_99:.2f}",
            f"{100 * self.judges_error(override).counted(label).rate:.2f}",
            f"{100 * found.retained_accuracy:.2f}",
            f"{found.seconds / 60:.1f}",
        ]

    def picture(self, tasks: Sequence[Task]) -> Image.Image:
        """One row a task, one column a label asked for, the same latents in every row."""
        labels = np.arange(self.workshop.labels.count, dtype=np.int64)
        latents = Latents.of_stream("sample", 0, 0, len(labels))
        rows = []
        for task in tasks:
            with closing(self._open(self.run(task).generator())) as runtime:
                rows.append(to_uint8(runtime.draw(latents, labels)))
        return grid(np.concatenate(rows), len(labels), gap=2, scale=2)

    def work(self, tasks: Sequence[Task]) -> expect.Work:
        """What is left to do."""
        missing = [task for task in tasks if self.ledger.find(task.name, Measured) is None]
        missing += [task.after for task in missing if task.after is not None and task.after not in tasks]
        sizes, count = self.sizes, self.workshop.labels.count
        drawn = sum(len(task.all_forgotten) * sizes.forget + count * sizes.retained for task in missing)
        overrides = {override for task in tasks for override in task.all_forgotten.values()}
        unseen = [label for label in overrides if self.ledger.find(f"override-{label}", Looked) is None]
        iterations = len(missing) * self.workshop.train_config.iterations
        return expect.Work(iterations, 0, drawn, len(unseen) * sizes.override)


def _line(task: Task) -> list[Task]:
    return [*(_line(task.after) if task.after else []), task]


def text(classes: Classes, tasks: Sequence[Task], origin: str) -> str:
    """The table of all tasks, and what stands below it."""
    sizes = classes.sizes
    return "\n".join([
        page.table(COLUMNS, [row for task in tasks for row in classes.rows(task)]),
        "",
        "- The override is the class whose real held-out images either judge calls the forget label least often; of "
        "equals the one that forget images are called least, then the first.",
        f"- {classes.workshop.train_config.iterations} iterations a run, seed {SEED}; minutes of a second run include "
        f"the first. Judges' own error: {sizes.override:,} samples of the override label that the teacher drew. "
        f"Retained accuracy: {sizes.retained} images a label. `audit` stream.",
        f"- {origin}.",
    ])  # fmt: skip


@click.command(epilog="Example: python -m benchmarks.classes --threads 2")
@click.option("--data", type=click.Choice(["fashion-mnist", "digits"]), default="fashion-mnist", show_default=True)
@click.option("--images", type=click.Path(path_type=Path), help="Where a teacher must be trained: its images.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: runs/classes/<data>]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.")
@click.option("--picture", type=click.Path(path_type=Path), default=Path("docs/classes.png"), show_default=True)
@click.option("--page", "into", type=click.Path(path_type=Path), help="Also put the table into this page.")
@click.option("--estimate-only", is_flag=True, help="Say how long it will take, and stop.")
def command(
    data: str, images: Path | None, output: Path | None, device: str, threads: int | None, picture: Path,
    into: Path | None, estimate_only: bool,
) -> int:  # fmt: skip
    """Forget each class in turn, several at once, one after another; run again to go on."""
    import torch

    from sfd_deploy.runtime.pytorch import torch_device

    where = torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    home = output or Path("runs") / "classes" / data
    classes = open_classes(data, home, images_folder(data, images), SIZES, where)
    tasks = tasks_for(either_matrix(classes.workshop.judges))
    work = classes.work(tasks)
    minutes = work.seconds(expect.costs(classes.workshop, False)) / 60 if work != expect.Work() else 0.0
    click.echo(f"expected: about {minutes:.0f} minutes for what is missing in {home}", err=True)
    if estimate_only:
        return OK
    for task in tasks:
        click.echo(f"{task.name}: {classes.rows(task)}", err=True)
    line = f"python -m benchmarks.classes --data {data}{page.device_flag(where)}"
    origin = f"`{line}`; {page.computed_on(where)}"
    click.echo(table := text(classes, tasks, origin))
    save_png(classes.picture([task for task in tasks if task.name.startswith("class-")]), picture)
    if into is not None:
        page.fill(into, f"classes {data}", table)
    return OK


def open_classes(data: str, home: Path, images: Path, sizes: Sizes, device: str = "cpu") -> Classes:
    """The tasks' results below ``home``, bound to preset and sizes."""
    workshop = Workshop.of_preset(data, home, images, device)
    return Classes(workshop, Ledger(home / "results", workshop.settings | {"sizes": sizes.resolved()}), sizes)


if __name__ == "__main__":
    page.run(command)
