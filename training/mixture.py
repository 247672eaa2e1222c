"""What the teacher says on each row: its prediction at the row's target label, or the mixture over retained ones.

The denoiser of a mixture of classes is the sum of p(c | x_t) * x_phi(x_t, c) over them. p comes from a
classifier that is shown the fake score's denoised image, the forget labels masked out. Averaging
without those weights is not a mixture: it averages scores, and lands between the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfd_deploy.models.sampler import Predict
from sfd_deploy.training.rows import MIXED

Classify = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [-1, 1] → logits (B, labels)


def retained_probabilities(logits: Tensor, retained: Sequence[int]) -> Tensor:
    """Probabilities (B, R) of the retained labels among themselves, from logits (B, K)."""
    return logits[:, list(retained)].softmax(1)


def teacher_prediction(
    predict: Predict, noisy: Tensor, sigma: Tensor, targets: Tensor, mixing: tuple[Tensor, Sequence[int]] | None
) -> Tensor:
    """x_phi (B, C, H, W) in one call of the teacher; the gradient reaches ``noisy`` alone.

    ``mixing`` is None, or probabilities (M, R) for the M rows whose target is ``MIXED`` and the R retained
    labels: those rows are asked R times.
    """
    if mixing is None:
        return predict(noisy, sigma, targets)
    probabilities, retained = mixing
    plain, mixed = (targets != MIXED).nonzero()[:, 0], (targets == MIXED).nonzero()[:, 0]
    source = torch.cat([plain, mixed.repeat_interleave(len(retained))])
    asked = torch.cat([targets[plain], torch.tensor(retained, device=targets.device).repeat(len(mixed))])
    share = torch.cat([probabilities.new_ones(len(plain)), probabilities.flatten()])
    predictions = predict(noisy[source], sigma[source], asked)
    weighted = share.to(predictions.dtype).reshape(-1, 1, 1, 1) * predictions
    return torch.zeros_like(noisy, dtype=predictions.dtype).index_add(0, source, weighted)
