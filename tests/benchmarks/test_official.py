"""The literal schedule is the reference: ours, in one batch, must give its losses and gradients. Float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.official import OfficialSchedule, Term
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.loop import SfdLoop
from sfd_deploy.training.rows import Rows
from tests.benchmarks.literal import gradient, moved_off, same_draws, with_weights_of
from tests.conftest import TINY_LABELS, tiny_generator

N = 3
CONFIG = TrainConfig.from_mapping(
    {"teacher": "unused", "iterations": 1, "retained_rows": N, "forget_rows": N, "precision": "fp32"}, "test"
)


def schedule() -> OfficialSchedule:
    return moved_off(OfficialSchedule(CONFIG, TINY_LABELS, tiny_generator().denoiser))


def ours(made: OfficialSchedule) -> SfdLoop:
    """Our loop with the schedule's own weights."""
    return with_weights_of(made, SfdLoop(CONFIG, TINY_LABELS, tiny_generator().denoiser))


def terms(made: OfficialSchedule) -> tuple[tuple[Term, Term], Rows]:
    """The same draws as two terms, and as one batch of ours."""
    labels, targets = torch.tensor([0, 2, 2, 1, 1, 1]), torch.tensor([0, 2, 2, 2, 2, 2])
    return same_draws(made, labels, targets, (1, 16, 16))


def both_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, float, float]:
    """Gradients and total losses: the official terms', each with its own backward call, and our one batch's."""
    made = schedule()
    loop = ours(made)
    (retained, forget), rows = terms(made)
    term = made.fake_score_term if name == "fake score" else made.generator_term
    theirs = made.psi if name == "fake score" else made.theta
    made.psi.requires_grad_(name == "fake score")
    losses = [term(retained), CONFIG.forget_weight * term(forget)]
    for loss in losses:
        loss.backward()
    monkeypatch.setattr(SfdLoop, "_parts", lambda *_: iter([rows]))
    monkeypatch.setattr(SfdLoop, "_apply", lambda *_: False)  # the gradient is looked at, not applied
    passes = loop.fake_score_step(0) if name == "fake score" else loop.generator_step(0)
    mine = loop.fake_score if name == "fake score" else loop.generator
    total = float((rows.weights * passes[0].loss).sum())
    return gradient(theirs), gradient(mine), sum(loss.item() for loss in losses), total


@pytest.mark.parametrize("name", ["fake score", "generator"])
def test_our_one_batch_has_the_loss_and_gradient_of_the_official_terms(name, monkeypatch: pytest.MonkeyPatch):
    theirs, mine, their_loss, our_loss = both_gradients(name, monkeypatch)
    assert theirs.abs().max() > 1e-3
    assert our_loss == pytest.approx(their_loss, rel=1e-10)
    assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10 * theirs.abs().max().item())


def test_an_iteration_calls_ten_networks_and_goes_backward_four_times(monkeypatch: pytest.MonkeyPatch):
    made = OfficialSchedule(CONFIG, TINY_LABELS, tiny_generator().denoiser)
    calls: list[tuple[str, list[int]]] = []
    for name, network in (("phi", made.phi), ("psi", made.psi), ("theta", made.theta.denoiser)):
        network.register_forward_hook(lambda _m, inputs, _o, name=name: calls.append((name, inputs[2].tolist())))
    backward, count = Tensor.backward, []
    monkeypatch.setattr(Tensor, "backward", lambda self, *a, **k: (count.append(1), backward(self, *a, **k)))
    made.iterate(0)
    assert len(calls) == 10
    assert len(count) == 4
    assert [sum(name == other for other, _ in calls) for name in ("phi", "psi", "theta")] == [2, 4, 4]
    assert all(len(labels) == N for _, labels in calls)
    assert {label for name, labels in calls for label in labels if name == "phi"} <= {0, 2}
    assert [1] * N in [labels for name, labels in calls if name == "psi"]


def test_an_iteration_moves_psi_and_theta_and_leaves_phi():
    made = OfficialSchedule(CONFIG, TINY_LABELS, tiny_generator().denoiser)
    before = {name: [p.detach().clone() for p in getattr(made, name).parameters()] for name in ("phi", "psi", "theta")}
    made.iterate(0)
    same = {name: all(torch.equal(a, b) for a, b in zip(old, getattr(made, name).parameters(), strict=True))
            for name, old in before.items()}  # fmt: skip
    assert same == {"phi": True, "psi": False, "theta": False}


def test_its_networks_are_row_major_fp32():
    made = OfficialSchedule(CONFIG, TINY_LABELS, tiny_generator().denoiser)
    weights = [p for net in (made.phi, made.psi, made.theta) for p in net.parameters() if p.dim() == 4]
    assert all(weight.is_contiguous() and weight.dtype == torch.float32 for weight in weights)
