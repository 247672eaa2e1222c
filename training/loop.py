"""The SFD loop: a fake-score step and a generator step in turn, each on one concatenated batch.

Three networks of one architecture: phi the frozen teacher, psi the fake score, theta the generator.
Rows carry (label, target label, weight): the teacher is asked for the target label, the override on
forget rows, so it never sees a forget label; psi and theta see the label itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfd_deploy.errors import DivergedError
from sfd_deploy.labels import Labels
from sfd_deploy.models.denoiser import EdmDenoiser, karras_sigma
from sfd_deploy.models.generator import OneStepGenerator, image_shape
from sfd_deploy.models.network import Ema
from sfd_deploy.progress import LOGGER, progress_bar
from sfd_deploy.training.checkpoint import Checkpoint
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.losses import fake_score_loss, gap_energy, sid_loss
from sfd_deploy.training.streams import stream

CHECKPOINT_EVERY = 50
RECORD_EVERY = 10
MAX_SKIPS_IN_A_ROW = 5


@dataclass(frozen=True)
class Rows:
    """One batch's labels, target labels (what the teacher is asked for) and loss weights, each (B,)."""

    labels: Tensor
    targets: Tensor
    weights: Tensor


def draw_rows(config: TrainConfig, labels: Labels, draws: torch.Generator) -> Rows:
    """Retained rows uniform over retained labels, forget rows uniform over forget labels.

    Weights are 1/n_r on retained rows and lambda/n_f on forget rows, the same for both steps:
    unequal forget coefficients make the generator overshoot.
    """
    retained = torch.tensor(labels.retained)[
        torch.randint(len(labels.retained), (config.retained_rows,), generator=draws)
    ]
    weights = torch.full((config.retained_rows,), 1 / config.retained_rows)
    if not labels.forget:
        return Rows(retained, retained, weights)
    keys, values = torch.tensor(list(labels.forget)), torch.tensor(list(labels.forget.values()))
    which = torch.randint(len(keys), (config.forget_rows,), generator=draws)
    forget_weights = torch.full((config.forget_rows,), config.forget_weight / config.forget_rows)
    return Rows(
        torch.cat([retained, keys[which]]), torch.cat([retained, values[which]]), torch.cat([weights, forget_weights])
    )


