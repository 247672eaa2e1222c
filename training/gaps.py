"""Figures of one generator step: how far from done, how stale psi is, how healthy the samples. Pure, on tensors.

Notation as in ``losses``: x generated image; x_phi, x_psi the clean-image predictions of teacher and
fake score; delta = x_phi - x_psi. E|delta|^2 estimates the Fisher divergence F itself where psi is
good, unlike the generator loss, which is (1 - alpha) F. E[delta (x_phi - x)] estimates F too; the
difference of the two, E[delta (x_psi - x)], is 0 at an exact psi and so measures how stale it is.

Energies are per value (divided by C*H*W). Keys: ``gap/retained``, ``gap/forget-3``,
``gap/retained/sigma-0.5-1``, ``gap/label-7``, ``staleness/…``, ``spread/…``, ``outside/…``,
``gradient/generator/maximum``, ``gradient/generator/clipped-share``. What has no row is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Column = NDArray[np.float64]  # (B,)
Chosen = NDArray[np.bool_]  # (B,)

# Powers of two: over the Karras grid from 0.137 to 13 each bucket holds 10 to 18 % of the draws.
SIGMA_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
BUCKETS = tuple(
    f"sigma-{low:g}-{high:g}" for low, high in zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf), strict=True)
)


def gap_figures(
    labels: Tensor, forgotten: Tensor, sigma: Tensor, x: Tensor, x_phi: Tensor, x_psi: Tensor, *,
    by_label: bool = True, bounded: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Figures of one batch by part: ``retained``, and ``forget-<label>`` for each label that is forgotten.

    Args:
        labels: what generator and fake score were asked for, int64 (B,).
        forgotten: which rows forget their label, bool (B,).
        sigma: noise level of each row (B,).
        x: generated images (B, C, H, W); so are ``x_phi`` and ``x_psi``. One copy to the host in all.
        x_phi: the teacher's clean-image prediction.
        x_psi: the fake score's.
        by_label: False where labels are too many to tell apart: one part ``forget``, and no figures by label.
        bounded: whether images lie in [-1, 1]; latents do not.

    Returns:
        ``gap`` E|delta|^2 by part, by part and sigma bucket, and by retained label; by part ``staleness``
        E[delta (x_psi - x)], ``spread`` (standard deviation per pixel within a label, root mean square)
        and ``outside`` (share of |x| > 1).
    """
    x, x_phi, x_psi = (values.detach().flatten(1) for values in (x, x_phi, x_psi))
    delta = x_phi - x_psi
    variance, alike = _variance_within(x, labels)
    columns = (
        labels, forgotten, sigma, delta.square().mean(1), (delta * (x_psi - x)).mean(1),
        (x.abs() > 1).to(x.dtype).mean(1), variance, alike,
    )  # fmt: skip
    rows = _Rows(*torch.stack([column.double() for column in columns]).cpu().numpy())
    figures = _by_part(rows, _parts(rows, by_label), bounded)
    return figures | _by_label(rows) if by_label else figures


def gradient_figures(
    network: str,
    gradients: Iterable[Tensor],
    clip_value: float,
    together: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, float]:
    """Largest absolute gradient and the share of values that clipping by ``clip_value`` changes.

    Call it with the gradients before the clip; ``network`` names them: ``generator`` or ``fake-score``. Where several
    processes hold a part each, ``together`` puts their rows (1, 3) one below the other.

    Raises:
        ValueError: there are no gradients.
    """
    found = [gradient.detach() for gradient in gradients]
    if not found:
        raise ValueError(f"{network} has no gradients")
    largest = torch.stack(torch._foreach_norm(found, math.inf)).amax().double()
    clipped = torch.stack([(gradient.abs() > clip_value).sum() for gradient in found]).sum().double()
    count = torch.full_like(largest, sum(gradient.numel() for gradient in found))
    rows = together(torch.stack([largest, clipped, count])[None])
    maximum, (changed, total) = rows[:, 0].max().item(), rows[:, 1:].sum(0).tolist()
    return {f"gradient/{network}/maximum": maximum, f"gradient/{network}/clipped-share": changed / total}


@dataclass(frozen=True)
class _Rows:
    """One value per row of the batch, on the host."""

    label: Column
    forgotten: Column  # 0 or 1
    sigma: Column
    energy: Column
    staleness: Column
    outside: Column
    variance: Column
    alike: Column  # rows of the same label, itself included


def _parts(rows: _Rows, by_label: bool) -> dict[str, Chosen]:
    forgotten = rows.forgotten > 0
    if not by_label:
        return {"retained": ~forgotten, "forget": forgotten}
    labels = sorted(set(rows.label[forgotten].astype(int).tolist()))
    return {"retained": ~forgotten} | {f"forget-{label}": forgotten & (rows.label == label) for label in labels}


def _by_part(rows: _Rows, parts: Mapping[str, Chosen], bounded: bool) -> dict[str, float]:
    bucket = np.searchsorted(SIGMA_EDGES, rows.sigma)
    figures: dict[str, float] = {}
    for part, chosen in parts.items():
        if not chosen.any():
            continue
        figures |= {
            f"gap/{part}": float(rows.energy[chosen].mean()),
            f"staleness/{part}": float(rows.staleness[chosen].mean()),
        }
        if bounded:
            figures[f"outside/{part}"] = float(rows.outside[chosen].mean())
        for index in sorted(set(bucket[chosen].tolist())):
            figures[f"gap/{part}/{BUCKETS[index]}"] = float(rows.energy[chosen & (bucket == index)].mean())
        if (several := chosen & (rows.alike > 1)).any():
            figures[f"spread/{part}"] = math.sqrt(rows.variance[several].mean())
    return figures


def _by_label(rows: _Rows) -> dict[str, float]:
    retained = sorted(set(rows.label[rows.forgotten == 0].astype(int).tolist()))
    return {f"gap/label-{label}": float(rows.energy[rows.label == label].mean()) for label in retained}


def _variance_within(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's part of its label's unbiased variance, mean over values, and its label's number of rows; both (B,)."""
    same = (labels[:, None] == labels).to(x.dtype)  # (B, B): no count of labels needed, so no copy to the host
    alike = same.sum(1)
    distance = (x - same @ x / alike[:, None]).square().mean(1)
    return distance * alike / (alike - 1).clamp_min(1), alike
