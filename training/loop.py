"""The SFD loop: a fake-score step and a generator step in turn, each on one concatenated batch.

Three networks of one architecture: phi the frozen teacher, psi the fake score, theta the generator.
Each row has a label and a target label: the teacher is asked for the target, the override on forget
rows, so it never sees a forget label; psi and theta see the label itself.

One iteration is five calls of a network and two backward passes: ``fake_score_step`` and
``generator_step``. What goes on around the iterations is in ``course``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from sfd_deploy.errors import BackendError, ConfigError, DivergedError
from sfd_deploy.models.denoiser import Denoiser
from sfd_deploy.models.generator import OneStepGenerator, image_shape
from sfd_deploy.models.network import Ema
from sfd_deploy.progress import LOGGER
from sfd_deploy.training.conditions import Conditions
from sfd_deploy.training.config import LoopConfig
from sfd_deploy.training.distributed import Workers, local, whole_state
from sfd_deploy.training.gaps import gradient_figures
from sfd_deploy.training.guidance import UNGUIDED, Guidance
from sfd_deploy.training.losses import diff_instruct_loss, fake_score_loss, sid_loss
from sfd_deploy.training.mixture import Classify, retained_probabilities, teacher_prediction
from sfd_deploy.training.precision import autocast
from sfd_deploy.training.rows import MIXED, Rows, draw_rows
from sfd_deploy.training.schedule import linear_decay
from sfd_deploy.training.steps import LOWER_SFD_RATES, MAX_SKIPS_IN_A_ROW, all_finite
from sfd_deploy.training.streams import stream

ALONE = Workers(torch.device("cpu"))


@dataclass(frozen=True)
class Start:
    """Networks to start from in place of the teacher: an earlier run's, for a second stage or a further label."""

    generator: Denoiser | None = None
    fake_score: Denoiser | None = None


@dataclass(frozen=True)
class Pass:
    """What one part of a step computed; first dimension B. The fake-score step asks no teacher."""

    rows: Rows
    sigma: Tensor
    x: Tensor
    x_psi: Tensor
    loss: Tensor
    x_phi: Tensor | None = None


