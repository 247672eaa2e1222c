"""Learning rates over the course of a training."""

from __future__ import annotations


def linear_decay(step: int, total: int, share: float) -> float:
    """Factor of the learning rate at ``step`` (from 0) of ``total``: 1, then linear towards 0 over the last ``share``.

    ``share`` is in [0, 1]; 0 keeps the rate. The last step still moves: its factor is 1 / (share * total).
    """
    return min(1.0, (total - step) / max(1.0, total * share))
