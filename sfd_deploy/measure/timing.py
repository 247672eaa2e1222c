"""Latency and throughput: interleaved rounds over several runtimes or their parts, medians, and paired ratios.

On a shared machine the clock drifts by tens of per cent within minutes. Rounds in which every
runtime takes one turn meet the same drift, so their *ratios* hold where absolute figures do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.latents import Latents

Clock = Callable[[], float]
Draw = Callable[[Latents, NDArray[np.int64]], object]  # a runtime's ``draw``, or a part of one
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of each measured call, one a round, drawing ``batch`` images."""

    batch: int
    seconds: tuple[float, ...]

    @property
    def latency_ms(self) -> float:
        """Median milliseconds a call."""
        return 1000 * median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images a second at the median call."""
        return images_per_second(self.batch, self.seconds)

    def times_faster_than(self, other: Timing) -> float:
        """Median over rounds of the ratio of images a second, this to ``other``; rounds are pairs.

        Raises:
            ValueError: the two were not measured in the same rounds.
        """
        if len(self.seconds) != len(other.seconds):
            raise ValueError("timings of different rounds are not pairs")
        scale = self.batch / other.batch
        return scale * median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


def images_per_second(batch: int, seconds: Sequence[float]) -> float:
    """Images a second from the seconds of several calls of ``batch`` images: the median call's.

    The median, since a first call allocates and a neighbour's burst of work hits a few calls hard.
    """
    return batch / median(seconds)


def time_interleaved(
    draws: Mapping[str, Draw], *, batch: int, rounds: int, classes: int, seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:  # fmt: skip
    """Time ``rounds`` calls of ``batch`` images of each draw, one turn each a round, order reversed every other.

    Latents come from the ``bench`` stream and are new every round; labels run through all
    ``classes``. Two calls each are thrown away first.

    Raises:
        ValueError: no rounds, or a batch below 1.
    """
    if rounds < 1 or batch < 1:
        raise ValueError(f"{rounds} rounds of {batch} images measure nothing")
    labels = np.arange(batch, dtype=np.int64) % classes
    for draw in draws.values():
        for call in range(WARM_UP_CALLS):
            draw(Latents.of_stream("bench", seed, call * batch, batch), labels)
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for turn in range(rounds):
        latents = Latents.of_stream("bench", seed, (WARM_UP_CALLS + turn) * batch, batch)
        names = list(draws) if turn % 2 == 0 else list(draws)[::-1]
        for name in names:
            start = clock()
            draws[name](latents, labels)
            seconds[name].append(clock() - start)
    return {name: Timing(batch, tuple(values)) for name, values in seconds.items()}
