"""What training at Stable Diffusion 1.5's size costs: ``python -m benchmarks.text_training --device cuda``.

Time of an iteration and peak memory: bf16 against FP32, LoRA against full, ours against the literal schedule. One
variant is in memory at a time: every round builds each anew, warms it up, times it and frees it, in an order that is
reversed every other round. What is trained is in ``text_sides``; ``--small`` tries the command anywhere.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import torch

from benchmarks import page
from benchmarks.text_sides import (
    ADAPTER,
    BF16,
    FP32,
    LITERAL,
    LORA,
    SMALL,
    STABLE_DIFFUSION,
    VARIANTS,
    TextTask,
    open_text_task,
)
from benchmarks.training import WARM_UP, Clock, timed
from sfd_deploy.errors import OK, BackendError
from sfd_deploy.runtime.pytorch import torch_device
from sfd_deploy.training.estimate import in_bytes, peak_bytes
from sfd_deploy.training.lora import require_peft
from sfd_deploy.training.memory import MemoryLimitError, is_out_of_memory

COMPARED = (
    ("bf16 over fp32", BF16, FP32),
    ("LoRA over full, in bf16", LORA, BF16),
    ("Ours in bf16 over the literal schedule", BF16, LITERAL),
    ("Ours in fp32 over the literal schedule", FP32, LITERAL),
)


@dataclass
class Cost:
    """Seconds of an iteration, one a round, and the most memory of any round."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def speed_over(self, other: Cost) -> list[float]:
        """Ratios of retained images a second, of each round; both draw as many an iteration."""
        return [theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True)]


def measure(
    task: TextTask, device: str, rounds: int, iterations: int, clock: Clock = time.perf_counter
) -> dict[str, Cost]:  # fmt: skip
    """The cost of every variant.

    Raises:
        MemoryLimitError: one does not fit.
    """
    costs = {name: Cost() for name in VARIANTS}
    for turn in range(rounds):
        for name in list(VARIANTS) if turn % 2 == 0 else list(VARIANTS)[::-1]:
            _visit(task, name, device, iterations, clock, costs[name])
            gc.collect()
            torch.cuda.empty_cache()
    return costs


def _visit(task: TextTask, name: str, device: str, iterations: int, clock: Clock, cost: Cost) -> None:
    def build_and_go() -> None:
        side = VARIANTS[name](task, device)
        side.go(WARM_UP, device)
        cost.seconds.append(timed(side, iterations, device, clock) / iterations)

    try:
        peak = peak_bytes(build_and_go, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(name, task.config.retained_rows, device) from None
    cost.peak_bytes = max(cost.peak_bytes, peak)


def _too_large(name: str, rows: int, device: str) -> MemoryLimitError:
    mend = f"try --rows {rows // 2}" if rows > 1 else "free memory, or take a larger GPU"
    return MemoryLimitError(f"out of memory on {device}: {name}, with {rows} retained rows", mend)


def text_of(task: TextTask, costs: dict[str, Cost]) -> str:
    """The table of costs, the ratios with their spread, and what was trained."""
    config, unet = task.config, task.teacher.unet
    retained = config.retained_rows
    rows = [
        [name, f"{median(cost.seconds):.3f}", f"{retained / median(cost.seconds):.2f}", in_bytes(cost.peak_bytes)]
        for name, cost in costs.items()
    ]
    size, (_, tokens, width) = unet.config["sample_size"], unet.table.shape
    weights = sum(weight.numel() for weight in unet.parameters())
    forget = config.forget_rows if task.prompts.forget else 0
    recomputed = "recomputed in the backward pass" if config.gradient_checkpointing else "kept for the backward pass"
    return "\n".join([
        page.table(("variant", "s/iteration", "retained images/s", "peak memory"), rows),
        "",
        *(_compared(words, costs[one], costs[other]) for words, one, other in COMPARED),
        f"- U-Net of {weights / 1e6:,.1f} million random weights, latents 4×{size}×{size}, {task.prompts.count} random "
        f"prompts of {tokens}×{width}; every variant's activations are {recomputed}.",
        f"- Ours: {retained} + {forget} rows, objective {config.objective}; LoRA of rank {ADAPTER.rank} on "
        f"{', '.join(ADAPTER.targets)}. Literal: {retained} + {retained if forget else 0} rows, objective sid, a term "
        "each, two calls a guided prediction.",
    ])  # fmt: skip


def _compared(words: str, one: Cost, other: Cost) -> str:
    ratios = sorted(one.speed_over(other))
    return (
        f"- {words}: {median(ratios):.2f} times the retained images/s (from {ratios[0]:.2f} to {ratios[-1]:.2f} over "
        f"{len(ratios)} interleaved rounds), {one.peak_bytes / other.peak_bytes:.2f} times the peak memory."
    )


@click.command(epilog="Example: python -m benchmarks.text_training --config sd15-celebrity --device cuda")
@click.option("--config", default="sd15-celebrity", show_default=True, metavar="FILE|NAME", help="A training config.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=3, show_default=True, help="Of each variant a round.")
@click.option("--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Retained rows of a batch.")
@click.option("--small", is_flag=True, help="A tiny U-Net, to try the command.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.")
@click.option("--page", "into", type=click.Path(path_type=Path), help="Also put the result into this page.")
def command(
    config: str, rounds: int, iterations: int, rows: int, small: bool, device: str, threads: int | None,
    into: Path | None,
) -> int:  # fmt: skip
    """Measure what text-to-image training costs at Stable Diffusion 1.5's size, with random weights."""
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch_device(device)
    if where == "cpu" and not small:
        raise BackendError("U-Nets of 860 million weights are not trained on a CPU", "use --device cuda, or --small")
    require_peft()
    task = open_text_task(config, rows, SMALL if small else STABLE_DIFFUSION)
    text = text_of(task, measure(task, where, rounds, iterations))
    options = f"--config {config}{' --small' if small else ''} --device {device} --rows {rows}"
    origin = f"`python -m benchmarks.text_training {options} --rounds {rounds} --iterations {iterations}`"
    text += f"\n- {origin}; {page.computed_on(where)}."
    click.echo(text)
    if into is not None:
        page.fill(into, f"text training {device}", text)
    return OK


if __name__ == "__main__":
    page.run(command)
