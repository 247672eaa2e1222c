"""A one-step text-to-image pipeline in somebody else's folder: its files' digest, its prompts, its noise level.

Nothing in such a folder says that it draws in one step. One of the shape of ours does: its schedule ends at the
noise level where the step starts. A schedule that goes on to pure noise is a model's of many steps too, so that
its level has to be said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfd_deploy.adopt.config import TextAdoptConfig
from sfd_deploy.adopt.source import Foreign, require_intact, require_stock
from sfd_deploy.errors import ConfigError, ModelError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser
from sfd_deploy.models.folder import read_json
from sfd_deploy.models.teachers import hash_files, unsealed
from sfd_deploy.models.text.folder import GIVE_STABLE_DIFFUSION, files_read, require_parts
from sfd_deploy.models.text.schedule import TEACHER_SIGMA, read_schedule
from sfd_deploy.prompt_lists import prompt_list
from sfd_deploy.prompts import PROMPTS_FILE, Prompts, phrase_prompts, plain_prompts, prompts_in

PIPELINES = (None, "StableDiffusionPipeline", "DiffusionPipeline")
LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}  # the last is diffusers' name for its safety checker
ONE_STEP = ("EulerDiscreteScheduler", "trailing")  # whose first timestep is the schedule's last


@dataclass(frozen=True)
class TextSource(Foreign):
    """A generator of prompts; ``guarded`` by a safety checker, which is no part of it."""

    guarded: bool

    def as_sealed(self) -> Sealed:
        """As a folder whose files are those that were hashed."""
        return unsealed(self.folder, self.folder.resolve().name, self.files, {})


def open_text_source(folder: Path) -> TextSource:
    """The files of ``folder``, hashed. A folder of ours is verified against its manifest first.

    Raises:
        ModelError: another pipeline, a part missing or pickled, code of its own, or an unknown scheduler.
        ManifestError, DigestError: a folder with a manifest that it does not match.
    """
    require_intact(folder)
    index = require_stock(folder, LIBRARIES)
    if (name := index.get("_class_name")) not in PIPELINES:
        raise ModelError(f"{folder / 'model_index.json'}: pipeline {name} is unknown", GIVE_STABLE_DIFFUSION)
    require_parts(folder)
    read_schedule(folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    guarded = index.get("safety_checker") not in (None, [None, None]) or (folder / "safety_checker").is_dir()
    return TextSource(folder, hash_files(folder, _listed(folder)), scheduler, _listed, guarded)


def _listed(folder: Path) -> list[Path]:
    besides = (folder / name for name in ("model_index.json", PROMPTS_FILE))
    return sorted({*files_read(folder), *(path for path in besides if path.is_file())})


def prompts_of(source: TextSource, config: TextAdoptConfig) -> Prompts:
    """The prompts that the generator is for, and which are claimed to be forgotten.

    Raises:
        ConfigError: nobody says.
        PromptError: a list that cannot be used, or a claim that contradicts itself.
    """
    if config.prompts is None:
        if (source.folder / PROMPTS_FILE).is_file():
            return prompts_in(source.folder)
        raise ConfigError(
            f"{source.folder}: no {PROMPTS_FILE} says which prompts it draws", "give them with --prompts FILE"
        )
    retained = prompt_list(config.prompts)
    if config.forget_prompts is None or config.concept is None or config.substitute is None:
        return plain_prompts(retained)
    return phrase_prompts(retained, prompt_list(config.forget_prompts), config.concept, config.substitute)


def ends_at_start(denoiser: Denoiser) -> bool:
    """Whether the schedule ends where one step starts, as ours do and no teacher's does."""
    return denoiser.sigma_range[1] < TEACHER_SIGMA


def start_of(denoiser: DiscreteDenoiser, source: TextSource, config: TextAdoptConfig) -> int:
    """The timestep of the one step.

    Raises:
        ConfigError: nothing says it, or what is said contradicts the folder's schedule.
        ModelError: a schedule that ends where the step would start, but a scheduler that starts elsewhere.
    """
    last, end = len(denoiser.log_sigmas) - 1, denoiser.sigma_range[1]
    said = _said(denoiser, config)
    if ends_at_start(denoiser):
        if said not in {None, last}:
            raise ConfigError(
                f"{source.folder}: its schedule ends at sigma {end:.4g}, timestep {last}, where its one step starts",
                "leave --sigma-init and --timestep out",
            )
        _require_start(source)
        return last
    if said is None:
        raise ConfigError(
            f"{source.folder}: its schedule goes on to sigma {end:.4g}, timestep {last}, as that of a model of many"
            " steps; nothing says that it draws in one",
            "if it does, say from where: --timestep T or --sigma-init S (SFD's configurations: 625 or 2.5)",
        )
    return said


def _said(denoiser: DiscreteDenoiser, config: TextAdoptConfig) -> int | None:
    if config.timestep is not None:
        if config.timestep not in range(len(denoiser.log_sigmas)):
            raise ConfigError(
                f"--timestep {config.timestep:g} is not one of its schedule",
                f"use 0 to {len(denoiser.log_sigmas) - 1}",
            )
        return int(config.timestep)
    if config.sigma_init is None:
        return None
    low, high = denoiser.sigma_range
    if not low <= config.sigma_init <= high * (1 + 1e-6):
        raise ConfigError(f"--sigma-init {config.sigma_init} is outside the schedule", f"use {low:.4g} to {high:.4g}")
    return denoiser.nearest_timestep(config.sigma_init)


def _require_start(source: TextSource) -> None:
    name, spacing = source.scheduler.get("_class_name"), source.scheduler.get("timestep_spacing", "linspace")
    if (name, spacing) != ONE_STEP:
        raise ModelError(
            f"{source.folder}: its schedule ends where one step would start, but a {name} of {spacing} spacing does not"
            " start there",
            f"save a {ONE_STEP[0]} with timestep_spacing={ONE_STEP[1]!r}",
        )
