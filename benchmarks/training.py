"""How fast training is beside the official schedule, in one run: ``python -m benchmarks.training``.

Retained images a second of both sides, in interleaved rounds, and the memory of each; exits with 1 if ours is not
1.8 times as fast. With ``--to-row RUN`` both train until they reach RUN's figures, and ours must need at most
1/1.6 of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click

from benchmarks import page, reach
from benchmarks.sides import SIDES, Side, Task, open_task
from sfd_deploy.errors import FAILED, OK
from sfd_deploy.training.estimate import in_bytes, peak_bytes

MIN_SPEED_RATIO = 1.8
MIN_TIME_RATIO = 1.6
WARM_UP = 2
Clock = Callable[[], float]


@dataclass(frozen=True)
class Speed:
    """Seconds of each round of ``iterations``, by side; rounds are pairs."""

    retained_rows: int
    iterations: int
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]

    def images_per_second(self, side: str) -> float:
        """Retained images a second at the median round."""
        return self.retained_rows * self.iterations / median(self.seconds[side])

    @property
    def ratios(self) -> list[float]:
        """Ours over official, of each round; both draw as many retained images an iteration."""
        return [theirs / mine for mine, theirs in zip(self.seconds["ours"], self.seconds["official"], strict=True)]


def measure_speed(
    task: Task, device: str, rounds: int, iterations: int, clock: Clock = time.perf_counter
) -> Speed:  # fmt: skip
    """Time both sides in turns, the order reversed every other round; memory first, with one side alive at a time."""
    peaks = {name: _peak(task, name, device) for name in SIDES}
    sides = {name: task.side(name, device) for name in SIDES}
    for side in sides.values():
        side.go(WARM_UP, device)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(rounds):
        for name in list(SIDES) if turn % 2 == 0 else list(SIDES)[::-1]:
            seconds[name].append(timed(sides[name], iterations, device, clock))
    return Speed(task.config.retained_rows, iterations, seconds, peaks)


def timed(side: Side, iterations: int, device: str, clock: Clock) -> float:
    """Seconds of some iterations."""
    began = clock()
    side.go(iterations, device)
    return clock() - began


def _peak(task: Task, name: str, device: str) -> int:
    def build_and_go() -> None:
        task.side(name, device).go(WARM_UP, device)

    return peak_bytes(build_and_go, device)


def speed_text(task: Task, speed: Speed) -> str:
    """The table of speeds, and the ratio with its spread."""
    rows = [[name, f"{speed.images_per_second(name):.1f}", in_bytes(speed.peak_bytes[name])] for name in speed.seconds]
    ratios, config = sorted(speed.ratios), task.config
    share = "shared between the steps" if config.share_generated else "drawn for each step"
    ours = f"{config.retained_rows} + {config.forget_rows} rows, images {share}, {config.precision}"
    return "\n".join([
        page.table(("schedule", "retained images/s", "peak memory"), rows),
        "",
        f"- Ratio {median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} interleaved "
        f"rounds of {speed.iterations} iterations). Criterion: at least {MIN_SPEED_RATIO}.",
        f"- Ours: {ours}{', compiled' if config.compile else ''}. Official: {config.retained_rows} + "
        f"{config.retained_rows} rows, four terms, fp32{'' if task.trained else '. Networks untrained'}.",
    ])  # fmt: skip


@click.command(epilog="Example: python -m benchmarks.training --config fashion-mnist --threads 2")
@click.option("--config", default="fashion-mnist", show_default=True, metavar="FILE|NAME", help="A training config.")
@click.option("--rounds", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=4, show_default=True, help="Of each side a round.")
@click.option("--to-row", type=click.Path(path_type=Path), metavar="RUN", help="Train both until they match this run.")
@click.option(
    "--judge", "judges", type=click.Path(path_type=Path), multiple=True, help="For --to-row; two, or shipped."
)
@click.option("--every", type=click.IntRange(min=1), default=20, show_default=True, help="For --to-row: looks.")
@click.option("--limit", type=click.IntRange(min=1), default=2000, show_default=True, help="For --to-row: iterations.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile for our side, on a GPU.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of our side; left out, the config's.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.")
@click.option("--page", "into", type=click.Path(path_type=Path), help="Also put the result into this page.")
def command(
    config: str, rounds: int, iterations: int, to_row: Path | None, judges: tuple[Path, ...], every: int, limit: int,
    device: str, compiled: bool, precision: str | None, threads: int | None, into: Path | None,
) -> int:  # fmt: skip
    """Measure our training beside the official schedule."""
    import torch

    from sfd_deploy.runtime.pytorch import torch_device
    from sfd_deploy.training.precision import settled

    if threads is not None:
        torch.set_num_threads(threads)
    where = torch_device(device)
    changes = {"compile": compiled or None, "precision": precision}
    task = open_task(config, **{key: value for key, value in changes.items() if value is not None})
    task = replace(task, config=settled(task.config, where))
    line = f"- `python -m benchmarks.training --config {config}"
    if to_row is None:
        speed = measure_speed(task, where, rounds, iterations)
        text, name = speed_text(task, speed), f"training speed {device}"
        failed = median(speed.ratios) < MIN_SPEED_RATIO
    else:
        race = reach.race(task, to_row, judges, where, every, limit, lambda note: click.echo(note, err=True))
        text, name, line = reach.text(race, MIN_TIME_RATIO), "training to row", f"{line} --to-row RUN"
        failed = race.missed(MIN_TIME_RATIO)
    flags = f"{' --compile' if compiled else ''}{f' --precision {precision}' if precision else ''}"
    flags += page.device_flag(where)
    text += f"\n- Objective: ours {task.config.objective}, official sid.\n{line}{flags}`; {page.computed_on(where)}."
    click.echo(text)
    if into is not None:
        page.fill(into, name, text)
    return FAILED if failed else OK


if __name__ == "__main__":
    page.run(command)
