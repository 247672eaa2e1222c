"""The official label-conditional DDPM U-Net and its one step, spelt out plainly from its description.

An oracle: nothing here knows of diffusers or of our conversion. Tensors have the official names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs, 1e-6), nn.GroupNorm(32, outputs, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.temb_cemb_proj = nn.Linear(embedding, outputs)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x))) + self.temb_cemb_proj(F.silu(embedding))[..., None, None]
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


def level(blocks: list[nn.Module], attention: list[nn.Module]) -> nn.Module:
    module = nn.Module()
    module.block, module.attn = nn.ModuleList(blocks), nn.ModuleList(attention)
    return module


def resampler(width: int, stride: int, padding: int) -> nn.Module:
    module = nn.Module()
    module.conv = nn.Conv2d(width, width, 3, stride=stride, padding=padding)
    return module


def two_layers(width: int) -> nn.Module:
    module = nn.Module()
    module.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])
    return module


class OfficialUNet(nn.Module):
    """Predicts the noise in (B, channels, size, size) at a timestep for labels (B,)."""

    def __init__(
        self, width: int = 32, multipliers: tuple[int, ...] = (1, 2), layers: int = 1, size: int = 8, classes: int = 3,
        attention_at: int = 4, channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.size, self.classes = width, size, classes
        self.temb, self.cemb = two_layers(width), two_layers(width)
        self.classes_emb = nn.Embedding(classes, width)
        self.null_classes_emb = nn.Parameter(torch.randn(width))
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        widths = [width * factor for factor in multipliers]
        attended = [size >> depth == attention_at for depth in range(len(widths))]
        stack, now = [width], width
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for depth, out in enumerate(widths):
            blocks = [Residual(now if first == 0 else out, out, 8 * width) for first in range(layers)]
            self.down.append(level(blocks, [Attention(out) for _ in range(layers * attended[depth])]))
            stack += [out] * layers
            now = out
            if depth + 1 < len(widths):
                self.down[depth].downsample = resampler(out, 2, 0)
                stack.append(out)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Residual(now, now, 8 * width), Residual(now, now, 8 * width)
        self.mid.attn_1 = Attention(now)
        ups = []
        for depth, out in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(Residual(now + stack.pop(), out, 8 * width))
                now = out
            ups.append(level(blocks, [Attention(out) for _ in range((layers + 1) * attended[depth])]))
            if depth:
                ups[-1].upsample = resampler(out, 1, 1)
        self.up.extend(reversed(ups))
        self.norm_out, self.conv_out = nn.GroupNorm(32, now, 1e-6), nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: float, labels: Tensor) -> Tensor:
        embedding = self.embedding(timestep, self.classes_emb(labels))
        skips = [self.conv_in(x)]
        for step in self.down:
            for row in range(len(step.block)):
                h = step.block[row](skips[-1], embedding)
                skips.append(step.attn[row](h) if len(step.attn) else h)
            if hasattr(step, "downsample"):
                skips.append(step.downsample.conv(F.pad(skips[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], embedding)), embedding)
        for step in reversed(self.up):
            for row in range(len(step.block)):
                h = step.block[row](torch.cat([h, skips.pop()], 1), embedding)
                h = step.attn[row](h) if len(step.attn) else h
            if hasattr(step, "upsample"):
                h = step.upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv_out(F.silu(self.norm_out(h)))

    def embedding(self, timestep: float, classes: Tensor) -> Tensor:
        half = self.width // 2
        waves = timestep * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        time = torch.cat([waves.sin(), waves.cos()]).expand(len(classes), -1)
        parts = [
            part.dense[1](F.silu(part.dense[0](value))) for part, value in ((self.temb, time), (self.cemb, classes))
        ]
        return torch.cat(parts, 1)


def cumulative(timestep: int) -> float:
    """alpha-bar of the linear schedule, 1e-4 to 0.02 in 1000 steps."""
    return math.prod(1 - (1e-4 + (0.02 - 1e-4) * step / 999) for step in range(timestep + 1))


@torch.no_grad()
def one_step(network: OfficialUNet, noise: Tensor, labels: Tensor, timestep: int = 440) -> Tensor:
    """Images in [-1, 1] from standard-normal noise: predicted once at ``timestep``, without guidance."""
    a, b = math.sqrt(cumulative(timestep)), math.sqrt(1 - cumulative(timestep))
    return ((b * noise - b * network(b * noise, float(timestep), labels)) / a).clamp(-1, 1)


def random_network(seed: int = 0, **shape: Any) -> OfficialUNet:
    """A network in which every tensor matters: no zero bias, no unit norm, labels that change the whole image."""
    with seeded(seed):
        network = OfficialUNet(**shape)
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
            if "classes_emb" in name or "temb_cemb_proj" in name:
                parameter.data.mul_(5)
    return network.eval().requires_grad_(False)


def saved_list(generator: OfficialUNet, seed: int = 1) -> list[Any]:
    """What the official distillation saves: fake score, optimiser, generator, optimiser, step, EMA of parameters."""
    shape = {"width": generator.width, "size": generator.size, "classes": generator.classes}
    with seeded(seed):
        others = [OfficialUNet(**shape), OfficialUNet(**shape)]
    optimisers = [torch.optim.Adam(other.parameters()).state_dict() for other in others]
    average = {name: value.detach().clone() for name, value in generator.named_parameters()}
    return [others[0].state_dict(), optimisers[0], others[1].state_dict(), optimisers[1], 49_999, average]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
