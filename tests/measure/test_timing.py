from __future__ import annotations

import numpy as np
import pytest

from sfd_deploy.latents import Latents
from sfd_deploy.measure.timing import WARM_UP_CALLS, Timing, images_per_second, time_interleaved


class FakeClock:
    """Time passes only while something draws."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """Takes ``seconds`` a call, more by ``drift`` from round to round, and remembers its calls."""

    def __init__(self, clock: FakeClock, seconds: float, log: list[str], label: str) -> None:
        self.clock, self.seconds, self.log, self.label = clock, seconds, log, label
        self.seeds: list[tuple[int, ...]] = []
        self.labels: list[int] = []

    def draw(self, latents: Latents, labels: np.ndarray) -> np.ndarray:
        # The machine slows down as the clock runs: to half its speed after six seconds.
        self.clock.now += self.seconds * (1 + self.clock.now / 6)
        self.log.append(self.label)
        self.seeds.append(tuple(latents.seeds.tolist()))
        self.labels = labels.tolist()
        return np.zeros((len(labels), 1, 2, 2), np.float32)


def run(rounds: int = 6) -> tuple[dict[str, Timing], dict[str, Slow], list[str]]:
    clock, log = FakeClock(), []
    runtimes = {"slow": Slow(clock, 0.4, log, "slow"), "fast": Slow(clock, 0.1, log, "fast")}
    draws = {name: runtime.draw for name, runtime in runtimes.items()}
    return time_interleaved(draws, batch=8, rounds=rounds, classes=3, clock=clock), runtimes, log


def test_runtimes_take_turns_and_the_order_alternates():
    _, _, log = run(rounds=3)
    assert log[2 * WARM_UP_CALLS :] == ["slow", "fast", "fast", "slow", "slow", "fast"]


def test_ratios_survive_a_machine_that_slows_down():
    timings, _, _ = run()
    assert timings["slow"].seconds[-1] > 1.3 * timings["slow"].seconds[0]
    assert timings["fast"].times_faster_than(timings["slow"]) == pytest.approx(4.0, rel=0.05)


def test_both_runtimes_meet_the_same_latents_new_every_round_and_every_label():
    _, runtimes, _ = run(rounds=4)
    assert runtimes["slow"].seeds == runtimes["fast"].seeds
    assert len(set(runtimes["slow"].seeds)) == 4 + WARM_UP_CALLS
    assert runtimes["fast"].labels == [0, 1, 2, 0, 1, 2, 0, 1]


def test_median_latency_and_throughput_ignore_one_slow_call():
    timing = Timing(batch=64, seconds=(0.5, 0.5, 30.0, 0.5, 0.5))
    assert timing.latency_ms == pytest.approx(500.0)
    assert timing.images_per_second == pytest.approx(128.0)
    assert images_per_second(64, [0.5, 30.0, 0.5]) == pytest.approx(128.0)


def test_ratio_counts_images_not_calls():
    assert Timing(64, (1.0,)).times_faster_than(Timing(16, (1.0,))) == pytest.approx(4.0)


def test_timings_of_different_rounds_and_empty_measurements_are_refused():
    with pytest.raises(ValueError, match="not pairs"):
        Timing(8, (1.0,)).times_faster_than(Timing(8, (1.0, 1.0)))
    with pytest.raises(ValueError, match="measure nothing"):
        time_interleaved({}, batch=8, rounds=0, classes=3)
