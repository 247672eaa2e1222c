"""Whether a graph draws what the PyTorch generator draws, and draws something at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.errors import LimitError
from sfd_deploy.export.config import ExportConfig, Precision
from sfd_deploy.export.samples import Samples
from sfd_deploy.measure.fidelity import psnr_db
from sfd_deploy.runtime.seam import Images, Runtime

ODD_BATCH = 3  # neither 1 nor a power of two: what a server's batcher forms, and where fixed shapes show
# One of 255 grey levels over a range of 2: an image that varies by less is one colour on a screen.
GREY_LEVEL = 2 / 255


@dataclass(frozen=True)
class Parity:
    """A graph's images against the PyTorch generator's, on the same latents and labels."""

    samples: int
    batches: tuple[int, ...]
    max_difference: float
    psnr_db: float

    def require(self, name: str, precision: Precision, config: ExportConfig) -> None:
        """Refuse an FP32 graph by its largest difference, others by their PSNR.

        Raises:
            LimitError: with the figure and its limit.
        """
        mend = "report this with the generator" if precision == "fp32" else "export --fp32, or leave more nodes out"
        if precision == "fp32" and self.max_difference > config.max_difference_fp32:
            raise LimitError(
                f"{name}: differs from PyTorch by {self.max_difference:.2g}, limit {config.max_difference_fp32:g}", mend
            )
        limits = {"fp16": config.min_psnr_db_fp16, "int8": config.min_psnr_db_int8}
        if precision in limits and self.psnr_db < limits[precision]:
            raise LimitError(f"{name}: PSNR to PyTorch is {self.psnr_db:.1f} dB, limit {limits[precision]:g} dB", mend)

    def resolved(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"samples": self.samples, "batches": list(self.batches), "max_difference": self.max_difference,
                "psnr_db": self.psnr_db}  # fmt: skip


def compare(name: str, runtime: Runtime, samples: Samples, reference: Images, max_batch: int) -> Parity:
    """Draw ``samples`` in batches of 1, 3 and ``max_batch`` and compare them with ``reference``.

    Raises:
        LimitError: an image is not finite, or of one colour.
    """
    batches = _batches(len(samples), max_batch)
    images = np.concatenate([
        runtime.draw(part.latents, part.labels) for part in _parts(samples, batches)
    ])  # fmt: skip
    require_pictures(name, images, samples)
    difference = float(np.abs(images - reference).max())
    return Parity(len(samples), tuple(dict.fromkeys(batches)), difference, float(psnr_db(images, reference).mean()))


def require_pictures(name: str, images: Images, samples: Samples) -> None:
    """Refuse images that are not finite or of one colour.

    Raises:
        LimitError: naming the first such image's label and seed.
    """
    flat = images.reshape(len(images), -1)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(flat).all(1))
    blank: NDArray[np.bool_] = np.nan_to_num(flat).max(1) - np.nan_to_num(flat).min(1) < GREY_LEVEL
    for what, faulty in (("not finite", ~finite), ("of one colour", blank & finite)):
        if faulty.any():
            row = int(np.argmax(faulty))
            raise LimitError(
                f"{name}: {int(faulty.sum())} of {len(faulty)} images are {what}, first label {samples.labels[row]} "
                f"seed {samples.latents.seeds[row]}",
                "look at the generator with `sfd-deploy sample`",
            )


def _batches(count: int, max_batch: int) -> list[int]:
    sizes: list[int] = []
    for size in (1, min(ODD_BATCH, max_batch)):
        sizes.append(min(size, count - sum(sizes)))
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(max_batch, left))
    return [size for size in sizes if size]


def _parts(samples: Samples, batches: list[int]) -> list[Samples]:
    ends = np.cumsum(batches).tolist()
    return [samples[end - size : end] for end, size in zip(ends, batches, strict=True)]
