"""The batch of a step: who is in it, how much each row weighs, and that its draws are independent."""

from __future__ import annotations

import pytest
import torch

from sfd_deploy.labels import MIXTURE, Labels
from sfd_deploy.training.rows import MIXED, Rows, draw_rows
from tests.conftest import TINY_LABELS
from tests.training.test_loop import tiny_config


def drawn(labels: Labels = TINY_LABELS, step: int = 0, **changes: object) -> Rows:
    return draw_rows(tiny_config(**changes), labels, (1, 16, 16), "generator", step)


def test_rows_weigh_each_part_once():
    rows = drawn()
    assert rows.weights[:6].sum().item() == pytest.approx(1.0)
    assert rows.weights[6:].sum().item() == pytest.approx(1 / 9)
    assert rows.labels[6:].tolist() == [1, 1]
    assert rows.targets[6:].tolist() == [2, 2]


def test_retained_rows_ask_for_every_retained_label_and_no_other():
    parts = [drawn(step=step)[:6] for step in range(20)]
    assert {label for part in parts for label in part.labels.tolist()} == {0, 2}
    assert all(torch.equal(part.labels, part.targets) for part in parts)


def test_every_forget_label_is_drawn_and_asks_for_its_own_override():
    """Overrides in an order of their own, so that no sorting of either side pairs them."""
    labels = Labels(class_names=tuple("abcdef"), forget={0: 5, 1: 2, 3: MIXTURE})
    parts = [drawn(labels, step)[6:] for step in range(40)]
    pairs = [pair for part in parts for pair in zip(part.labels.tolist(), part.targets.tolist(), strict=True)]
    assert set(pairs) == {(0, 5), (1, 2), (3, MIXED)}


def test_every_row_is_in_one_part_whatever_the_number_of_processes_and_parts():
    rows = drawn(step=3)
    for processes, accumulate in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 2)):
        parts = [part for process in range(processes)
                 for part in rows.parts(process * accumulate, processes * accumulate, accumulate)]  # fmt: skip
        assert sorted(torch.cat([part.position for part in parts]).tolist()) == sorted(rows.position.tolist())
    assert isinstance(rows[2:3], Rows)


def test_what_re_noises_an_image_is_independent_of_what_it_was_drawn_from():
    rows = drawn()
    both = torch.stack([rows.latents.flatten(), rows.noise.flatten()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / both.shape[1] ** 0.5  # five standard errors


def test_another_seed_draws_other_rows():
    ours, others = (drawn(seed=seed) for seed in (0, 1))
    assert not torch.equal(ours.latents, others.latents)
