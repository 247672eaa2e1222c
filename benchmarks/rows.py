"""The table of methods, one row each: ``python -m benchmarks.rows --data digits --seeds 5``.

Resumable: each (row, seed) is kept as JSON when it is measured, trainings go on from their checkpoints, and the
same command carries on after a kill. Exits with 1 if a criterion of the table is missed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import curves, expect, page, rows_table
from benchmarks.ledger import Ledger
from benchmarks.measured import Looked, Measured, Remapped, Sizes, look_at, measure
from benchmarks.workshop import Workshop
from sfd_deploy.errors import FAILED, OK, ConfigError
from sfd_deploy.manifest import Sealed
from sfd_deploy.runtime import open_runtime
from sfd_deploy.runtime.seam import Runtime

ROWS = ("teacher", "distilled", "sfd", "two-stage", "remap", "retrained")
TRAINED = ("distilled", "sfd", "two-stage", "retrained")
DATA = {"digits": "digits", "fashion-mnist": "fashion-mnist", "fashion-mnist-32": "fashion-mnist"}  # presets → images


@dataclass
class Rows:
    """Makes and measures rows; what the ledger holds is not made again."""

    workshop: Workshop
    ledger: Ledger
    sizes: Sizes

    def row(self, name: str, seed: int) -> Measured:
        """One row of one seed."""
        seed = self.teacher_seed(seed) if name == "teacher" else seed
        make = self._teacher if name == "teacher" else self._generator
        return self.ledger.result(f"{name}-{seed}", Measured, lambda: make(name, seed))

    def judges_error(self, seed: int) -> dict[int, Looked]:
        """Per forget label, what the judges call the teacher's own samples of its override label."""
        seed = self.teacher_seed(seed)
        return {label: self._override(override, seed) for label, override in self.workshop.forget.items()}

    def teacher_seed(self, seed: int) -> int:
        """A shipped teacher is one for all seeds."""
        return 0 if self.workshop.shipped else seed

    def _override(self, override: int, seed: int) -> Looked:
        def draw_and_look() -> Looked:
            with closing(self._open(self.workshop.teacher(seed))) as runtime:
                return look_at(runtime, "override", override, self.sizes.override, self.workshop.judges)

        return self.ledger.result(f"override-{override}-{seed}", Looked, draw_and_look)

    def _teacher(self, name: str, seed: int) -> Measured:
        sizes = self.sizes.model_copy(update={"forget": self.sizes.teacher_forget, "retained": self.sizes.reference})
        return self._measure(self._open(self.workshop.teacher(seed)), sizes, self.workshop.seconds(seed, name))

    def _generator(self, name: str, seed: int) -> Measured:
        sealed, stages = self._made(name, seed)
        runtime = self._open(sealed)
        if name == "remap":
            runtime = Remapped(runtime, self.workshop.forget)
        return self._measure(runtime, self.sizes, self.workshop.seconds(seed, *stages))

    def _open(self, sealed: Sealed) -> Runtime:
        return open_runtime(sealed, self.workshop.device)

    def _made(self, name: str, seed: int) -> tuple[Sealed, tuple[str, ...]]:
        """A row's generator, and the trainings that led to it after the teacher's."""
        shop, make = self.workshop, self.workshop.generator
        if name in {"distilled", "remap"}:
            return make("distilled", seed, shop.teacher(seed), forget={}).generator(), ("distilled",)
        if name == "sfd":
            return make("sfd", seed, shop.teacher(seed)).generator(), ("sfd",)
        if name == "two-stage":
            first = make("distilled", seed, shop.teacher(seed), forget={})
            run = make("two-stage", seed, shop.teacher(seed), init_from=str(first.folder))
            return run.generator(), ("distilled", "two-stage")
        run = make("retrained", seed, shop.retrained_teacher(seed), forget={})
        return run.generator(), ("retrained-teacher", "retrained")

    def _measure(self, runtime: Runtime, sizes: Sizes, seconds: float) -> Measured:
        labels = self.workshop.labels
        with closing(runtime):
            return measure(runtime, sorted(labels.forget), labels.retained, self.workshop.judges, sizes, seconds)

    def work(self, name: str, seed: int) -> expect.Work:
        """What is left to do for one row; a training under way counts as a whole one."""
        if self.ledger.find(f"{name}-{self.teacher_seed(seed) if name == 'teacher' else seed}", Measured) is not None:
            return expect.Work()
        sizes, labels, iterations = self.sizes, self.workshop.labels, self.workshop.train_config.iterations
        forgotten, retained = len(labels.forget), len(labels.retained)
        images = self.workshop.teacher_config.images
        if name == "teacher":
            drawn = forgotten * (sizes.teacher_forget + sizes.override) + retained * sizes.reference
            return expect.Work(teacher_images=0 if self.workshop.shipped else images, teacher_draws=drawn)
        drawn = forgotten * sizes.forget + retained * sizes.retained
        trained = 0 if name == "remap" else iterations
        return expect.Work(trained, images if name == "retrained" else 0, drawn)