class SfdLoop:
    """The three networks, their optimisers and one iteration of them.

    Args:
        config: see ``LoopConfig``.
        labels: the conditions: what is forgotten, and for what.
        teacher: phi; it is moved to the workers' device and frozen.
        start: where theta and psi start, if not at the teacher.
        classify: for labels whose override is the mixture.
        workers: the processes, and the device.
        guidance: of teacher and fake score; the generator is never guided.

    Raises:
        ConfigError: the batch cannot be split, or noise levels are none that the teacher knows.
    """

    def __init__(
        self, config: LoopConfig, labels: Conditions, teacher: Denoiser, start: Start = Start(),
        classify: Classify | None = None, workers: Workers = ALONE, guidance: Guidance = UNGUIDED,
    ) -> None:  # fmt: skip
        workers.require_rows(config.rows(labels), config.accumulate)
        self.config, self.labels, self.classify, self.workers = config, labels, classify, workers
        self.guidance = guidance
        _require_known_levels(config, teacher)
        self.sigma_init = teacher.nearest_sigma(config.sigma_init)
        self.shape = image_shape(teacher.unet)
        self.dtype = next(teacher.parameters()).dtype
        self.teacher = teacher.to(workers.device).eval().requires_grad_(False)
        # eval(): generator and fake score run without dropout, so that both steps see one function.
        self.fake_score = copy.deepcopy(start.fake_score or teacher).to(workers.device).eval().requires_grad_(True)
        theta = copy.deepcopy(start.generator or teacher).to(workers.device).eval().requires_grad_(True)
        self.generator = OneStepGenerator(theta, self.sigma_init).eval()
        self.ema = Ema(self.generator, config.ema_decay, ramp=config.ema_ramp)
        self.fake_score_adam = _adam(self.fake_score, config.fake_score_rate)
        self.generator_adam = _adam(self.generator, config.generator_rate)
        # Looking at a sharded average takes a whole copy, filled when asked for.
        self._whole = copy.deepcopy(cast(OneStepGenerator, self.ema.network)) if workers.is_sharded else None
        # Under DDP a wrapper, which exchanges gradients, is what is called in the step that trains a network.
        self.psi = workers.prepare(self.fake_score, self.fake_score_adam)
        self.theta = workers.prepare(theta, self.generator_adam)
        workers.shard(cast(OneStepGenerator, self.ema.network).denoiser)
        if config.compile and workers.device.type != "cuda":
            raise BackendError("compile: true on a CPU, where compiled gradients are wrong", "leave `compile` out")
        self.compiled = {
            net: torch.compile(net) for net in {self.teacher, self.fake_score, self.psi, self.theta} if config.compile
        }
        self.skipped = 0
        self.skips_in_a_row = {"fake score": 0, "generator": 0}
        self.gradient_figures: dict[str, float] = {}

    def iterate(self, step: int, watched: bool = False) -> tuple[list[Pass], list[Pass]]:
        """One iteration: psi follows theta, then theta follows the teacher. ``watched`` measures gradients."""
        self._set_rates(step)
        shared = None
        if self.config.share_generated:
            rows = next(self._parts("generator", step))
            shared = (rows, self._generate(rows))
        return self.fake_score_step(step, shared, watched), self.generator_step(step, shared, watched)

    def fake_score_step(
        self, step: int, shared: tuple[Rows, Tensor] | None = None, watched: bool = False
    ) -> list[Pass]:
        """Fit psi to what the generator draws now: its images are re-noised and psi is to find them again."""
        self.fake_score.requires_grad_(True)
        self.fake_score_adam.zero_grad(set_to_none=True)
        passes: list[Pass] = []
        for rows in self._parts("fake-score", step):
            if shared is None:
                with torch.no_grad():
                    asked, x = rows, self._generate(rows)
            else:
                asked, x = shared[0], shared[1].detach()
            noisy, sigma = self._renoise(x, rows)
            ask = partial(self._predict, self.psi)
            with self.workers.gathering(self.psi, last=len(passes) + 1 == self.config.accumulate):
                x_psi = self.guidance.ask_fake_score(ask, noisy, sigma, asked, fitting=True)
                loss = fake_score_loss(x, x_psi, self.teacher.fit_weight(sigma))
                self._backward(asked.weights * loss)
            passes.append(Pass(asked, sigma, x, x_psi.detach(), loss.detach()))
        self._apply("fake score", self.fake_score, self.fake_score_adam, step, watched)
        return passes

    def generator_step(self, step: int, shared: tuple[Rows, Tensor] | None = None, watched: bool = False) -> list[Pass]:
        """Move theta along the SFD objective; phi and psi are frozen. SiD's gradients pass through their inputs."""
        self.fake_score.requires_grad_(False)
        self.generator_adam.zero_grad(set_to_none=True)
        passes: list[Pass] = []
        for rows in self._parts("generator", step):
            ask = partial(self._predict, self.fake_score)
            with self.workers.gathering(self.theta, last=len(passes) + 1 == self.config.accumulate):
                x = self._generate(rows) if shared is None else shared[1]
                with torch.set_grad_enabled(self.config.objective == "sid"):
                    noisy, sigma = self._renoise(x, rows)
                    x_psi = self.guidance.ask_fake_score(ask, noisy, sigma, rows, fitting=False)
                    x_phi = self._ask_teacher(rows, noisy, sigma, x_psi)
                loss = self._generator_loss(x, x_phi, x_psi)
                self._backward(rows.weights * loss)
            passes.append(Pass(rows, sigma, x.detach(), x_psi.detach(), loss.detach(), x_phi.detach()))
        if self._apply("generator", self.generator, self.generator_adam, step, watched):
            self.ema.update(self.generator, step)
        return passes

    def _set_rates(self, step: int) -> None:
        share = linear_decay(step, self.config.iterations, self.config.decay_share)
        rates = (self.config.fake_score_rate, self.config.generator_rate)
        for rate, adam in zip(rates, (self.fake_score_adam, self.generator_adam), strict=True):
            for group in adam.param_groups:
                group["lr"] = rate * share

    def averaged(self) -> OneStepGenerator:
        """The averaged generator, whole; every process must ask."""
        if self._whole is None:
            return cast(OneStepGenerator, self.ema.network)
        self._whole.load_state_dict(whole_state(self.ema.network))
        return self._whole

    def whole_fake_score(self) -> Denoiser:
        """The fake score, whole; every process must ask."""
        if not self.workers.is_sharded:
            return self.fake_score
        whole = copy.deepcopy(self.teacher)
        whole.load_state_dict(whole_state(self.fake_score))
        return whole

    def _parts(self, name: str, step: int) -> Iterator[Rows]:
        """The parts that fall to this process of the step's batch, in turn."""
        batch, count = draw_rows(self.config, self.labels, self.shape, name, step), self.config.accumulate
        if name == "fake-score":
            batch = self.guidance.drop(batch, stream(self.config.seed, "dropout", step))
        first, stride = self.workers.index * count, self.workers.count * count
        for part in batch.parts(first, stride, count):
            yield part.to(self.workers.device, self.dtype)

    def _generate(self, rows: Rows) -> Tensor:
        sigma = rows.latents.new_full((len(rows),), self.sigma_init)
        return self._predict(self.theta, rows.latents * self.sigma_init, sigma, rows.labels)

    def _renoise(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        sigma = self.teacher.training_sigma(rows.position, self.config.sigma_min, self.config.sigma_max)
        return x + sigma.reshape(-1, 1, 1, 1) * rows.noise, sigma

    def _ask_teacher(self, rows: Rows, noisy: Tensor, sigma: Tensor, x_psi: Tensor) -> Tensor:
        mixed, mixing = rows.targets == MIXED, None
        if self.classify is not None and bool(mixed.any()):
            with torch.no_grad():
                logits = self.classify(x_psi[mixed].clamp(-1, 1).to(torch.float32))
            mixing = (retained_probabilities(logits, self.labels.retained), self.labels.retained)
        ask = self.guidance.for_teacher(partial(self._predict, self.teacher), rows)
        return teacher_prediction(ask, noisy, sigma, rows.targets, mixing)

    def _generator_loss(self, x: Tensor, x_phi: Tensor, x_psi: Tensor) -> Tensor:
        if self.config.objective == "sid":
            return sid_loss(x, x_phi, x_psi, self.config.alpha)
        return diff_instruct_loss(x, x_phi, x_psi)

    def _predict(self, denoiser: nn.Module, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.workers.device.type, self.config.precision):
            return cast(Tensor, self.compiled.get(denoiser, denoiser)(noisy, sigma, labels))

    def _backward(self, weighted: Tensor) -> None:
        # DDP and FSDP average over processes; the batch's loss is the sum of all rows.
        (weighted.sum() * self.workers.count).backward()

    def _apply(self, name: str, network: nn.Module, adam: torch.optim.Optimizer, step: int, watched: bool) -> bool:
        gradients = [local(p.grad) for p in network.parameters() if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]  # a small weight's shard may be empty
        if watched:
            self.gradient_figures |= gradient_figures(
                name.replace(" ", "-"), gradients, self.config.clip_value, self.workers.together
            )
        if self.workers.any_of(not all_finite(gradients))[0]:
            self._count_skip(name, step)
            return False
        self.skips_in_a_row[name] = 0
        nn.utils.clip_grad_value_(network.parameters(), self.config.clip_value)
        adam.step()
        return True

    def _count_skip(self, name: str, step: int) -> None:
        self.skipped += 1
        self.skips_in_a_row[name] += 1
        LOGGER.warning("step %d of the %s skipped: non-finite gradient (%d so far)", step, name, self.skipped)
        if self.skips_in_a_row[name] >= MAX_SKIPS_IN_A_ROW:
            raise DivergedError(
                f"training diverged: {self.skips_in_a_row[name]} non-finite steps in a row at step {step}",
                LOWER_SFD_RATES,
            )


def _adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    # beta_1 = 0: SiD and SFD; momentum would chase a target that moves each step.
    return torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.999), fused=True)


def _require_known_levels(config: LoopConfig, teacher: Denoiser) -> None:
    if config.sigma_min <= teacher.sigma_min:
        raise ConfigError(
            f"sigma_min {config.sigma_min:g}: at {teacher.sigma_min:g} the teacher draws what it is given",
            "set sigma_min well above that",
        )
    low, high = teacher.sigma_range
    known = f"the teacher's noise levels go from {low:.4g} to {high:.4g}"
    if not low <= config.sigma_init <= high:
        raise ConfigError(f"sigma_init {config.sigma_init:g}: {known}", "set sigma_init to one of them")
    if config.sigma_min >= high or config.sigma_max <= low:
        levels = f"sigma_min {config.sigma_min:g} to sigma_max {config.sigma_max:g}"
        raise ConfigError(f"{levels}: {known}", "set them so that some of these are between")
