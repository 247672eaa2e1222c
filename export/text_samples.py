"""The latents and prompts that calibrate and check text-to-image graphs; no data needed besides the run's prompts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sfd_deploy.export.config import LATENT_STREAM
from sfd_deploy.export.samples import Feeds, Samples
from sfd_deploy.latents import Latents
from sfd_deploy.models.text.tokens import token_numbers
from sfd_deploy.runtime.text import Part, TextOnnxRuntime


def spread(seed: int, start: int, count: int, prompts: int) -> Samples:
    """Images ``start`` to ``start + count`` of the calibration stream, with a prompt's number each.

    Prompts in turn where they are few; else evenly over all, so that forget prompts are among them.
    """
    turn = np.arange(count, dtype=np.int64)
    numbers = turn % prompts if prompts <= count else turn * prompts // count
    return Samples(Latents.of_stream(LATENT_STREAM, seed, start, count), numbers)


def feeds_of(runtime: TextOnnxRuntime, part: Part, samples: Samples, batch: int) -> Iterator[Feeds]:
    """What ``part`` is given where ``runtime`` draws ``samples``, in batches of at most ``batch``."""
    for start in range(0, len(samples), batch):
        rows = samples[start : start + batch]
        encoded = runtime.prompts.rows(rows.labels)
        latents = rows.latents.array(runtime.latent_shape)
        if part == "text_encoder":
            texts = [runtime.prompts.texts[number] for number in rows.labels]
            yield {"input_ids": token_numbers(runtime.tokenizer, texts)}
        elif part == "unet":
            yield {"sample": latents, "encoder_hidden_states": encoded}
        else:
            yield {"latent_sample": runtime.step(latents, encoded)}
