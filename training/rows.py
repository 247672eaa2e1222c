"""What one step of the training draws: labels, targets, weights and noise, from a named stream, always on the CPU.

A label is a condition's number: of a class, or of a prompt.

Every process draws the same global batch and takes its own part, so the batch does not depend on how
many processes there are, nor on how many parts each takes one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from sfd_deploy.labels import MIXTURE
from sfd_deploy.training.conditions import Conditions
from sfd_deploy.training.config import LoopConfig
from sfd_deploy.training.streams import stream

# The target of a row whose override is the mixture: no label, so asking the teacher for it is an error.
MIXED = -1


@dataclass(frozen=True)
class Rows:
    """One batch, each with a first dimension of B.

    ``targets`` are what the teacher is asked for, the override label on forget rows; ``weights`` add up
    to 1 over the retained rows and to lambda over the forget rows of the global batch.
    """

    labels: Tensor  # int64
    targets: Tensor  # int64
    weights: Tensor
    latents: Tensor  # (B, C, H, W), what theta turns into an image
    position: Tensor  # in [0, 1), which noise level the image is re-noised to
    noise: Tensor  # (B, C, H, W), what it is re-noised with

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def forgotten(self) -> Tensor:
        """Which rows ask for what is forgotten, bool (B,)."""
        return self.labels != self.targets

    def __getitem__(self, part: slice) -> Self:
        return type(self)(*(getattr(self, field.name)[part] for field in fields(self)))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """On ``device``, floating values in ``dtype``."""
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(value.to(device, dtype if value.is_floating_point() else None) for value in values))

    def parts(self, first: int, step: int, count: int) -> Iterator[Self]:
        """``count`` strided parts, ``first`` of every ``step`` rows onwards: each has its share of forget rows."""
        for index in range(first, first + count):
            yield self[index::step]


def draw_rows(config: LoopConfig, conditions: Conditions, shape: tuple[int, ...], name: str, step: int) -> Rows:
    """The global batch of a step: labels uniform over the retained, then over the forget labels, then noise.

    Weights are 1/n_r on retained rows and lambda/n_f on forget rows, the same for both networks' steps:
    unequal forget coefficients make the generator overshoot.
    """
    draws = stream(config.seed, name, step)
    retained = _choose(conditions.retained, config.retained_rows, draws)
    weights = [torch.full((config.retained_rows,), 1 / config.retained_rows)]
    asked, targets = [retained], [retained]
    if forget := conditions.forget:
        which = torch.randint(len(forget), (config.forget_rows,), generator=draws)
        overrides = [MIXED if override == MIXTURE else override for override in forget.values()]
        asked.append(torch.tensor(list(forget))[which])
        targets.append(torch.tensor(overrides)[which])
        weights.append(torch.full((config.forget_rows,), config.forget_weight / config.forget_rows))
    size = (config.rows(conditions), *shape)
    # In this order: a run that was started by an earlier version goes on with the same numbers.
    latents = torch.randn(size, generator=draws)
    position = torch.rand(len(latents), generator=draws)
    noise = torch.randn(size, generator=draws)
    return Rows(torch.cat(asked), torch.cat(targets), torch.cat(weights), latents, position, noise)


def _choose(labels: tuple[int, ...], count: int, draws: torch.Generator) -> Tensor:
    return torch.tensor(labels)[torch.randint(len(labels), (count,), generator=draws)]
