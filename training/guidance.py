"""Classifier-free guidance of teacher and fake score, long and short (SiD-LSG, arXiv 2406.01561).

Notation: x_c, x_u the clean-image predictions at a row's condition and at what it is guided away from, the
empty prompt or a negative prompt; kappa the scale. With kappa_1 (fitting psi) equal to kappa_2 (asking psi in
theta's step) the *guided* fake score is the fitted denoiser of what the generator draws, so that the
generator comes to match the guided teacher. The generator itself is never guided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfd_deploy.models.sampler import Predict, guided
from sfd_deploy.training.rows import Rows


@dataclass(frozen=True)
class Guidance:
    """How each network is guided, bound to the conditions' numbers.

    Args:
        fake_score_fit: kappa_1, psi while it is fitted.
        fake_score: kappa_2, psi in theta's step.
        teacher: kappa_4, phi.
        dropout: share of rows that are asked without a prompt in psi's step.
        unconditional: the empty prompt's number.
        away: per condition of a row, what is guided away from there: a negative prompt's number where it is
            forgotten by one, else the empty prompt's. Empty: always the empty prompt's.
        fake_score_away: psi too is guided away from the negative prompt on forget rows.
    """

    fake_score_fit: float = 1.0
    fake_score: float = 1.0
    teacher: float = 1.0
    dropout: float = 0.0
    unconditional: int = 0
    away: tuple[int, ...] = ()
    fake_score_away: bool = False

    def drop(self, rows: Rows, draws: torch.Generator) -> Rows:
        """``rows`` with a share asked without a prompt, before the generator draws: psi("") learns G("").

        Their label and their target are the empty prompt; a dropped forget row keeps its weight, lambda / n_f.
        """
        if self.dropout == 0:
            return rows
        dropped = torch.rand(len(rows), generator=draws) < self.dropout
        labels, targets = (values.masked_fill(dropped, self.unconditional) for values in (rows.labels, rows.targets))
        return replace(rows, labels=labels, targets=targets)

    def ask_fake_score(self, predict: Predict, noisy: Tensor, sigma: Tensor, rows: Rows, *, fitting: bool) -> Tensor:
        """x_psi at the rows' own conditions, guided by kappa_1 or kappa_2."""
        scale = self.fake_score_fit if fitting else self.fake_score
        away = self._away(rows) if self.fake_score_away else torch.full_like(rows.labels, self.unconditional)
        return guided(predict, noisy, sigma, rows.labels, away, scale)

    def for_teacher(self, predict: Predict, rows: Rows) -> Predict:
        """``predict`` guided by kappa_4, for the rows' targets."""
        return lambda noisy, sigma, asked: guided(predict, noisy, sigma, asked, self._away(rows), self.teacher)

    def _away(self, rows: Rows) -> Tensor:
        if not self.away:
            return torch.full_like(rows.labels, self.unconditional)
        # By what the row forgets, not by what the teacher is asked: two forget prompts may share an override.
        return torch.tensor(self.away, device=rows.labels.device)[rows.labels]


UNGUIDED = Guidance()
