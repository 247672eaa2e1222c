"""Noise schedules of text-to-image pipelines: the one that a U-Net was trained on, and where its one step starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfd_deploy.errors import ModelError
from sfd_deploy.models.denoiser import PREDICTIONS, Denoiser, DiscreteDenoiser
from sfd_deploy.models.folder import read_json

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

# The part of a scheduler's config that says what the network was trained on; the rest is about drawing.
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
            "rescale_betas_zero_snr")  # fmt: skip
# Schedulers whose sigmas follow from those betas, so that any of them tells the schedule.
SCHEDULERS = {
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
TEACHER_SIGMA = 10.0  # a teacher's schedule reaches beyond; that of a one-step generator ends at its sigma_init


def read_schedule(folder: Path) -> DDIMScheduler:
    """The schedule that a pipeline's U-Net was trained on, whichever scheduler its folder draws with.

    Raises:
        ModelError: unreadable, or none that a variance-preserving U-Net is trained on.
    """
    from diffusers import DDIMScheduler

    where = folder / "scheduler" / "scheduler_config.json"
    config = read_json(where)
    if (name := config.get("_class_name")) not in SCHEDULERS:
        raise ModelError(f"{where}: scheduler {name} is unknown", f"save one of {', '.join(sorted(SCHEDULERS))}")
    if (predicted := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
        raise ModelError(f"{where}: prediction type {predicted!r} is unknown", f"use {', '.join(PREDICTIONS)}")
    try:
        # What is missing is every one of these schedulers' default. Latents are never clipped.
        scheduler: DDIMScheduler = DDIMScheduler.from_config(
            {key: config[key] for key in SCHEDULE if key in config}, clip_sample=False, set_alpha_to_one=False,
            steps_offset=1,
        )  # fmt: skip
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: not a schedule that diffusers makes ({error})", "mend the config") from None
    return scheduler


def require_teacher_schedule(scheduler: DDIMScheduler, where: Path) -> None:
    """Refuse a one-step generator: its schedule ends at the one noise level that it draws from.

    Raises:
        ModelError: that one's noise level.
    """
    last = scheduler.alphas_cumprod.double()[-1]
    if (sigma := ((1 - last) / last).sqrt().item()) < TEACHER_SIGMA:
        raise ModelError(
            f"{where}: its schedule ends at noise level {sigma:.3g}: a one-step generator, not a teacher",
            "give the model it was distilled from",
        )


def one_step_scheduler(denoiser: Denoiser, sigma_init: float) -> EulerDiscreteScheduler:
    """The stock scheduler whose only step starts at ``sigma_init``: the denoiser's schedule, cut off there.

    Raises:
        ModelError: a parameterisation without a schedule of timesteps.
    """
    from diffusers import EulerDiscreteScheduler

    if not isinstance(denoiser, DiscreteDenoiser):
        raise ModelError(f"{type(denoiser).__name__}: no stock pipeline draws text with it", "use a DDPM schedule")
    last = denoiser.nearest_timestep(sigma_init)
    # steps_offset has no part in trailing spacing; at another value the stock pipeline says it is outdated.
    return EulerDiscreteScheduler(
        num_train_timesteps=last + 1, prediction_type=denoiser.prediction_type, timestep_spacing="trailing",
        steps_offset=1, **_cut_betas(denoiser, last),
    )  # fmt: skip


def _cut_betas(denoiser: DiscreteDenoiser, last: int) -> dict[str, Any]:
    """Keys that give the schedule's first ``last + 1`` betas: a formula where a shorter schedule has one."""
    config = denoiser.schedule.config
    if config.beta_schedule != "scaled_linear" or config.trained_betas is not None or config.rescale_betas_zero_snr:
        return {"trained_betas": denoiser.schedule.betas[: last + 1].tolist()}
    low, high = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    share = last / (config.num_train_timesteps - 1)
    return {
        "beta_schedule": "scaled_linear", "beta_start": config.beta_start, "beta_end": (low + share * (high - low)) ** 2
    }  # fmt: skip