@dataclass
class SfdLoop:
    """The three networks, their optimisers and the training record."""

    config: TrainConfig
    labels: Labels
    teacher: EdmDenoiser
    record: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        self.teacher = self.teacher.eval().requires_grad_(False)
        # eval(): generator and fake score run without dropout, so that both steps see one function.
        self.fake_score = copy.deepcopy(self.teacher).eval()
        self.generator = (
            OneStepGenerator(copy.deepcopy(self.teacher), self.config.sigma_init).eval().requires_grad_(True)
        )
        self.ema = Ema(self.generator, self.config.ema_decay)
        self.fake_score_adam = _adam(self.fake_score, self.config.fake_score_rate)
        self.generator_adam = _adam(self.generator, self.config.generator_rate)
        self.shape = image_shape(self.teacher.unet)
        self.skips_in_a_row = {id(self.fake_score): 0, id(self.generator): 0}

    def fake_score_step(self, step: int) -> dict[str, float]:
        """Fit psi to what the generator draws now."""
        draws = stream(self.config.seed, "fake-score", step)
        rows = draw_rows(self.config, self.labels, draws)
        self.fake_score.requires_grad_(True)
        with torch.no_grad():
            x = self._generate(rows, draws)
        noisy, sigma = self._renoise(x, draws)
        loss = fake_score_loss(
            x, self._predict(self.fake_score, noisy, sigma, rows.labels), sigma, self.teacher.sigma_data
        )
        self._apply((rows.weights * loss).sum(), self.fake_score, self.fake_score_adam, step)
        return {"fake_score_loss": loss.detach().mean().item() / x[0].numel()}

    def generator_step(self, step: int) -> dict[str, float]:
        """Move theta along the SFD objective; phi and psi are frozen, gradients pass through their inputs."""
        draws = stream(self.config.seed, "generator", step)
        rows = draw_rows(self.config, self.labels, draws)
        self.fake_score.requires_grad_(False)
        x = self._generate(rows, draws)
        noisy, sigma = self._renoise(x, draws)
        x_phi = self._predict(self.teacher, noisy, sigma, rows.targets)
        x_psi = self._predict(self.fake_score, noisy, sigma, rows.labels)
        loss = sid_loss(x, x_phi, x_psi, self.config.alpha)
        if self._apply((rows.weights * loss).sum(), self.generator, self.generator_adam, step):
            self.ema.update(self.generator, step)
        return {"generator_loss": loss.detach().mean().item() / x[0].numel(), **_gap_by_part(rows, x_phi, x_psi)}

    def run(self, checkpoint_file: Path) -> OneStepGenerator:
        """Train to the end, resuming from ``checkpoint_file``; returns the averaged generator.

        Raises:
            DivergedError: the loss stayed non-finite.
        """
        checkpoint = Checkpoint(
            checkpoint_file,
            {"generator": self.generator, "fake_score": self.fake_score, "ema": self.ema.network},
            {"generator_adam": self.generator_adam, "fake_score_adam": self.fake_score_adam},
            {**self.config.resolved(), "labels": self.labels.resolved()},
        )
        step, notes = checkpoint.restore()
        self.record, self.skipped = notes.get("record", []), notes.get("skipped", 0)
        with progress_bar("forget", self.config.iterations, step) as advance:
            while step < self.config.iterations:
                figures = self.fake_score_step(step) | self.generator_step(step)
                step += 1
                advance(1, f"gap {figures['gap_retained']:.4f}")
                if step % RECORD_EVERY == 0 or step == self.config.iterations:
                    self.record.append({"step": step, **figures})
                    LOGGER.info("train %s", self.record[-1])
                if step % CHECKPOINT_EVERY == 0 or step == self.config.iterations:
                    checkpoint.save(step, {"record": self.record, "skipped": self.skipped})
        return self.ema.network  # type: ignore[return-value]

    def _generate(self, rows: Rows, draws: torch.Generator) -> Tensor:
        latents = torch.randn((len(rows.labels), *self.shape), generator=draws)
        with self._autocast():
            return self.generator.unclamped(latents, rows.labels)

    def _renoise(self, x: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        position = torch.rand(len(x), generator=draws)
        sigma = karras_sigma(position, self.config.sigma_min, self.config.sigma_max)
        noise = torch.randn(x.shape, generator=draws)
        return x + sigma.reshape(-1, 1, 1, 1) * noise, sigma

    def _predict(self, denoiser: EdmDenoiser, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return denoiser(noisy, sigma, labels)  # type: ignore[no-any-return]

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16")

    def _apply(self, loss: Tensor, network: nn.Module, adam: torch.optim.Optimizer, step: int) -> bool:
        adam.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if not (torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)):
            self._count_skip(network, step)
            return False
        self.skips_in_a_row[id(network)] = 0
        nn.utils.clip_grad_value_(network.parameters(), self.config.clip_value)
        adam.step()
        return True

    def _count_skip(self, network: nn.Module, step: int) -> None:
        self.skipped += 1
        self.skips_in_a_row[id(network)] += 1
        LOGGER.warning("step %d skipped: non-finite loss or gradient (%d so far)", step, self.skipped)
        if self.skips_in_a_row[id(network)] >= MAX_SKIPS_IN_A_ROW:
            raise DivergedError(
                f"training diverged: {self.skips_in_a_row[id(network)]} non-finite steps in a row at step {step}",
                "lower generator_rate and fake_score_rate, or alpha, in the config",
            )


def _adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    # beta_1 = 0: SiD and SFD; momentum would chase a target that moves each step.
    return torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.999), fused=True)


def _gap_by_part(rows: Rows, x_phi: Tensor, x_psi: Tensor) -> dict[str, Any]:
    energy = gap_energy(x_phi, x_psi)
    forgotten = rows.labels != rows.targets
    parts = {"gap_retained": energy[~forgotten]}
    if forgotten.any():
        parts["gap_forget"] = energy[forgotten]
    return {name: part.mean().item() for name, part in parts.items()}
