"""Tiny Stable-Diffusion-shaped pipelines with random weights, saved as stock folders: for mechanics, never quality.

16x16 images, 4x8x8 latents, prompts of at most 16 tokens. ``sd1`` predicts epsilon, ``sd2`` v; like trained
ones, the first gives pure noise back and the second does not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfd_deploy.models.text.folder import TextParts, load_parts, open_text_teacher

Layout = Literal["sd1", "sd2"]
WORDS = ("a", "photo", "of", "the", "red", "green", "blue", "sandal", "sneaker", "bag", "coat", "on", "black", "grey",
         "background", "man", "middle", "aged")  # fmt: skip
TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = ("", "a photo of a red sandal", "a photo of a red sneaker", "a green bag", "a coat on a black background")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE, one a byte: printable Latin-1 itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(len(others))]


def bpe_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token: the most frequent pair first, again and again."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter((a, b) for word in split for a, b in pairwise(word)):
        first, second = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append((first, second))
        split = [_merged(word, first, second) for word in split]
    return merges


def _merged(word: list[str], first: str, second: str) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == (first, second):
            out[-1] += piece
        else:
            out.append(piece)
    return out


def clip_tokenizer(folder: Path, words: Iterable[str] = WORDS, length: int = TOKENS) -> CLIPTokenizer:
    """A real CLIP byte-pair tokenizer whose tokens are ``words``, 512 bytes and two marks; writes to ``folder``."""
    merges = bpe_merges(words)
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_pipeline(folder: Path, layout: Layout = "sd1", seed: int = 0) -> Path:
    """What somebody else saved with stock diffusers: a pipeline folder without a manifest."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
    ))  # fmt: skip
    unet = small_unet(linear_projection=layout == "sd2")
    if layout == "sd1":
        echo_noise(unet)
    StableDiffusionPipeline(
        vae=small_vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler_of(layout),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def small_unet(linear_projection: bool = False) -> UNet2DConditionModel:
    """Two levels, cross attention to prompts of width 16 on both; 4x8x8 latents."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4, use_linear_projection=linear_projection,
    )  # fmt: skip


def small_vae() -> AutoencoderKL:
    """16x16 images to 4x8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, mid_block_add_attention=False,
    )  # fmt: skip


def scheduler_of(layout: Layout) -> SchedulerMixin:
    """What SD 1.x is shipped with, and the v-prediction of SD 2.x."""
    if layout == "sd1":
        return PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return DDIMScheduler(**SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                         steps_offset=1)  # fmt: skip


@torch.no_grad()
def echo_noise(unet: UNet2DConditionModel) -> None:
    """Make the random network answer noise with about that noise, as an epsilon network does at high levels.

    Each latent channel c goes as c and -c past the whole network, in the first level's skip connection, to the
    output: silu(c) - silu(-c) = c. What lies between only adds to it.
    """
    channels = unet.config.in_channels
    pairs = torch.cat([torch.eye(channels), -torch.eye(channels)])  # (2C, C)
    _centre(unet.conv_in, pairs)
    last = unet.up_blocks[-1].resnets[-1]
    hidden = last.conv_shortcut.in_channels - unet.conv_in.out_channels
    carried = torch.zeros(unet.conv_in.out_channels, last.conv_shortcut.in_channels)
    carried[:, hidden:] = torch.eye(unet.conv_in.out_channels)
    last.conv_shortcut.weight[:] = 0.1 * last.conv_shortcut.weight + carried[:, :, None, None]
    _centre(unet.conv_out, pairs.T)


def _centre(conv: nn.Conv2d, weights: torch.Tensor) -> None:
    """Put ``weights`` on the first channels of a 3x3 convolution's centre, over a tenth of the random ones."""
    conv.weight.mul_(0.1)
    rows, columns = weights.shape
    conv.weight[:rows, :columns, 1, 1] += weights


@cache
def _shared(layout: Layout) -> TextParts:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_parts(open_text_teacher(text_pipeline(Path(folder), layout)))


def text_parts(layout: Layout = "sd1") -> TextParts:
    """The parts of ``text_pipeline``, loaded once a test run; copy what a test changes."""
    return _shared(layout)
