"""How a training's figures go with its iterations: ``python -m benchmarks.course --config fashion-mnist``.

For choosing lengths, rates and objectives, so on the ``select`` stream of latents: the averaged generator is looked
at every so often, with both judges, the Fréchet distance beside the teacher's. Looks are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks import page
from benchmarks.measured import Measured, Sizes, measure, spread_ratio
from benchmarks.sides import Task, open_task, ours
from sfd_deploy.embedded import judges_for
from sfd_deploy.errors import OK, ConfigError
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.runtime.pytorch import GeneratorRuntime, TeacherRuntime, torch_device
from sfd_deploy.training.precision import settled

LOOK = Sizes(forget=1000, override=1, retained=200, reference=200, teacher_forget=1)
COLUMNS = ("iterations", "seconds", "forget hits", "retained accuracy, %", "spread", "Fréchet, × teacher")


@dataclass(frozen=True)
class Look:
    """The averaged generator after ``step`` iterations and ``seconds`` of training."""

    step: int
    seconds: float
    found: Measured


def teachers_figures(task: Task, judges: Sequence[Judge], sizes: Sizes = LOOK, device: str = "cpu") -> Measured:
    """The teacher's own, on the same latents."""
    # Forgetting is not asked of a teacher; one image keeps the figures' shape.
    sizes = sizes.model_copy(update={"forget": 1})
    runtime = TeacherRuntime(task.teacher, SamplerConfig(), device)
    return measure(runtime, sorted(task.labels.forget), task.labels.retained, judges, sizes, 0.0, "select")


def course(task: Task, judges: Sequence[Judge], every: int, sizes: Sizes = LOOK, device: str = "cpu") -> Iterator[Look]:
    """Train as ``sfd-deploy train`` does; a look every ``every`` iterations and at the end."""
    side, seconds = ours(task.config, task.labels, task.teacher, device), 0.0
    while side.step < task.config.iterations:
        began = time.perf_counter()
        side.go(min(every, task.config.iterations - side.step), device)
        seconds += time.perf_counter() - began
        runtime = GeneratorRuntime(side.generator, device)
        forgotten = sorted(task.labels.forget)
        yield Look(
            side.step, seconds, measure(runtime, forgotten, task.labels.retained, judges, sizes, seconds, "select")
        )


def changes_from(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` pairs, values as in YAML.

    Raises:
        ConfigError: one that is no pair.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r}: not key=value", "for example --set objective=sid")
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def row(look: Look, teacher: Measured) -> list[str]:
    """A look as a row of the table."""
    count = look.found.forget[look.found.worst]
    return [
        str(look.step), f"{look.seconds:.0f}", f"{count.hits} of {count.n:,}",
        f"{100 * look.found.retained_accuracy:.1f}", f"{spread_ratio(look.found, teacher):.2f}",
        f"{look.found.frechet / teacher.frechet:.2f}",
    ]  # fmt: skip


@click.command(epilog="Example: python -m benchmarks.course --config fashion-mnist --set objective=sid --set seed=1")
@click.option("--config", default="fashion-mnist", show_default=True, help="A preset's name or a YAML file.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Change a value of the config.")
@click.option("--every", type=click.IntRange(min=1), default=100, show_default=True, help="Iterations between looks.")
@click.option("--judge", "folders", multiple=True, type=click.Path(path_type=Path), help="[default: the shipped two]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.")
def command(
    config: str, pairs: tuple[str, ...], every: int, folders: tuple[Path, ...], device: str, threads: int | None
) -> int:
    """Train once and print the figures on the select stream as they go."""
    import torch

    where = torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    task = open_task(config, **changes_from(pairs))
    task = replace(task, config=settled(task.config, where))
    judges = [open_judge(folder) for folder in folders or judges_for(task.labels.class_names)]
    teacher = teachers_figures(task, judges, device=where)
    rows = []
    for look in course(task, judges, every, device=where):
        rows.append(row(look, teacher))
        click.echo(" | ".join(rows[-1]), err=True)
    click.echo(page.table(COLUMNS, rows))
    accuracy = f"{100 * teacher.retained_accuracy:.1f} %"
    click.echo(f"\n- Teacher: retained accuracy {accuracy}, Fréchet {teacher.frechet:.3f}.")
    return OK


if __name__ == "__main__":
    page.run(command)
