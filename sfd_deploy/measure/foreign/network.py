"""Any network that gives class scores, whatever runs it: images in, labels and features out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfd_deploy.errors import ModelError
from sfd_deploy.measure.foreign.config import NetworkConfig, Pixels

BATCH = 32  # networks of photographs keep far more per image than ours
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's mode L is

Run = Callable[[Tensor], Mapping[str, Tensor]]  # an input batch → outputs by name


@dataclass(frozen=True)
class NetworkSight:
    """A foreign network and how its config reads it; ``size`` and ``batch``: what a graph was fixed to, if it was."""

    config: NetworkConfig
    run: Run
    size: tuple[int, int] | None = None
    batch: int | None = None

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B,) and features (B, F) of images (B, C, H, W) in [-1, 1].

        Raises:
            ModelError: the images or the outputs are not what the config says.
        """
        seen = [self._see(part) for part in images.split(self.batch or BATCH)]
        labels, features = zip(*seen, strict=True)
        return torch.cat(labels), torch.cat(features)

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = prepared(images, self.config.pixels, self.size)
        if self.batch is not None:
            inputs = torch.cat([inputs, inputs[-1:].expand(self.batch - len(inputs), *inputs.shape[1:])])
        outputs = self.run(inputs)
        scores = _rows(outputs, self.config.output, len(inputs))[: len(images)]
        name = self.config.features_output
        features = scores if name is None else _rows(outputs, name, len(inputs))[: len(images)]
        return self._labels(scores), features

    def _labels(self, scores: Tensor) -> Tensor:
        try:
            label_of_each = torch.tensor(self.config.label_of_each(scores.shape[1]))
        except ValueError as error:
            raise ModelError(str(error), "mend `classes` or `output`") from None
        return label_of_each[scores.masked_fill(label_of_each < 0, -torch.inf).argmax(1)]


def _rows(outputs: Mapping[str, Tensor], name: str | None, count: int) -> Tensor:
    """One output as float32 rows (count, F)."""
    if name is None and len(outputs) == 1:
        name = next(iter(outputs))
    if name is None or name not in outputs:
        which = f"{len(outputs)} outputs" if name is None else f"no output {name}"
        raise ModelError(which, f"say in the config which one is meant: {', '.join(outputs)}")
    found = outputs[name]
    if found.dim() < 2 or len(found) != count:
        raise ModelError(
            f"output {name} has shape {tuple(found.shape)} for {count} images",
            "name one with a row of numbers an image",
        )
    if bool(found.isnan().any()):
        raise ModelError(f"output {name} holds values that are not numbers", "check `pixels`, or the model")
    return found.flatten(1).to(torch.float32)


def prepared(images: Tensor, pixels: Pixels, size: tuple[int, int] | None = None) -> Tensor:
    """A network's input from images (B, C, H, W) in [-1, 1], C of 1 or 3; ``size`` where ``pixels`` has none."""
    values = arranged((images + 1) / 2, pixels)
    if (wanted := pixels.size or size) is not None and tuple(values.shape[2:]) != wanted:
        values = nn.functional.interpolate(values, wanted, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (pixels.mean, pixels.std))
    values = (values - mean) / std
    return values.permute(0, 2, 3, 1).contiguous() if pixels.layout == "nhwc" else values.contiguous()


def arranged(images: Tensor, pixels: Pixels) -> Tensor:
    """Images (B, 1 or 3, H, W) with the channels that the network takes.

    Raises:
        ModelError: neither grey nor coloured.
    """
    if images.shape[1] not in {1, 3}:
        raise ModelError(
            f"an adopted judge reads images of 1 or 3 channels, not {images.shape[1]}", "give it such images"
        )
    if pixels.channels == "grey":
        return images if images.shape[1] == 1 else (images * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    coloured = images.expand(-1, 3, -1, -1)
    return coloured.flip(1) if pixels.channels == "bgr" else coloured
