"""Which scheduler makes which parameterisation of a network: a diffusers folder as a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfd_deploy.errors import ModelError
from sfd_deploy.models.folder import AS_UNET, Layout, find_layout, read_json, read_weights, reason_of

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from sfd_deploy.models.denoiser import Denoiser


def read_denoiser(folder: Path, sigma_data: float | None = None) -> Denoiser:
    """The denoiser of a diffusers folder, frozen; ``sigma_data`` says that a network without scheduler is EDM's.

    Raises:
        ModelError: a layout, network, parameterisation or weight file that cannot be used.
    """
    layout = find_layout(folder)
    layout.network_config()
    build = denoiser_builder(layout, sigma_data)
    return build(_read_network(layout.network))


def denoiser_builder(layout: Layout, sigma_data: float | None = None) -> Callable[[UNet2DModel], Denoiser]:
    """What puts a network under the parameterisation that the scheduler's config says; reads no weights.

    Raises:
        ModelError: there is no config, or what it says is unknown or contradicts itself.
    """
    from sfd_deploy.models.denoiser import EdmDenoiser

    if layout.scheduler is not None:
        config, where = read_json(layout.scheduler), layout.scheduler
    elif sigma_data is not None:
        return lambda unet: EdmDenoiser(unet, sigma_data)
    else:
        raise ModelError(
            f"{layout.network}: prediction type missing: no scheduler_config.json beside it",
            "save the scheduler that the model was trained with into scheduler/",
        )
    return _builder(config, where)


def _builder(config: Mapping[str, Any], where: Path) -> Callable[[UNet2DModel], Denoiser]:
    from sfd_deploy.models.denoiser import EdmDenoiser, FlowDenoiser

    name = config.get("_class_name")
    if name in {"DDPMScheduler", "DDIMScheduler"}:
        return _discrete_builder(config, where)
    if name == "FlowMatchEulerDiscreteScheduler":
        if config.get("invert_sigmas"):
            raise ModelError(f"{where}: invert_sigmas: its times run from images to noise",
                             "give a model whose noise falls with its timestep")  # fmt: skip
        timesteps = int(_number(config, "num_train_timesteps", 1000, where))
        return lambda unet: FlowDenoiser(unet, timesteps)
    if name == "CMStochasticIterativeScheduler":
        # What is missing is diffusers' default.
        low, data = _number(config, "sigma_min", 0.002, where, least=0), _number(config, "sigma_data", 0.5, where)
        return lambda unet: EdmDenoiser(unet, data, sigma_min=low)
    if name in {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}:
        if (predicted := config.get("prediction_type", "epsilon")) != "epsilon":
            raise ModelError(
                f"{where}: {predicted} on a schedule that does not preserve variance",
                "v-prediction needs a DDPMScheduler or DDIMScheduler",
            )
        data = _number(config, "sigma_data", 0.5, where)
        return lambda unet: EdmDenoiser(unet, data, timestep_scale=0.25)
    raise ModelError(
        f"{where}: scheduler {name} is unknown",
        "save a DDPM, DDIM, EDM Euler or flow-matching Euler scheduler of the schedule that the model was trained on",
    )


def _number(config: Mapping[str, Any], key: str, default: float, where: Path, least: float | None = None) -> float:
    """A scheduler's number, above 0 or at least ``least``."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or not (value > 0 if least is None else value >= least):
        raise ModelError(f"{where}: {key} is {value!r}", "save the scheduler that the model was trained with")
    return float(value)


def _discrete_builder(config: Mapping[str, Any], where: Path) -> Callable[[UNet2DModel], Denoiser]:
    import diffusers

    from sfd_deploy.models.denoiser import PREDICTIONS, DiscreteDenoiser, log_sigmas_of

    predicted = config.get("prediction_type")
    if predicted not in PREDICTIONS:
        fault = "prediction type missing" if predicted is None else f"prediction type {predicted!r} is unknown"
        raise ModelError(f"{where}: {fault}", f"write prediction_type: {', '.join(PREDICTIONS)}")
    try:
        scheduler = getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: not a schedule that diffusers makes ({reason_of(error)})", "mend the config"
        ) from None
    try:
        log_sigmas_of(scheduler)
    except ModelError as error:
        raise ModelError(f"{where}: {error.what}", error.mend) from None
    return lambda unet: DiscreteDenoiser(unet, scheduler)


def _read_network(folder: Path) -> UNet2DModel:
    import torch
    from diffusers import UNet2DModel

    unet: UNet2DModel = read_weights(UNet2DModel, folder, AS_UNET)
    return unet.to(memory_format=torch.channels_last)
