"""The official SFD schedule for prompts, read literally: ``official`` with guidance and empty prompts.

Teacher and fake score are guided, the generator never is. A guided prediction is two calls of the network, with the
prompt and without, each with rows of its own; the official code makes one call of both. So an iteration is sixteen
calls, and four backward calls. Each step chooses prompts of its own, and no average is kept.

Notation: x_c, x_u predictions at the prompt and at what is guided away from, the empty prompt or a negative prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.official import OfficialSchedule, Term
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.prompts import Prompts
from sfd_deploy.training.text_config import TextTrainConfig


class OfficialTextSchedule(OfficialSchedule):
    """``OfficialSchedule`` over ``prompts``, guided as ``config.guidance`` says."""

    def __init__(self, config: TextTrainConfig, prompts: Prompts, teacher: Denoiser, device: str = "cpu") -> None:
        super().__init__(config, prompts, teacher, device)
        del self.ema
        self.guidance, self.empty = config.guidance, prompts.unconditional
        negative = [prompts.negatives.get(prompt, self.empty) for prompt in range(prompts.count)]
        self.negative = torch.tensor(negative, device=device)  # by the row's prompt, not by what the teacher is asked

    def iterate(self, step: int) -> None:
        """One iteration; prompts are left empty in psi's step alone, before the generator draws."""
        self.fake_score_step([self.drop(prompts) for prompts in self.choose_all()])
        self.generator_step(self.choose_all())

    def drop(self, asked: Tensor) -> Tensor:
        """``asked`` with a share left empty, where psi is guided."""
        if not self.guidance.guides_fake_score:
            return asked
        dropped = torch.rand(len(asked), generator=self.draws) < self.guidance.dropout
        return asked.masked_fill(dropped, self.empty)

    def ask_fake_score(self, noisy: Tensor, term: Term, *, fitting: bool) -> Tensor:
        """x_psi, guided by kappa_1 or kappa_2."""
        scale = self.guidance.fake_score_fit if fitting else self.guidance.fake_score
        empty = torch.full_like(term.labels, self.empty)
        away = self.negative[term.labels] if self.guidance.fake_score_negative else empty
        return _guided(self.psi, noisy, term.sigma, term.labels, away, scale)

    def ask_teacher(self, noisy: Tensor, term: Term) -> Tensor:
        """x_phi, guided by kappa_4."""
        away = self.negative[term.labels]
        return _guided(self.phi, noisy, term.sigma, term.targets, away, self.guidance.teacher)


def _guided(network: Denoiser, noisy: Tensor, sigma: Tensor, asked: Tensor, away: Tensor, scale: float) -> Tensor:
    x_c: Tensor = network(noisy, sigma, asked)
    if scale == 1:
        return x_c
    x_u: Tensor = network(noisy, sigma, away)
    return x_u + scale * (x_c - x_u)
