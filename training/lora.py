"""LoRA (arXiv 2106.09685): a U-Net whose weights stay as they are, and an adapter that is trained in their place.

The frozen weights, the *base*, are one set of tensors in every copy of a network: teacher, fake score,
generator and its average are one U-Net in memory and an adapter each. An adapted U-Net's parameters and its
saved state are the adapter's alone, so that whatever trains, averages, saves or restores it needs no word of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfd_deploy.errors import BackendError, ConfigError
from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser
from sfd_deploy.models.text.network import PromptedUNet
from sfd_deploy.training.loop import Start
from sfd_deploy.training.streams import stream
from sfd_deploy.training.text_config import AdapterConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

ADAPTED = (nn.Linear, nn.Conv2d)
MARK = ".lora_"  # in the names of peft's weights
SUGGESTED = 12  # names that an error lists


class AdaptedUNet(PromptedUNet):
    """A ``PromptedUNet`` with an adapter inside; ``adapter`` is all that it owns.

    The U-Net is no submodule: its base is neither trained nor saved with it, and copies share it.
    """

    def __init__(self, unet: UNet2DConditionModel, table: Tensor) -> None:
        super().__init__(unet, table)
        del self.unet
        self.__dict__["unet"] = unet  # past nn.Module, which would register it
        self.adapter = nn.ParameterList(weight for name, weight in unet.named_parameters() if MARK in name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptedUNet:
        owned = set(map(id, self.adapter))
        memo.update(_shared(weight for weight in self.unet.parameters() if id(weight) not in owned))
        return super().__deepcopy__(memo)


def require_peft() -> None:
    """Raise BackendError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise BackendError("`lora` needs peft, which is not installed", "pip install 'sfd-deploy[t2i]'") from None


def adapted_start(teacher: Denoiser, start: Start, config: AdapterConfig, seed: int) -> Start:
    """Where generator and fake score start, each with an adapter of its own that changes nothing yet.

    Both share the teacher's weights; an earlier run's, where ``start`` has them, are shared with their average alone.

    Raises:
        ConfigError: a target that is no layer of the U-Net's, or none that can be adapted.
    """
    networks = {"generator": start.generator or teacher, "fake-score": start.fake_score or teacher}
    generator, fake_score = (
        adapted(network, config, stream(seed, f"{name}-adapter", 0)) for name, network in networks.items()
    )  # fmt: skip
    return Start(generator, fake_score)


def adapted(source: Denoiser, config: AdapterConfig, draws: torch.Generator) -> Denoiser:
    """``source`` with a new adapter, as good as none until it is trained; its other weights are ``source``'s own.

    Raises:
        ConfigError: as ``adapted_start``.
    """
    import peft

    require_targets(source.unet.unet, config.targets)
    denoiser = copy.deepcopy(source, _shared(source.parameters()))
    unet, table = denoiser.unet.unet, denoiser.unet.table
    with torch.random.fork_rng(devices=[]):  # peft draws from the global stream, on the CPU
        torch.manual_seed(draws.initial_seed())
        unet.add_adapter(
            peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
        )  # fmt: skip
    denoiser.unet = AdaptedUNet(unet, table)
    return denoiser


def _shared(weights: Iterable[nn.Parameter]) -> dict[int, Any]:
    """What ``copy.deepcopy`` takes as copied already."""
    return {id(weight): weight for weight in weights}


def require_targets(unet: nn.Module, targets: Iterable[str]) -> None:
    """Refuse a target that names no layer of ``unet``, by its name or the end of it, or one without a matrix.

    Raises:
        ConfigError: naming the target, and layers that could be meant.
    """
    modules = dict(unet.named_modules())
    for target in targets:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(module, ADAPTED) for module in found):
            fault = "is no layer of the U-Net" if not found else f"is a {type(found[0]).__name__}, without a matrix"
            raise ConfigError(f"lora.targets: {target} {fault}", f"take some of {', '.join(_suggested(modules))}")


def _suggested(modules: dict[str, nn.Module]) -> list[str]:
    """Attention's matrices and other layers by the end of their names, the most frequent first."""
    ends = ["to_out.0" if name.endswith("to_out.0") else name.rpartition(".")[2]
            for name, module in modules.items() if isinstance(module, ADAPTED)]  # fmt: skip
    names = {end for end in ends if not end.isdigit()}
    return sorted(names, key=lambda end: (-ends.count(end), end))[:SUGGESTED]


def merged(denoiser: Denoiser) -> Denoiser:
    """``denoiser`` with its adapter added into a copy of the weights; one without an adapter is itself."""
    adapted_unet = denoiser.unet
    if not isinstance(adapted_unet, AdaptedUNet) or not isinstance(denoiser, DiscreteDenoiser):
        return denoiser
    unet = copy.deepcopy(adapted_unet.unet)
    unet.fuse_lora()
    unet.unload_lora()
    return DiscreteDenoiser(PromptedUNet(unet, adapted_unet.table), denoiser.schedule)


def save_adapter(denoiser: Denoiser, folder: Path) -> None:
    """Write the adapter as stock pipelines load it: ``pipe.load_lora_weights(folder)``."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    unet = denoiser.unet.unet
    config = unet.peft_config["default"]
    # The scale goes into one factor: as metadata beside the format's, its place in the file would be left to chance.
    scale = {"lora_A": 1.0, "lora_B": config.lora_alpha / config.r}
    layers = {name: weight * scale[name.split(".")[-2]] for name, weight in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