def wanted_rows(text: str, seeds: int) -> dict[str, int]:
    """``sfd:2,remap`` → seeds of each row; a row without a number takes ``seeds``.

    Raises:
        ConfigError: an unknown row, or a number that is none.
    """
    wanted = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in ROWS or not (number or "1").isdigit() or number == "0":
            raise ConfigError(f"--rows {part.strip()!r}: not a row", f"rows: {', '.join(ROWS)}; seeds as in sfd:2")
        wanted[name] = int(number or seeds)
    # Every other row is compared with its seed's teacher.
    wanted["teacher"] = max(wanted.values())
    return {name: wanted[name] for name in ROWS if name in wanted}


def expected_minutes(rows: Rows, wanted: dict[str, int]) -> float:
    """Minutes that the missing rows will take; trainings of a few steps are timed for it."""
    missing = [rows.work(name, seed) for name, seed in _jobs(rows, wanted)]
    total = sum(missing, expect.Work())
    return total.seconds(expect.costs(rows.workshop, total.teacher_images > 0)) / 60 if total != expect.Work() else 0.0


def require_images(rows: Rows, wanted: dict[str, int]) -> None:
    """Read the images now if a teacher is still to be trained: not hours from now.

    Raises:
        DataError: they are not there.
    """
    if any(rows.work(name, seed).teacher_images for name, seed in _jobs(rows, wanted)):
        len(rows.workshop.data)


def _jobs(rows: Rows, wanted: dict[str, int]) -> list[tuple[str, int]]:
    """Seed by seed, so that an early look at the results compares whole seeds."""
    jobs = [(name, seed) for seed in range(max(wanted.values())) for name in wanted if seed < wanted[name]]
    return [(name, seed) for name, seed in jobs if name != "teacher" or seed == rows.teacher_seed(seed)]


def make_all(rows: Rows, wanted: dict[str, int], say: Callable[[str], None]) -> dict[str, dict[int, Measured]]:
    """Every wanted row, by name and seed."""
    found: dict[str, dict[int, Measured]] = {name: {} for name in wanted}
    for name, seed in _jobs(rows, wanted):
        rows.workshop.require_labels(rows.workshop.teacher(seed))
        found[name][seed] = rows.row(name, seed)
        rows.judges_error(seed)
        say(f"{name}, seed {seed}: {_one_line(found[name][seed])}")
    return found


def facts_of(rows: Rows, found: dict[str, dict[int, Measured]]) -> rows_table.Facts:
    """What the table is made of."""
    seeds = {seed for results in found.values() for seed in results}
    return rows_table.Facts(
        rows.workshop.labels, rows.sizes, found, {seed: rows.teacher_seed(seed) for seed in seeds},
        {rows.teacher_seed(seed): rows.judges_error(seed) for seed in seeds}, rows.workshop.shipped,
    )  # fmt: skip


