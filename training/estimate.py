"""Expected time and memory of a training, from a few probe steps that leave no trace; the batch that would fit."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PROBES = 2
PROBE_ROWS = (2, 6)
# Kept free of the memory that is there: allocators round up, and a neighbour's use moves.
HEADROOM = 0.1
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Estimate:
    """Expected wall-clock seconds of ``iterations``, and the most memory in bytes."""

    seconds: float
    peak_bytes: int
    iterations: int

    def __str__(self) -> str:
        """``about 5 min for 400 iterations, 1.4 GiB``."""
        return f"about {in_words(self.seconds)} for {self.iterations} iterations, {in_bytes(self.peak_bytes)}"


def in_words(seconds: float) -> str:
    """Two figures at most: ``40 s``, ``5 min``, ``2.5 h``, ``3 days``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    if seconds < 100 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{round(seconds / 86400)} days"


def in_bytes(count: int) -> str:
    """``1.4 GiB`` or ``300 MiB``."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{round(count / MIB)} MiB"


def estimate(
    step: Callable[[int], object], iterations: int, *, networks: Iterable[nn.Module], optimisers: Iterable[Optimizer],
    device: str = "cpu", clock: Callable[[], float] = time.perf_counter,
) -> Estimate:  # fmt: skip
    """Time a few steps and put everything back as ``left_no_trace`` does.

    Args:
        step: runs one iteration, given its number; it must write no record and no checkpoint.
        iterations: how many are left to do.
        networks: all that ``step`` changes.
        optimisers: all that ``step`` uses.
        device: whose memory counts.
        clock: seconds.
    """
    seconds: list[float] = []

    def probe() -> None:
        for number in range(1 + PROBES):
            start = clock()
            step(number)
            _wait_for(device)
            seconds.append(clock() - start)

    with left_no_trace(networks, optimisers) as copies:
        peak = peak_bytes(probe, device) - copies  # which the training itself does not hold
    # The first step allocates, compiles and picks algorithms; the rest tell.
    return Estimate(median(seconds[1:]) * iterations, peak, iterations)


@contextmanager
def left_no_trace(networks: Iterable[nn.Module], optimisers: Iterable[Optimizer]) -> Iterator[int]:
    """Put weights, buffers, gradients, optimiser state and the global random state back at the end, bit for bit.

    Yields how many bytes the copies take until then.

    In place rather than by working on copies: wrapped networks (distributed, sharded, compiled) cannot be copied.
    """
    kept = [_Kept.of(network) for network in networks]
    states = [(optimiser, _copied(dict(optimiser.state)), _copied(optimiser.param_groups)) for optimiser in optimisers]
    try:
        with torch.random.fork_rng():
            yield _bytes_in([[network.values, network.gradients] for network in kept] + [state for _, *state in states])
    finally:
        for network in kept:
            network.put_back()
        for optimiser, state, groups in states:
            optimiser.state.clear()
            optimiser.state.update(state)
            for group, before in zip(optimiser.param_groups, groups, strict=True):
                group.update(before)


@dataclass(frozen=True)
class _Kept:
    network: nn.Module
    values: dict[str, Tensor]
    gradients: list[Tensor | None]
    wanted: list[bool]
    training: list[bool]

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module) -> _Kept:
        parameters = list(network.parameters())
        return cls(
            network,
            {name: value.detach().clone() for name, value in network.state_dict().items()},
            [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters],
            [parameter.requires_grad for parameter in parameters],
            [module.training for module in network.modules()],
        )

    @torch.no_grad()
    def put_back(self) -> None:
        for name, value in self.network.state_dict().items():
            value.copy_(self.values[name])
        for parameter, gradient, wanted in zip(self.network.parameters(), self.gradients, self.wanted, strict=True):
            parameter.grad = gradient
            parameter.requires_grad_(wanted)
        for module, training in zip(self.network.modules(), self.training, strict=True):
            module.training = training


def _bytes_in(value: Any) -> int:
    """Of all tensors in containers, parameters left out."""
    if isinstance(value, Tensor):
        return 0 if isinstance(value, nn.Parameter) else value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return sum(map(_bytes_in, value)) if isinstance(value, list) else 0


def _copied(value: Any) -> Any:
    """Containers copied, tensors of an optimiser's state cloned, parameters (the keys) as they are."""
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory in use while ``call`` runs: allocated by PyTorch on CUDA, resident in the process on a CPU.

    Where the system cannot reset the process' high-water mark (all but Linux), an earlier, higher one is returned.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident size
    call()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def free_bytes(device: str) -> int | None:
    """Memory that a training could take on ``device`` now; None where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def held_bytes(device: str) -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def largest_batch(
    step: Callable[[int], object], networks: Iterable[nn.Module], optimisers: Iterable[Optimizer], device: str
) -> int | None:
    """About how many rows would fit now, from two small batches; None where that cannot be told.

    ``step`` runs one iteration on so many rows; it leaves no trace.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    try:
        with left_no_trace(networks, optimisers):
            step(PROBE_ROWS[0])  # the optimiser's state, allocated once, is no row's
            peaks = {rows: peak_bytes(lambda rows=rows: step(rows), device) for rows in PROBE_ROWS}  # type: ignore[misc]
        free = free_bytes(device)
        return None if free is None else rows_that_fit(peaks, free + held_bytes(device))
    except (RuntimeError, ValueError):
        # Not even the probes fit, or batches this small moved no peak: nothing rather than a wrong number.
        return None


def rows_that_fit(peaks: Mapping[int, int], memory_bytes: int) -> int:
    """The largest batch that needs at most ``memory_bytes``, a tenth kept free; 0 if not even one row fits.

    Args:
        peaks: rows → peak bytes of two probes or more; memory is a constant and so much a row.
        memory_bytes: all that the training may hold, the constant part included.

    Raises:
        ValueError: fewer than two probes, or memory that does not grow with the rows.
    """
    (few, least), (many, most) = min(peaks.items()), max(peaks.items())
    if many == few or most <= least:
        raise ValueError(f"peaks {dict(peaks)} do not tell the memory of a row")
    per_row = (most - least) / (many - few)
    return max(0, int((memory_bytes * (1 - HEADROOM) - (least - per_row * few)) / per_row))


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
