"""The official label-conditional DDPM U-Net as a stock ``UNet2DModel``: which tensor goes where.

There every residual block adds ``W silu([time, class]) + b`` to its features, time and class embedding side by side;
a stock block has one embedding, their sum. But a one-step generator is asked at one timestep only, so that the term is
a constant vector per class. The stock network holds those constants exactly: its time embedding is zero, class row c
is the number whose SiLU is 1 in coordinate c and 0 elsewhere, and column c of a block's projection is class c's vector.
The rest is the same network under other names. The null class, which no training step of the generator sees and which
can still draw what was forgotten, is left behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from sfd_deploy.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from diffusers import UNet2DModel

Tensors = Mapping[str, Tensor]

# The x with x * sigmoid(x) = 1.
SILU_ONE = 1.278464542761074
NORM_GROUPS = 32
# Stock name → official name; a level of the decoder counts the other way round.
NAMES = (
    (r"^conv_norm_out\.", r"norm_out."),
    (r"^down_blocks\.(\d+)\.", r"down.\1."),
    (r"^mid_block\.resnets\.0\.", r"mid.block_1."),
    (r"^mid_block\.resnets\.1\.", r"mid.block_2."),
    (r"^mid_block\.attentions\.0\.", r"mid.attn_1."),
    (r"\.resnets\.", r".block."),
    (r"\.attentions\.", r".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.group_norm\.", r".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", r".proj_out."),
)
EMBEDDING = re.compile(r"^(time_embedding|class_embedding)\.|\.time_emb_proj\.")


@dataclass(frozen=True)
class Architecture:
    """The network's shape, as far as tensors tell it; ``image_size`` they do not."""

    image_size: int
    image_channels: int
    block_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[int, ...]
    classes: int

    def build(self) -> UNet2DModel:
        """A stock network of this shape, with random weights."""
        from diffusers import UNet2DModel

        kinds = ["AttnDownBlock2D" if level in self.attention_levels else "DownBlock2D"
                 for level in range(len(self.block_channels))]  # fmt: skip
        return UNet2DModel(
            sample_size=self.image_size,
            in_channels=self.image_channels,
            out_channels=self.image_channels,
            block_out_channels=self.block_channels,
            layers_per_block=self.layers_per_block,
            down_block_types=tuple(kinds),
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            attention_head_dim=None,  # one head as wide as the level
            norm_num_groups=NORM_GROUPS,
            norm_eps=1e-6,
            downsample_padding=0,  # one row and column of zeros, right and below
            time_embedding_dim=self.classes,
            num_class_embeds=self.classes,
        )


def read_architecture(tensors: Tensors, image_size: int | None) -> Architecture:
    """The architecture that the tensors' names and shapes tell, and the image size that they cannot.

    Raises:
        ModelError: they are not this family's, or it is a variant that a stock network cannot hold.
        ConfigError: no image size, or one that the network cannot halve often enough.
    """
    _refuse_other_families(tensors)
    levels = _count(tensors, "down.{}.block.0.conv1.weight")
    layers = _count(tensors, "down.0.block.{}.conv1.weight")
    channels = tuple(_shape(tensors, f"down.{level}.block.0.conv1.weight")[0] for level in range(levels))
    entry = _shape(tensors, "conv_in.weight")
    if not channels or channels[0] != entry[0]:
        raise _unlike(f"the first level has {channels[:1]} channels, the input layer {entry[0]}")
    if any(width % NORM_GROUPS for width in channels):
        raise _unlike(f"channels {channels} are not multiples of {NORM_GROUPS}")
    if levels > 1 and "down.0.downsample.conv.weight" not in tensors:
        raise _unlike("it halves images by averaging, a stock network by convolution")
    attention = tuple(level for level in range(levels) if f"down.{level}.attn.0.q.weight" in tensors)
    if image_size is None:
        # A network of convolutions has no size; all official configurations attend at 16 pixels.
        likely = f", likely {16 * 2 ** attention[0]}" if len(attention) == 1 else ""
        raise ConfigError("the image size is not in a checkpoint", f"say it with --image-size{likely}")
    if image_size % 2 ** (levels - 1):
        raise ConfigError(f"{image_size} pixels cannot be halved {levels - 1} times", "give the right --image-size")
    return Architecture(
        image_size=image_size,
        image_channels=entry[1],
        block_channels=channels,
        layers_per_block=layers,
        attention_levels=attention,
        classes=_shape(tensors, "classes_emb.weight")[0],
    )