def records_of(rows: Rows, wanted: dict[str, int]) -> dict[str, Path]:
    """The training record of each trained row and seed, by what a picture calls it."""
    found = {}
    for name, seed in _jobs(rows, wanted):
        if name in TRAINED:
            title = name if wanted[name] == 1 else f"{name}, seed {seed}"
            found[title] = rows.workshop.run(name, seed).generator().folder / curves.RECORD
    return found


def _one_line(measured: Measured) -> str:
    count = measured.forget[measured.worst]
    return (
        f"{count.hits} hits of {count.n}, retained accuracy {measured.retained_accuracy:.4f}, "
        f"Fréchet {measured.frechet:.3f}, {measured.seconds / 60:.1f} minutes"
    )


def images_folder(data: str, given: Path | None) -> Path:
    """Where the images are: as given, scikit-learn's digits, or the data set's folder below SFD_DEPLOY_DATA."""
    if given is not None:
        return given
    return Path(data) if data == "digits" else Path(os.environ.get("SFD_DEPLOY_DATA", "data")) / DATA.get(data, data)


@click.command(epilog="Example: python -m benchmarks.rows --data digits --seeds 5")
@click.option("--data", type=click.Choice(list(DATA)), required=True)
@click.option("--images", type=click.Path(path_type=Path), help="IDX folder  [default: below $SFD_DEPLOY_DATA]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rows", "chosen", default=",".join(ROWS), show_default=True, help="Rows, each with its seeds or none.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: runs/rows/<data>]")
@click.option(
    "--override-samples", "override", type=click.IntRange(min=1), default=Sizes().override, show_default=True,
    help="Images that the teacher draws for the judges' own error.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch")
@click.option("--page", "into", type=click.Path(path_type=Path), help="Also put the table into this page.")
@click.option("--table", "marker", help="The table's markers in the page  [default: rows <data>]")
@click.option("--curves", "picture", type=click.Path(path_type=Path), help="Also draw the trainings' gaps: a PNG.")
@click.option("--estimate-only", is_flag=True, help="Say how long it will take, and stop.")
def command(
    data: str, images: Path | None, seeds: int, chosen: str, output: Path | None, override: int, device: str,
    threads: int | None, into: Path | None, marker: str | None, picture: Path | None, estimate_only: bool,
) -> int:  # fmt: skip
    """Make each row of the table of methods; run again to go on."""
    import torch

    from sfd_deploy.runtime.pytorch import torch_device

    where = torch_device(device)
    if picture is not None:
        curves.require_matplotlib()  # not after half an hour
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = wanted_rows(chosen, seeds)
    home = output or Path("runs") / "rows" / data
    rows = open_rows(data, home, images_folder(data, images), Sizes(override=override), where)
    require_images(rows, wanted)
    click.echo(f"expected: about {expected_minutes(rows, wanted):.0f} minutes for what is missing in {home}", err=True)
    if estimate_only:
        return OK
    found = make_all(rows, wanted, lambda line: click.echo(line, err=True))
    facts = facts_of(rows, found)
    verdict = rows_table.criteria(facts)
    line = f"python -m benchmarks.rows --data {data} --seeds {seeds} --rows {chosen}"
    line += f" --override-samples {override}" if override != Sizes().override else ""
    text = rows_table.text(facts, verdict, f"`{line}{page.device_flag(where)}`; {page.computed_on(where)}")
    click.echo(text)
    if picture is not None:
        curves.draw(records_of(rows, wanted), picture)
    if into is not None:
        page.fill(into, marker or f"rows {data}", text)
    return FAILED if verdict.missed else OK


def open_rows(data: str, home: Path, images: Path, sizes: Sizes, device: str = "cpu") -> Rows:
    """The rows of a data set below ``home``, bound to presets and sizes."""
    workshop = Workshop.of_preset(data, home, images, device)
    settings = workshop.settings | {"teacher": workshop.teacher_config.resolved(), "sizes": sizes.resolved()}
    return Rows(workshop, Ledger(home / "results", settings), sizes)


if __name__ == "__main__":
    page.run(command)
