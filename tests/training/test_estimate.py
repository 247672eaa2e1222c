"""Expected time and memory, and that measuring them leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import nn

from sfd_deploy.training.estimate import (
    Estimate,
    estimate,
    free_bytes,
    in_bytes,
    in_words,
    largest_batch,
    left_no_trace,
    peak_bytes,
    rows_that_fit,
)

MIB = 2**20


def ticking(durations: list[float]) -> Callable[[], float]:
    """A clock on which call number n of the step takes ``durations[n]`` seconds."""
    times = [0.0]
    for seconds in durations:
        times += [times[-1] + seconds] * 2
    left = iter(times)
    return lambda: next(left)


def test_time_is_the_median_step_after_the_first_times_what_is_left():
    found = estimate(lambda _step: None, 400, networks=[], optimisers=[], clock=ticking([60.0, 0.5, 1.0]))
    assert found.seconds == 400 * 0.75
    assert found.iterations == 400


def test_an_estimate_reads_as_one_line():
    assert str(Estimate(300.0, int(1.4 * 2**30), 400)) == "about 5 min for 400 iterations, 1.4 GiB"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (40, "40 s"),
        (99.4, "99 s"),
        (119, "2 min"),
        (5990, "100 min"),
        (9000, "2.5 h"),
        (864000, "10 days"),
    ],
)
def test_seconds_in_words(seconds, words):
    assert in_words(seconds) == words


def test_bytes_in_words():
    assert (in_bytes(300 * MIB), in_bytes(3 * 2**30)) == ("300 MiB", "3.0 GiB")


class Noisy(nn.Module):
    """Weights, a buffer, a mode and the global random state all change in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def everything(network: nn.Module, optimiser: torch.optim.Optimizer) -> list[object]:
    """All state, as plain values to compare bit for bit."""
    values = [(name, value.tolist()) for name, value in network.state_dict().items()]
    gradients = [None if p.grad is None else p.grad.tolist() for p in network.parameters()]
    state = [
        {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
        for entry in optimiser.state_dict()["state"].values()
    ]
    modes = [(module.training, [p.requires_grad for p in module.parameters()]) for module in network.modules()]
    rates = [group["lr"] for group in optimiser.param_groups]
    return [values, gradients, state, modes, rates, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("warm", [False, True])
def test_probing_leaves_every_bit_as_it_was(warm: bool):
    torch.manual_seed(3)
    network = Noisy()
    adam = torch.optim.Adam(network.parameters(), lr=0.1, fused=True)

    def step(number: int) -> None:
        adam.zero_grad(set_to_none=True)
        adam.param_groups[0]["lr"] = 0.1 / (1 + number)
        network(torch.randn(8, 3)).square().mean().backward()
        adam.step()
        network.eval()
        network.body[0].requires_grad_(False)

    if warm:
        step(0)
        network.train().requires_grad_(True)
    before = everything(network, adam)
    calls = count()
    estimate(lambda number: (step(number), next(calls)), 10, networks=[network], optimisers=[adam])
    assert next(calls) == 3
    assert everything(network, adam) == before


def test_training_after_a_probe_is_training_without_one():
    def trained(probed: bool) -> list[object]:
        torch.manual_seed(0)
        network = Noisy()
        adam = torch.optim.Adam(network.parameters(), lr=0.1, betas=(0.0, 0.999))

        def step(_number: int) -> None:
            adam.zero_grad(set_to_none=True)
            network(torch.randn(8, 3)).square().mean().backward()
            adam.step()

        if probed:
            estimate(step, 10, networks=[network], optimisers=[adam])
        for number in range(3):
            step(number)
        return everything(network, adam)

    assert trained(probed=True) == trained(probed=False)


def test_a_probe_that_fails_or_is_interrupted_leaves_no_trace_either():
    network = nn.Linear(2, 2)
    before = [value.clone() for value in network.state_dict().values()]

    def break_off() -> None:
        with left_no_trace([network], []):
            nn.init.zeros_(network.weight)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))


def test_peak_memory_sees_what_a_step_holds_and_forgets_an_earlier_peak():
    base = peak_bytes(lambda: None, "cpu")
    high = peak_bytes(lambda: torch.ones(64 * MIB // 4).sum(), "cpu")
    assert 55 * MIB < high - base < 120 * MIB
    assert peak_bytes(lambda: None, "cpu") < high - 32 * MIB


def test_the_batch_that_fits_lies_on_the_line_through_two_probes():
    """400 MiB and 10 MiB a row: with a tenth of 1000 MiB kept free, 50 rows."""
    peaks = {8: 480 * MIB, 32: 720 * MIB}
    assert rows_that_fit(peaks, 1000 * MIB) == 50
    assert rows_that_fit(peaks, 100 * MIB) == 0
    for unclear in ({8: 5}, {8: 5, 16: 5}):
        with pytest.raises(ValueError, match="do not tell"):
            rows_that_fit(unclear, 10)


def test_free_memory_is_what_the_kernel_calls_available():
    psutil = pytest.importorskip("psutil")
    assert free_bytes("cpu") == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_the_largest_batch_is_measured_on_small_ones_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    """A step that holds 32 MiB a row, where 3 GiB are to be had: about 86 rows in 90 % of it, less what is held."""
    network = nn.Linear(2, 2)
    before = [value.clone() for value in network.state_dict().values()]

    def step(rows: int) -> None:
        with torch.no_grad():
            network.weight += rows
        torch.ones(rows, 8 * MIB).sum()

    monkeypatch.setattr("sfd_deploy.training.estimate.free_bytes", lambda _device: 3 * 1024 * MIB)
    monkeypatch.setattr("sfd_deploy.training.estimate.held_bytes", lambda _device: 0)
    base = peak_bytes(lambda: None, "cpu") / MIB
    found = largest_batch(step, [network], [], "cpu")
    assert found == pytest.approx((0.9 * 3072 - base) / 32, rel=0.15)
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))


def test_a_batch_that_cannot_be_told_is_none(monkeypatch: pytest.MonkeyPatch):
    def broken(_rows: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    assert largest_batch(broken, [], [], "cpu") is None
    assert largest_batch(lambda _rows: None, [], [], "cpu") is None
    monkeypatch.setattr("sfd_deploy.training.estimate.free_bytes", lambda _device: None)
    assert largest_batch(lambda rows: torch.ones(rows, 8 * MIB).sum(), [], [], "cpu") is None


def test_the_copies_that_leave_no_trace_are_not_counted_as_the_trainings_memory():
    network = torch.nn.Linear(4096, 4096, bias=False)  # 64 MiB
    adam = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 4096)).sum().backward()
    adam.step()  # two moments as large, and the gradient
    with left_no_trace([network], [adam]) as copies:
        assert copies == pytest.approx(4 * 64 * MIB, rel=1e-3)
    base = peak_bytes(lambda: None, "cpu")
    found = estimate(lambda _: None, 9, networks=[network], optimisers=[adam])
    assert found.peak_bytes == pytest.approx(base, abs=48 * MIB)
