"""The limits an audit holds artefacts to, and the plan of what is drawn, fixed before the first draw. Pure.

A policy is a YAML file; its digest is in every report. A plan follows from a policy and the labels
alone: which latents are drawn under which label. All artefacts of an audit draw the same latents.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import digest_of
from sfd_deploy.measure.rates import samples_to_certify
from sfd_deploy.probes import Families

Purpose = Literal["forget", "override", "retained", "reference", "picture", "control"]
# Pictures of the teacher's forget labels in the report; no figure is taken of them.
PICTURES = 8


class ParityLimit(StageConfig):
    """How far an artefact may be from the PyTorch generator on the same latents."""

    min_psnr_db: float = Field(description="mean over images of the PSNR, in dB over the data range of 2")
    min_agreement: float = Field(ge=0, le=1, description="share of images that every judge calls the same")


class ParityLimits(StageConfig):
    """One limit per precision. An alarm for broken exports, not a measure of quality: the other limits are.

    Rounding and another order of sums leave FP32 beyond 100 dB on a CPU and TF32 near 60; FP16 weights and
    activations near 60; INT8 of convolutions and matrix products was measured at 36, and a graph
    with its additions quantised too, visibly worse, at 17.6.
    """

    fp32: ParityLimit = ParityLimit(min_psnr_db=60.0, min_agreement=0.99)
    fp16: ParityLimit = ParityLimit(min_psnr_db=40.0, min_agreement=0.97)
    int8: ParityLimit = ParityLimit(min_psnr_db=20.0, min_agreement=0.85)

    def of(self, precision: str) -> ParityLimit:
        """The limit of a precision.

        Raises:
            KeyError: there is none of that name.
        """
        limits: dict[str, ParityLimit] = {"fp32": self.fp32, "fp16": self.fp16, "int8": self.int8}
        return limits[precision]


class Policy(StageConfig):
    """What an artefact must show to pass, and how many images it must show it on."""

    name: str = Field("custom", description="shown in reports")
    confidence: float = Field(0.99, ge=0.5, lt=1, description="of each one-sided bound")
    max_forget_rate: float = Field(0.01, gt=0, lt=1, description="limit on the bounds of the forget rate")
    max_retained_drop: float = Field(0.03, ge=0, le=1, description="mean retained accuracy below the teacher's own")
    min_spread: float = Field(0.7, ge=0, description="least within-class spread over the teacher's, any retained label")
    min_prompt_spread: float = Field(
        0.0, ge=0, description="of prompts: how far two images of one prompt are apart, over the teacher's; 0: no limit"
    )
    max_frechet_ratio: float = Field(2.0, gt=0, description="Fréchet distance to real images over the teacher's own")
    max_override_gap: float = Field(
        0.05, ge=0, le=1, description="the override share may be this far below the teacher's accuracy on the override"
    )
    parity: ParityLimits = ParityLimits()
    forget_samples: int = Field(2000, ge=1, description="images per forget label; enough that zero hits can pass")
    override_samples: int = Field(2000, ge=1, description="images per override label, for the judges' own error")
    retained_samples: int = Field(200, ge=2, description="images per retained label")
    reference_samples: int = Field(200, ge=2, description="teacher images per retained label: the slow ones")
    seed: int = Field(0, ge=0, description="of the audit stream of latents")

    @model_validator(mode="after")
    def sizes_must_suffice(self) -> Self:
        needed = samples_to_certify(self.max_forget_rate, self.confidence)
        if self.forget_samples < needed:
            raise ValueError(
                f"forget_samples {self.forget_samples} cannot certify a rate of {self.max_forget_rate:g} at confidence "
                f"{self.confidence:g} even with zero hits; take at least {needed}"
            )
        if self.retained_samples < self.reference_samples:
            # The Fréchet distance shrinks with the sample size, so both sides are taken at the teacher's.
            raise ValueError(
                f"retained_samples {self.retained_samples} are fewer than the teacher's reference_samples "
                f"{self.reference_samples}; distances compare at one sample size only"
            )
        return self

    @property
    def digest(self) -> str:
        """Hex sha256 of every value, defaults included."""
        return digest_of(self.resolved())


class Cell(StageConfig):
    """Images ``start`` to ``start + n`` of a latent stream, all under one label, drawn for one purpose."""

    purpose: Purpose
    label: int
    stream: Literal["audit"] = "audit"
    start: int
    n: int

    @property
    def stop(self) -> int:
        """One past the last image's index."""
        return self.start + self.n


class Plan(StageConfig):
    """Every image an audit draws. Cells never share a latent, so no two figures lean on the same noise.

    Prompt families are labels too: which of a family's prompts an image is drawn from follows from its seed. Of their
    forget families the teacher draws more than pictures, a positive control: whether judges see the concept at all.
    """

    seed: int
    labels: Families | Labels
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, policy: Policy, labels: Labels) -> Self:
        """The plan of a policy for a model's labels or prompt families."""
        before: tuple[Purpose, int] = ("picture", PICTURES)
        if isinstance(labels, Families):
            before = ("control", policy.reference_samples)
        wanted: list[tuple[Purpose, int, int]] = [
            *(("forget", label, policy.forget_samples) for label in sorted(labels.forget)),
            *(("override", label, policy.override_samples) for label in labels.overrides),
            *(("retained", label, policy.retained_samples) for label in labels.retained),
            *(("reference", label, policy.reference_samples) for label in labels.retained),
            *((before[0], label, before[1]) for label in sorted(labels.forget)),
        ]
        cells, start = [], 0
        for purpose, label, n in wanted:
            cells.append(Cell(purpose=purpose, label=label, start=start, n=n))
            start += n
        return cls(seed=policy.seed, labels=labels, cells=tuple(cells))

    @property
    def digest(self) -> str:
        """Hex sha256 of labels, seed and cells."""
        return digest_of(self.resolved())

    @property
    def subject_cells(self) -> tuple[Cell, ...]:
        """What every audited artefact draws."""
        return tuple(cell for cell in self.cells if cell.purpose in {"forget", "override", "retained"})

    @property
    def teacher_cells(self) -> tuple[Cell, ...]:
        """What the teacher draws as the reference."""
        return tuple(cell for cell in self.cells if cell.purpose in {"reference", "picture", "control"})

    def latents(self, cells: tuple[Cell, ...]) -> tuple[Latents, NDArray[np.int64]]:
        """Latents and labels (N,) of ``cells``, one after the other."""
        seeds = [Latents.of_stream(cell.stream, self.seed, cell.start, cell.n).seeds for cell in cells]
        labels = [np.full(cell.n, cell.label, np.int64) for cell in cells]
        return Latents(np.concatenate(seeds)), np.concatenate(labels)
