"""Latents from seeds: the same standard-normal numbers on every machine, back end and numpy version.

One 63-bit seed names one image. Philox4x64-10 words (Salmon et al., SC'11; numpy's bit stream is
guaranteed stable) become normals by Box-Muller in float64, rounded to float32 at the end. Nothing
depends on the batch an image is drawn in. Needs numpy alone, since Triton loads a copy of this file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEED_LIMIT = 2**63
STREAMS = ("train", "calibrate", "select", "audit", "bench", "sample")


def standard_normal(seeds: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard-normal latents (B, *shape) float32 for non-negative ``seeds`` (B,).

    Raises:
        ValueError: a seed is negative.
    """
    size = int(np.prod(shape))
    pairs = (size + 1) // 2
    words = np.empty((len(seeds), 2, pairs), np.uint64)
    for row, seed in enumerate(seeds.tolist()):
        if seed < 0:
            raise ValueError(f"seed {seed} is negative")
        words[row] = np.random.Philox(key=seed).random_raw(2 * pairs).reshape(2, pairs)
    # 53 random bits; the radius' uniform is in (0, 1], so its logarithm is finite.
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0] + 2.0**-53))
    angle = 2.0 * np.pi * uniform[:, 1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal[:, :size].reshape(len(seeds), *shape).astype(np.float32)


def stream_seeds(stream: str, seed: int, start: int, count: int) -> NDArray[np.int64]:
    """Seeds (count,) of images ``start``, ``start + 1``, … of a named stream.

    Streams keep what is chosen by looking (``select``) apart from evidence (``audit``).

    Raises:
        ValueError: the stream's name is unknown.
    """
    if stream not in STREAMS:
        raise ValueError(f"unknown latent stream {stream!r}; known: {', '.join(STREAMS)}")
    names = (f"{stream}/{seed}/{index}" for index in range(start, start + count))
    words = (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names)
    return np.fromiter((word % SEED_LIMIT for word in words), np.int64, count)


@dataclass(frozen=True)
class Latents:
    """A batch of latents by seed: a back end takes the numbers, an endpoint the seeds."""

    seeds: NDArray[np.int64]  # (B,)

    @classmethod
    def of_stream(cls, stream: str, seed: int, start: int, count: int) -> Latents:
        """The latents of images ``start`` to ``start + count`` of a named stream."""
        return cls(stream_seeds(stream, seed, start, count))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> Latents:
        return Latents(self.seeds[rows])

    def array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard-normal float32 (B, *shape)."""
        return standard_normal(self.seeds, shape)
