"""A denoiser as a plain diffusers folder: where network and scheduler lie, and weights read and written.

Two layouts: ``unet/`` and ``scheduler/`` below one folder, as pipelines are saved; or a bare network
(``config.json``) with ``scheduler_config.json`` beside it. Only JSON and safetensors are ever read, and only
classes that we name are ever made, whatever a config asks for: which scheduler makes what is in ``parameterisation``.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfd_deploy.errors import ModelError

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from sfd_deploy.models.denoiser import Denoiser

MOST_CHANNELS = 4
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WHOLE = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-0")  # or the first of several parts
AS_UNET = "save it from diffusers with UNet2DModel.save_pretrained(FOLDER, safe_serialization=True)"


@dataclass(frozen=True)
class Layout:
    """Where a diffusers folder keeps its network and its scheduler config (None: it has none)."""

    network: Path
    scheduler: Path | None

    def files(self, folder: Path) -> list[Path]:
        """What is read of the folder, sorted."""
        network = [path for path in self.network.iterdir() if path.suffix in {".json", ".safetensors"}]
        index = folder / "model_index.json"
        return sorted({*network, *([self.scheduler] if self.scheduler else []), *([index] if index.is_file() else [])})

    def network_config(self) -> dict[str, Any]:
        """The network's config.

        Raises:
            ModelError: not a class-conditional image network that this method can take.
        """
        return require_usable(read_json(self.network / "config.json"), self.network)


def find_layout(folder: Path) -> Layout:
    """The layout of ``folder``.

    Raises:
        ModelError: neither of the two, or its weights are pickles.
    """
    network = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (network / "config.json").is_file():
        raise ModelError(
            f"{folder}: neither unet/config.json nor config.json in it",
            "give a diffusers pipeline or UNet2DModel folder",
        )
    names = [path.name for path in network.glob("*.safetensors")]
    if not names:
        raise no_weights(network, AS_UNET)
    if not any(name.startswith(WHOLE) for name in names):
        raise ModelError(f"{network}: only a variant of the weights, {min(names)}", AS_UNET)
    configs = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    return Layout(network, next((path for path in configs if path.is_file()), None))


def no_weights(network: Path, mend: str) -> ModelError:
    """What is wrong with a folder in which no safetensors lie: nothing does, or a pickle."""
    pickles = sorted(path.name for pattern in PICKLES for path in network.glob(pattern))
    found = f"only {pickles[0]}, a pickle that could run code" if pickles else "no weights"
    return ModelError(f"{network}: {found}", mend)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: unreadable, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{path}: not readable JSON", "save the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", "save the model again")
    return value


def require_usable(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """``config`` if it is that of a class-conditional ``UNet2DModel`` with images in and images out.

    Raises:
        ModelError: naming what is in the way.
    """
    name = config.get("_class_name")
    if name != "UNet2DModel":
        raise ModelError(f"{where}: the network is a {name}, not a UNet2DModel", "give a class-conditional image model")
    if config.get("num_class_embeds") is None or config.get("class_embed_type") is not None:
        raise ModelError(
            f"{where}: the network takes no class labels (num_class_embeds), so no class can be forgotten",
            "give a class-conditional model",
        )
    config = {"in_channels": 3, "out_channels": 3} | config  # what is missing is diffusers' default
    if config["in_channels"] != config["out_channels"]:
        raise ModelError(
            f"{where}: {config['in_channels']} channels in, {config['out_channels']} out: a learned variance",
            "give a model that predicts the mean alone",
        )
    if config.get("time_embedding_type", "positional") != "positional":
        raise ModelError(
            f"{where}: time_embedding_type is {config['time_embedding_type']}",
            "give a model with positional embeddings",
        )
    _require_sizes(config, where)
    return config


def _require_sizes(config: dict[str, Any], where: Path) -> None:
    """Refuse a network config whose numbers are none, or those of no image."""
    size = config.get("sample_size")
    if size is None:
        raise ModelError(f"{where}: its config has no sample_size", "add the image size to config.json")
    sides = [size] if isinstance(size, int) else size if isinstance(size, list) and len(size) == 2 else [None]
    counts = {
        "sample_size": sides,
        "num_class_embeds": [config["num_class_embeds"]],
        "in_channels": [config["in_channels"]],
    }
    for key, values in counts.items():
        # A bool is an int to Python, and none to a network.
        if not all(type(value) is int and value > 0 for value in values):
            raise ModelError(f"{where}: {key} is {config[key]!r}", "mend config.json")
    if config["in_channels"] > MOST_CHANNELS:
        raise ModelError(
            f"{where}: {config['in_channels']} channels, where an image has at most {MOST_CHANNELS}",
            "give an image model",
        )


def reason_of(error: Exception) -> str:
    """What a library's error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_weights(kind: Any, folder: Path, mend: str, **options: Any) -> Any:
    """A diffusers or transformers network of class ``kind`` from its folder's safetensors, frozen, ready for use.

    Raises:
        ModelError: unreadable weights, or others than its config asks for.
    """
    from safetensors import SafetensorError

    # Of diffusers or of transformers: bars of their own between our lines.
    importlib.import_module(f"{kind.__module__.partition('.')[0]}.utils.logging").disable_progress_bar()
    try:
        network, found = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, SafetensorError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder}: its weights cannot be loaded ({reason_of(error)})", f"fetch it again, or {mend}"
        ) from None
    # Both libraries only log these, and leave what is missing at random numbers.
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := found[fault]:
            raise ModelError(
                f"{folder}: weights do not fit config.json ({fault.replace('_', ' ')}: {sorted(keys)[0]})", mend
            )
    if hasattr(network, "register_to_config"):
        # diffusers would write this machine's path into the config of whatever is made of it.
        network.register_to_config(_name_or_path=None)
    return network.eval().requires_grad_(False)


def write_denoiser(denoiser: Denoiser, folder: Path, scheduler: Any) -> None:
    """Write the network to ``folder/unet`` and ``scheduler``'s config to ``folder/scheduler``."""
    contiguous(denoiser.unet).save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")


def contiguous(unet: UNet2DModel) -> UNet2DModel:
    """Safetensors stores row-major tensors only; training keeps them channels-last."""
    import torch

    return unet.to(memory_format=torch.contiguous_format)
