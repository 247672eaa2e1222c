"""Named random streams: (seed, name, step) to a generator, so that a resumed run draws what an unbroken one would."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, name: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
