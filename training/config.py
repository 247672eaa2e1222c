"""What ``sfd-deploy train`` can be told. Defaults are the short-run choices measured on small networks;
the paper's own values, for runs of 50,000 iterations, are named beside them.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig


class TrainConfig(StageConfig):
    """Score forgetting distillation of one teacher (arXiv 2409.11219)."""

    teacher: str = Field(description="a teacher folder, or the name of a shipped one, e.g. fashion-mnist")
    forget: dict[str | int, str | int] = Field(
        {}, description="forgotten class → override class, by name or label; empty: plain distillation"
    )
    iterations: int = Field(ge=1, description="each is one fake-score step and one generator step")
    retained_rows: int = Field(56, ge=1, description="batch rows with retained labels")
    forget_rows: int = Field(8, ge=1, description="batch rows with forget labels; none when nothing is forgotten")
    forget_weight: float = Field(
        1 / 9, gt=0, description="lambda, the forget part's weight in both steps (official code: 0.01 for long runs)"
    )
    alpha: float = Field(
        1.2, ge=0.5, le=1.2, description="SiD's alpha; 0.5 is the exact gradient, above 1.2 a basin ends"
    )
    sigma_init: float = Field(2.5, gt=0, description="noise level of the one step; part of the model")
    sigma_min: float = Field(0.137, gt=0, description="lowest noise level of training, as in every SFD configuration")
    sigma_max: float = Field(13.0, gt=0, description="highest noise level of training")
    fake_score_rate: float = Field(5e-4, gt=0, description="Adam's learning rate of psi (official: 1e-5 to 3e-5)")
    generator_rate: float = Field(2e-4, gt=0, description="Adam's learning rate of theta (official: 1e-5)")
    clip_value: float = Field(1.0, gt=0, description="gradients of both networks are clipped by value")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the generator, ramped (official: 0.9999, no ramp)")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="autocast of the networks; weights and losses are FP32"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def ranges_must_fit(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        if self.fake_score_rate < self.generator_rate:
            raise ValueError("fake_score_rate is below generator_rate: the fake score would lag and training oscillate")
        return self
