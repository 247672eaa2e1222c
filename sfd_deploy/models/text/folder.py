"""Stable-Diffusion-shaped pipelines as folders: five parts, each as its own library saves it.

``tokenizer/``, ``text_encoder/``, ``unet/``, ``vae/`` and ``scheduler/`` below one folder, from anybody or one
of ours. Only JSON, merges and safetensors are read, never a pickle or a folder's own code, and only the classes
named here are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfd_deploy.errors import ModelError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.folder import no_weights, read_json, read_weights
from sfd_deploy.models.generator import require_finite_weights
from sfd_deploy.models.teachers import hash_files, open_reference, unsealed
from sfd_deploy.models.text.schedule import read_schedule, require_teacher_schedule
from sfd_deploy.models.text.tokens import read_tokenizer, transformers

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

# What each network's folder holds: the class that its config names, and its weights' file name.
NETWORKS = {
    "text_encoder": ("CLIPTextModel", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}
CONFIGS = {
    "tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json",
    **dict.fromkeys(NETWORKS, "config.json"),
}  # fmt: skip
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.json")  # fmt: skip
SAVE_AGAIN = "save the pipeline from diffusers with save_pretrained(FOLDER, safe_serialization=True)"
GIVE_STABLE_DIFFUSION = "give a Stable Diffusion 1.x or 2.x pipeline"
# What a hand-written config may leave out: the libraries' defaults.
UNET_DEFAULTS = {"sample_size": None, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280}
DEFAULT_WIDTH = 512
PADDED_ROWS = 128  # vocabularies are filled up to a multiple of this, at most


def _patterns(stem: str) -> tuple[str, ...]:
    """Full-precision weights, whole or in shards; not the variants (``model.fp16.safetensors``) beside them."""
    return (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-?????-of-?????.safetensors")


# Every file that is ever read, as patterns below a pipeline's folder.
READ = (
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *(f"{part}/{config}" for part, config in CONFIGS.items()),
    *(f"{part}/{name}" for part, (_, stem) in NETWORKS.items() for name in _patterns(stem)),
)


@dataclass(frozen=True)
class TextParts:
    """The parts of a pipeline, frozen, in float32.

    ``scheduler`` holds the schedule that the U-Net was trained on; ``folder`` is what errors name.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    folder: Path = Path("teacher")


def open_text_teacher(reference: str | Path, *, revision: str | None = None) -> Sealed:
    """The verified text-to-image teacher that ``reference`` names; no weight is loaded yet.

    A folder that ``sfd-deploy teacher`` sealed, a shipped one's name, anybody's pipeline folder, or a model
    hub's ``owner/name[@revision]``. Facts of a foreign one: ``image_shape`` (C, H, W) of its latents, ``reference``.

    Raises:
        RunError: no such folder, shipped teacher or hub model.
        ModelError: a part is missing, a pickle, of another class, or does not fit its neighbour.
        ManifestError, DigestError: a sealed folder is not what its manifest says.
    """
    sealed = open_reference(reference, _describe, READ, revision)
    require_parts(sealed.folder)
    require_teacher_schedule(read_schedule(sealed.folder), sealed.folder)
    return sealed


def _describe(folder: Path, name: str, reference: str) -> Sealed:
    require_parts(folder)  # before gigabytes are hashed
    unet = _unet_config(folder)
    size = unet["sample_size"]
    facts = {
        "image_shape": [unet["in_channels"], *([size, size] if isinstance(size, int) else size)],
        "reference": reference,
    }
    return unsealed(folder, name, hash_files(folder, files_read(folder)), facts)


def files_read(folder: Path) -> list[Path]:
    """Every file of a pipeline folder that is ever read, sorted."""
    return sorted({path for pattern in READ for path in folder.glob(pattern)})


def require_parts(folder: Path) -> None:
    """Refuse a folder that is no Stable-Diffusion-shaped pipeline, by its configs alone.

    Raises:
        ModelError: naming the part and what is in the way.
    """
    for part, config in CONFIGS.items():
        if not (folder / part / config).is_file():
            raise ModelError(
                f"{folder}: no {part} ({part}/{config} is missing)", "a pipeline has " + ", ".join(sorted(CONFIGS))
            )
    for part, (kind, stem) in NETWORKS.items():
        _require_class(folder / part, kind)
        if not any((folder / part / name).is_file() for name in _patterns(stem)[:2]):
            raise no_weights(folder / part, f"{SAVE_AGAIN}: {stem}.safetensors is read")
    unet = _unet_config(folder)
    _require_plain_unet(unet, folder / "unet")
    encoder, vae = (read_json(folder / part / "config.json") for part in ("text_encoder", "vae"))
    _require_joints(unet, encoder, vae, folder)


