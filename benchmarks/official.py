"""The official SFD schedule, read literally, as plain torch: what ours is timed against, and a reference for tests.

An iteration is a fake-score step, then a generator step. Each has a retained and a forget term of the same number
of images, and each term its own labels, latents, noise levels and noise, its own network calls and its own backward
call: ten forward passes and four backward calls. FP32, no channels-last, nothing compiled, nothing shared.

Written from the method's description and apart from ``training/``, which computes both terms in one batch: the two
must agree, but for a mixture override, where this asks the teacher for one retained label: for its cost alone. One
thing is ours: the generator's average is ramped, else 400 iterations would still hold the start.
Notation: phi teacher, psi fake score, theta generator; x_phi, x_psi clean-image predictions at the re-noised x.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfd_deploy.labels import MIXTURE
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator, image_shape
from sfd_deploy.models.network import Ema
from sfd_deploy.training.conditions import Conditions
from sfd_deploy.training.config import LoopConfig


@dataclass(frozen=True)
class Term:
    """What one term draws, each with a first dimension of n; the teacher is asked for ``targets``."""

    labels: Tensor
    targets: Tensor
    latents: Tensor
    sigma: Tensor
    noise: Tensor


class OfficialSchedule:
    """Three row-major FP32 copies of ``teacher``, two Adams, one iteration at a time; n is ``config.retained_rows``."""

    def __init__(self, config: LoopConfig, labels: Conditions, teacher: Denoiser, device: str = "cpu") -> None:
        self.config, self.labels, self.device = config, labels, device
        self.phi = _row_major(teacher, device).requires_grad_(False)
        self.psi = _row_major(teacher, device)
        self.theta = OneStepGenerator(_row_major(teacher, device), config.sigma_init)
        self.ema = Ema(self.theta, config.ema_decay)
        self.psi_adam = _adam(self.psi, config.fake_score_rate)
        self.theta_adam = _adam(self.theta, config.generator_rate)
        self.draws = torch.Generator().manual_seed(config.seed)

    @property
    def retained_images(self) -> int:
        """Retained images an iteration draws for the generator's step."""
        return self.config.retained_rows

    def iterate(self, step: int) -> None:
        """One iteration. The generator's step reuses the labels of the fake score's, as the official code does."""
        asked = self.choose_all()
        self.fake_score_step(asked)
        self.generator_step(asked)
        self.ema.update(self.theta, step)

    def fake_score_step(self, asked: list[Tensor]) -> None:
        """Fit psi, a term for each of ``asked``: retained labels, then forget labels where something is forgotten."""
        self.psi.requires_grad_(True)
        self.psi_adam.zero_grad()
        for weight, labels in zip((1.0, self.config.forget_weight), asked, strict=False):
            (weight * self.fake_score_term(self.draw(labels))).backward()
        nn.utils.clip_grad_value_(self.psi.parameters(), self.config.clip_value)
        self.psi_adam.step()
        self.psi.requires_grad_(False)

    def generator_step(self, asked: list[Tensor]) -> None:
        """Move theta, a term for each of ``asked``."""
        self.theta_adam.zero_grad()
        for weight, labels in zip((1.0, self.config.forget_weight), asked, strict=False):
            (weight * self.generator_term(self.draw(labels))).backward()
        nn.utils.clip_grad_value_(self.theta.parameters(), self.config.clip_value)
        self.theta_adam.step()

    def fake_score_term(self, term: Term) -> Tensor:
        """Mean over images of the weighted squared error, summed over the values of an image."""
        with torch.no_grad():
            x = self.theta.unclamped(term.latents, term.labels)
        x_psi = self.ask_fake_score(renoised(x, term), term, fitting=True)
        error: Tensor = ((x_psi - x) ** 2).sum((1, 2, 3))
        return (self.psi.fit_weight(term.sigma) * error).mean()

    def generator_term(self, term: Term) -> Tensor:
        """Mean over images of sum (x_phi - x_psi) ((x_phi - x) - alpha (x_phi - x_psi)) / omega."""
        x = self.theta.unclamped(term.latents, term.labels)
        noisy = renoised(x, term)
        x_psi = self.ask_fake_score(noisy, term, fitting=False)
        x_phi = self.ask_teacher(noisy, term)
        with torch.no_grad():
            omega = (x_phi - x).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        loss: Tensor = (x_phi - x_psi) * ((x_phi - x) - self.config.alpha * (x_phi - x_psi)) / omega
        return loss.sum((1, 2, 3)).mean()

    def ask_fake_score(self, noisy: Tensor, term: Term, *, fitting: bool) -> Tensor:
        """x_psi, in psi's own step (``fitting``) or in theta's."""
        clean: Tensor = self.psi(noisy, term.sigma, term.labels)
        return clean

    def ask_teacher(self, noisy: Tensor, term: Term) -> Tensor:
        """x_phi."""
        clean: Tensor = self.phi(noisy, term.sigma, term.targets)
        return clean

    def choose_all(self) -> list[Tensor]:
        """Retained labels, and forget labels where something is forgotten."""
        forget = tuple(self.labels.forget)
        return [self.choose(labels) for labels in (self.labels.retained, forget) if labels]

    def choose(self, labels: tuple[int, ...]) -> Tensor:
        """Labels (n,), uniform over ``labels``."""
        return torch.tensor(labels)[torch.randint(len(labels), (self.config.retained_rows,), generator=self.draws)]

    def draw(self, labels: Tensor) -> Term:
        """Fresh latents, noise levels and noise for ``labels``."""
        size = (len(labels), *image_shape(self.phi.unet))
        latents, position, noise = (
            torch.randn(size, generator=self.draws), torch.rand(len(labels), generator=self.draws),
            torch.randn(size, generator=self.draws),
        )  # fmt: skip
        sigma = self.phi.training_sigma(position, self.config.sigma_min, self.config.sigma_max)
        targets = torch.tensor([self._target(label) for label in labels.tolist()])
        return Term(*(value.to(self.device) for value in (labels, targets, latents, sigma, noise)))

    def _target(self, label: int) -> int:
        override = self.labels.forget.get(label, label)
        return self.labels.retained[0] if override == MIXTURE else override


def renoised(x: Tensor, term: Term) -> Tensor:
    """``x`` at the term's noise levels; x is not detached."""
    return x + term.sigma.reshape(-1, 1, 1, 1) * term.noise


def _row_major(teacher: Denoiser, device: str) -> Denoiser:
    network = copy.deepcopy(teacher).to(device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network.eval().requires_grad_(True)  # type: ignore[no-any-return]


def _adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.999))
