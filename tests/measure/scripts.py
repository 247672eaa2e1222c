"""Programs that TorchScript compiles from their source, which it must be able to read: hence a module of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WritesWhenAsked(nn.Module):
    """A classifier that saves what it is shown."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def forward(self, images: Tensor) -> Tensor:
        torch.ops.aten.save(images, self.file)
        return images.mean((2, 3))


class WritesWhenLoaded(nn.Module):
    """A classifier that saves a tensor as soon as it is loaded, before anybody asks it."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.file, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.file = state[0]
        self.training = state[1]
        torch.ops.aten.save(torch.zeros(1), self.file)


class ReadsAFile(nn.Module):
    """A classifier whose features are somebody's file."""

    def forward(self, images: Tensor) -> Tensor:
        found = torch.from_file("/etc/hostname", False, 4, dtype=torch.uint8)
        return images.mean((2, 3)) + found.to(torch.float32).sum()


class SpeaksElsewhere(nn.Module):
    """A classifier with an operator of neither tensors nor Python."""

    def forward(self, images: Tensor) -> Tensor:
        record = torch.ops.profiler._record_function_enter("judge", None)
        return images.mean((2, 3)) + record.numel() * 0


class Corners(nn.Module):
    """Scores are the four pixels of a 2x2 image, by name and beside something else."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": images.flatten(1), "pooled": images.mean((2, 3))}


class Words(nn.Module):
    """No tensors."""

    def forward(self, images: Tensor) -> str:
        return "a cat"