def _unet_config(folder: Path) -> dict[str, Any]:
    return UNET_DEFAULTS | read_json(folder / "unet" / "config.json")


def _require_class(part: Path, kind: str) -> None:
    config = read_json(part / "config.json")
    named = config.get("_class_name", next(iter(config.get("architectures") or []), None))
    if named != kind:
        raise ModelError(f"{part}: is a {named}, not a {kind}", GIVE_STABLE_DIFFUSION)


def _require_plain_unet(config: dict[str, Any], where: Path) -> None:
    if config["in_channels"] != config["out_channels"]:
        raise ModelError(
            f"{where}: {config['in_channels']} channels in, {config['out_channels']} out",
            f"{GIVE_STABLE_DIFFUSION} that draws from text alone",
        )
    # Each asks for a further input besides latents, timestep and prompt.
    for key in ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim",
                "encoder_hid_dim_type"):  # fmt: skip
        if config.get(key) is not None:
            raise ModelError(f"{where}: {key} is {config[key]}, an input besides the prompt", GIVE_STABLE_DIFFUSION)
    if config["sample_size"] is None:
        raise ModelError(f"{where}: its config has no sample_size", "add the latents' size to config.json")


def _require_joints(unet: dict[str, Any], encoder: dict[str, Any], vae: dict[str, Any], where: Path) -> None:
    width, asked = encoder.get("hidden_size", DEFAULT_WIDTH), unet["cross_attention_dim"]
    if set(asked if isinstance(asked, list) else [asked]) != {width}:
        raise ModelError(
            f"{where}: text_encoder gives vectors of {width}, unet wants {asked} (cross_attention_dim)",
            "take both from one pipeline",
        )
    if (channels := vae.get("latent_channels", 4)) != unet["in_channels"]:
        raise ModelError(
            f"{where}: vae has latents of {channels} channels, unet of {unet['in_channels']}",
            "take both from one pipeline",
        )
    if vae.get("shift_factor"):
        raise ModelError(
            f"{where / 'vae'}: shift_factor is {vae['shift_factor']}, which StableDiffusionPipeline does not apply",
            GIVE_STABLE_DIFFUSION,
        )


def load_parts(sealed: Sealed) -> TextParts:
    """The parts of a verified pipeline folder, frozen, in float32 whatever they were saved in.

    Raises:
        ModelError: a part that cannot be loaded or used, or that does not fit its neighbour; weights that are
            not finite.
        BackendError: transformers is not installed.
    """
    import diffusers
    import torch

    folder = sealed.folder
    require_parts(folder)
    tokenizer = read_tokenizer(folder / "tokenizer")
    text_encoder = read_weights(transformers().CLIPTextModel, folder / "text_encoder", SAVE_AGAIN, dtype=torch.float32)
    require_fitting_tokenizer(tokenizer, text_encoder, folder)
    unet, vae = (
        read_weights(kind, folder / part, SAVE_AGAIN, torch_dtype=torch.float32)
        for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae"))
    )
    for part, network in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        require_finite_weights(network, folder / part)
    # Below 0.9, the stock pipeline takes latents under 64x64 for a mistake and changes the U-Net's sample_size.
    unet.register_to_config(_diffusers_version=diffusers.__version__)
    unet = unet.to(memory_format=torch.channels_last)
    return TextParts(tokenizer, text_encoder, unet, vae, read_schedule(folder), folder)


def require_fitting_tokenizer(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, where: Path) -> None:
    """Refuse a tokenizer and a text encoder that were not made for each other.

    Raises:
        ModelError: the vocabularies or the prompt lengths differ.
    """
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, text_encoder.config.vocab_size
    if not tokens <= rows < tokens + PADDED_ROWS:
        raise ModelError(
            f"{where}: tokenizer and text_encoder do not fit: {tokens} tokens, an embedding of {rows} (vocab_size)",
            "take both from one pipeline",
        )
    length, places = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if length != places:
        raise ModelError(
            f"{where}: tokenizer and text_encoder do not fit: prompts of {length:g} tokens (model_max_length), "
            f"{places} places (max_position_embeddings)",
            "take both from one pipeline",
        )
