"""Our loop and the literal schedule on the same weights and draws, in float64."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.official import OfficialSchedule, Term
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.rows import Rows

Schedule = TypeVar("Schedule", bound=OfficialSchedule)


def moved_off(made: Schedule) -> Schedule:
    """In float64, psi and theta moved off the teacher: at the start all three agree and retained rows cancel."""
    draws = torch.Generator().manual_seed(5)
    for network in (made.phi, made.psi, made.theta):
        network.double()
    for network in (made.psi, made.theta):
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    return made


def with_weights_of(made: OfficialSchedule, loop: SfdLoop) -> SfdLoop:
    """``loop`` with the schedule's own weights."""
    for target, source in ((loop.teacher, made.phi), (loop.fake_score, made.psi), (loop.generator, made.theta)):
        target.double().load_state_dict(source.state_dict())
    loop.dtype = torch.float64
    return loop


def same_draws(
    made: OfficialSchedule, labels: Tensor, targets: Tensor, shape: tuple[int, int, int]
) -> tuple[tuple[Term, Term], Rows]:
    """The same draws as a retained and a forget term, and as one batch of ours; each term has half of ``labels``."""
    draws, config, n = torch.Generator().manual_seed(9), made.config, len(labels) // 2
    latents, noise = (torch.randn(2 * n, *shape, generator=draws, dtype=torch.float64) for _ in range(2))
    position = torch.rand(2 * n, generator=draws, dtype=torch.float64)
    sigma = made.phi.training_sigma(position, config.sigma_min, config.sigma_max)
    weights = torch.tensor([1 / n] * n + [config.forget_weight / n] * n, dtype=torch.float64)
    parts = [Term(labels[p], targets[p], latents[p], sigma[p], noise[p]) for p in (slice(0, n), slice(n, 2 * n))]
    return (parts[0], parts[1]), Rows(labels, targets, weights, latents, position, noise)


def gradient(network: nn.Module) -> Tensor:
    """Every gradient of ``network``, one after the other."""
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