def to_stock(tensors: Tensors, architecture: Architecture, timestep: float) -> UNet2DModel:
    """The stock network that draws what the official one draws when asked at ``timestep``; float32.

    Raises:
        ModelError: tensors are missing, left over, or of another shape.
    """
    unet = architecture.build()
    stock = unet.state_dict()
    names = {name: official_name(name, len(architecture.block_channels)) for name in stock
             if not EMBEDDING.search(name)}  # fmt: skip
    blocks = {name: official_name(name.split("time_emb_proj")[0], len(architecture.block_channels))
              for name in stock if name.endswith("time_emb_proj.weight")}  # fmt: skip
    _require_shapes(tensors, _expected(stock, names, blocks, architecture))
    embedding = _joint_embedding(tensors, timestep)
    for name, value in stock.items():
        if name in names:
            stock[name] = tensors[names[name]].reshape(value.shape)
        else:
            stock[name] = torch.zeros_like(value)
    stock["class_embedding.weight"] = SILU_ONE * torch.eye(architecture.classes)
    for name, block in blocks.items():
        stock[name] = _class_terms(tensors, block, embedding).T.contiguous()
    unet.load_state_dict(stock)
    return unet.eval().requires_grad_(False)


def official_name(name: str, levels: int) -> str:
    """A stock tensor's name, or its beginning, in the official network."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)


def class_vectors(tensors: Tensors) -> Tensor:
    """What every block hears of each class, (classes, 4 * channels) float64."""
    return _two_layers(tensors, "cemb", tensors["classes_emb.weight"])


def _joint_embedding(tensors: Tensors, timestep: float) -> Tensor:
    """SiLU of time and class embedding side by side, (classes, 8 * channels) float64."""
    from diffusers.models.embeddings import get_timestep_embedding

    classes, width = class_vectors(tensors), tensors["classes_emb.weight"].shape[1]
    waves = get_timestep_embedding(torch.tensor([timestep]), width, flip_sin_to_cos=False, downscale_freq_shift=1)
    time = _two_layers(tensors, "temb", waves).expand(len(classes), -1)
    return silu(torch.cat([time, classes], dim=1))


def _two_layers(tensors: Tensors, name: str, value: Tensor) -> Tensor:
    weights = [tensors[f"{name}.dense.{layer}.{part}"].double() for layer in (0, 1) for part in ("weight", "bias")]
    return linear(silu(linear(value.double(), weights[0], weights[1])), weights[2], weights[3])


def _class_terms(tensors: Tensors, block: str, embedding: Tensor) -> Tensor:
    """What a block adds for each class, (classes, channels) float32; summed in float64 and rounded once."""
    weight, bias = (tensors[f"{block}temb_cemb_proj.{part}"].double() for part in ("weight", "bias"))
    return linear(embedding, weight, bias).float()


def _expected(
    stock: Tensors, names: Mapping[str, str], blocks: Mapping[str, str], architecture: Architecture
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the official network, and its shape."""
    shapes = {
        # Attention is by 1x1 convolutions there, by linear layers here.
        official: (*stock[name].shape, 1, 1) if ".attentions." in name and stock[name].ndim == 2
        else tuple(stock[name].shape)
        for name, official in names.items()
    }  # fmt: skip
    width, classes = architecture.block_channels[0], architecture.classes
    for part in ("temb", "cemb"):
        shapes |= {f"{part}.dense.0.weight": (4 * width, width), f"{part}.dense.0.bias": (4 * width,),
                   f"{part}.dense.1.weight": (4 * width, 4 * width), f"{part}.dense.1.bias": (4 * width,)}  # fmt: skip
    shapes |= {"classes_emb.weight": (classes, width), "null_classes_emb": (width,)}
    for name, block in blocks.items():
        channels = stock[name].shape[0]
        shapes |= {f"{block}temb_cemb_proj.weight": (channels, 8 * width), f"{block}temb_cemb_proj.bias": (channels,)}
    return shapes


def _require_shapes(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - tensors.keys()):
        raise _unlike(f"{missing[0]} is missing")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise _unlike(f"{extra[0]} has no place in it")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise _unlike(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")


def _refuse_other_families(tensors: Tensors) -> None:
    if not any(".map_layer0." in f".{name}" for name in tensors):
        return
    if any("aux_conv" in name for name in tensors):
        raise ModelError(
            "weights of EDM's SongUNet: its blocks scale each sum by sqrt(1/2), for which a stock UNet2DModel has no"
            " setting, so it could not hold them exactly",
            "distil into a stock network",
        )
    raise ModelError(
        "weights of EDM's ADM network, for which there is no conversion here", "adopt a diffusers folder of it"
    )


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim < 2:
        raise _unlike(f"{name} is missing")
    return tuple(tensors[name].shape)


def _count(tensors: Tensors, pattern: str) -> int:
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def _unlike(what: str) -> ModelError:
    return ModelError(
        f"the tensors are not those of the official label-conditional DDPM U-Net: {what}",
        "give a checkpoint that its `train_sfd` saved",
    )
