"""A text-to-image U-Net behind the denoiser's seam: a condition is a prompt's number in a table of encoded prompts.

Every prompt is encoded once, so that training and sampling above the seam ask for prompts as they ask for
class labels, with an int64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfd_deploy.errors import ModelError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser
from sfd_deploy.models.generator import image_shape, require_finite
from sfd_deploy.models.text.folder import TextParts, load_parts
from sfd_deploy.models.text.tokens import require_within_limit
from sfd_deploy.progress import LOGGER, progress_bar

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

ENCODED_AT_ONCE = 64  # prompts in one pass of the text encoder
# An epsilon network answers pure noise with 1 times it, a v or clean-image network with about 0 times it.
ECHO = 0.5


class PromptedUNet(nn.Module):
    """A ``UNet2DConditionModel`` that is asked like a class-conditional ``UNet2DModel``.

    ``table`` (N, L, D) holds the encoded prompts. It is no weight: copies of the module share it, and it is
    not saved with them.
    """

    table: Tensor

    def __init__(self, unet: UNet2DConditionModel, table: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("table", table, persistent=False)

    @property
    def config(self) -> Any:
        """The U-Net's own."""
        return self.unet.config

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        """The U-Net's output for ``sample`` (B, C, H, W) at ``timestep`` (B,) and prompts ``class_labels`` (B,) int64.

        Raises:
            IndexError: a number that is no prompt's, negative ones included.
        """
        prompts = nn.functional.embedding(class_labels, self.table.flatten(1)).unflatten(1, self.table.shape[1:])
        return self.unet(sample, timestep, encoder_hidden_states=prompts)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptedUNet:
        # Ten thousand prompts of Stable Diffusion are 2.4 GB, which teacher, fake score and generator share.
        memo[id(self.table)] = self.table
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


@torch.no_grad()
def encode(parts: TextParts, texts: Sequence[str]) -> Tensor:
    """What the U-Net is told of each text, (N, L, D), as stock diffusers encodes it; each text once.

    Computed where the text encoder is, returned where the U-Net is.

    Raises:
        PromptError: a text is longer than the text encoder reads.
    """
    require_within_limit(parts.tokenizer, texts)
    distinct = list(dict.fromkeys(texts))
    LOGGER.info("encoding %d prompts on %s", len(distinct), parts.text_encoder.device)
    told = []
    with progress_bar("encode", len(distinct)) as advance:
        for part in _encode_parts(parts, distinct):
            told.append(part.to(parts.unet.device))
            advance(len(part), "")
    encoded = torch.cat(told)
    place = {text: number for number, text in enumerate(distinct)}
    return encoded if len(distinct) == len(texts) else encoded[[place[text] for text in texts]]


def _encode_parts(parts: TextParts, texts: Sequence[str]) -> Iterator[Tensor]:
    encoder = parts.text_encoder
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        tokens = parts.tokenizer(
            list(texts[start : start + ENCODED_AT_ONCE]), padding="max_length", return_tensors="pt",
            max_length=parts.tokenizer.model_max_length,
        ).to(encoder.device)  # fmt: skip
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        yield encoder(tokens.input_ids, attention_mask=mask)[0]


def text_denoiser(parts: TextParts, texts: Sequence[str]) -> Denoiser:
    """The parts' U-Net under its parameterisation; a condition is a position in ``texts``. Nothing is checked.

    Raises:
        PromptError: a text is too long.
    """
    return DiscreteDenoiser(PromptedUNet(parts.unet, encode(parts, texts)), parts.scheduler)


def load_text_denoiser(source: Sealed | TextParts, texts: Sequence[str]) -> Denoiser:
    """The denoiser of a text-to-image teacher, ready to be asked; a condition is a position in ``texts``.

    Raises:
        ModelError: a part that cannot be used, a prediction that is not finite, or not of the scheduler's type.
        PromptError: a text is too long.
    """
    parts = load_parts(source) if isinstance(source, Sealed) else source
    denoiser = text_denoiser(parts, texts).eval()
    require_finite(denoiser, parts.folder)
    require_prediction_fits(denoiser, parts.folder)
    return denoiser


@torch.no_grad()
def require_prediction_fits(denoiser: Denoiser, where: Path) -> None:
    """Refuse a network that does not predict what its scheduler says: one call on pure noise.

    At the schedule's highest noise level the input is noise and hardly anything else. An epsilon network gives
    it back; v and the clean image are then all but independent of it.

    Raises:
        ModelError: the prediction type contradicts the network.
    """
    if not isinstance(denoiser, DiscreteDenoiser):
        return
    shape = (4, *image_shape(denoiser.unet))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((len(noise),), denoiser.sigma_range[1])
    output = denoiser.unet(noise, denoiser.timestep(sigma), class_labels=torch.zeros(len(noise), dtype=torch.int64))
    share = ((output.sample * noise).sum() / noise.square().sum()).item()
    said = denoiser.prediction_type
    if (share > ECHO) != (said == "epsilon"):
        found = "gives it back, as an epsilon network does" if share > ECHO else "does not give it back"
        raise ModelError(
            f"{where}: the scheduler says {said}, but given pure noise the network {found} ({share:.2f} of it)",
            "mend prediction_type in scheduler/scheduler_config.json",
        )
