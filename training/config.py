"""What ``sfd-deploy train`` can be told. Defaults are the short-run choices measured on small networks;
the paper's own values, for runs of 50,000 iterations, are named beside them and are those of the cifar10 presets.

``LoopConfig`` is what every training has; ``TrainConfig`` adds what class labels need. Prompts are in ``text_config``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import ConfigError
from sfd_deploy.labels import MIXTURE, ClassKey, Labels
from sfd_deploy.training.conditions import Conditions
from sfd_deploy.training.monitor import MonitorConfig
from sfd_deploy.training.precision import AUTO, Precision

MEND_OVERRIDE = "name a retained class as the override, or `mixture` with a `classifier`"
MOST_OF_THE_START = 0.01  # in the exported average; the published 0.9999 over 50,000 iterations keeps 0.7 %
FAILING_OVERRIDES = {
    "null": "the unconditional teacher still draws the forget class, with its share of the training images",
    "random": "a random label per row averages scores, not images: what is drawn lands between the classes",
}


class LoopConfig(StageConfig):
    """What the loop reads, whatever the conditions are (arXiv 2409.11219)."""

    teacher: str = Field(description="a teacher folder, the name of a shipped one (fashion-mnist), or a hub id")
    teacher_digest: str | None = Field(
        None, pattern="^[0-9a-f]{12,64}$", description="the teacher's digest must begin so; left out, any teacher goes"
    )
    iterations: int = Field(ge=1, description="each is one fake-score step and one generator step (official: 50,000)")
    retained_rows: int = Field(
        56, ge=1, description="batch rows with retained labels; ours: decision 0002's first row (official: 128)"
    )
    forget_rows: int = Field(
        8,
        ge=1,
        description="batch rows with forget labels, none when nothing is forgotten; ours, like those (official: 128)",
    )
    forget_weight: float = Field(
        1 / 9,
        gt=0,
        description="lambda, the forget part's weight in both steps: apart, the generator overshoots. 1/9: each of ten "
        "labels, one of them forgotten, weighs the same; of F among K, F / (K - F) does (official: 0.01, long runs)",
    )
    objective: Literal["sid", "diff-instruct"] = Field(
        "sid",
        description="sid: gradients pass through both scores (SiD, as in the paper); diff-instruct: through the image "
        "alone (arXiv 2305.18455), cheaper, and not led astray by a fake score that is still noisy",
    )
    alpha: float = Field(
        1.2,
        ge=0.5,
        le=1.2,
        description="of sid alone (arXiv 2404.04057: 1.2); 0.5 is the exact gradient; above 1.2 an over-dispersed "
        "generator is driven further out",
    )
    sigma_init: float = Field(
        2.5, gt=0, description="noise level of the one step, part of the model; 2.5 in every SFD and SiD configuration"
    )
    sigma_min: float = Field(0.137, gt=0, description="lowest noise level of training, as in every SFD configuration")
    sigma_max: float = Field(13.0, gt=0, description="highest noise level of training, as in every SFD configuration")
    fake_score_rate: float = Field(
        5e-4,
        gt=0,
        description="Adam's learning rate of psi; ours, for hundreds of iterations: decision 0002's first row "
        "(official: 1e-5 to 3e-5)",
    )
    generator_rate: float = Field(
        2e-4,
        gt=0,
        description="Adam's learning rate of theta, not above psi's; ours, as fake_score_rate (official: 1e-5)",
    )
    decay_share: float = Field(
        0.0, ge=0, le=1, description="last part of the run in which both rates fall linearly to 0 (official: none)"
    )
    clip_value: float = Field(1.0, gt=0, description="gradients of both networks are clipped by value (official: 1.0)")
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="of the generator, per step; ours, for hundreds of steps (official: 0.9999)"
    )
    ema_ramp: bool = Field(
        True,
        description="decay min(ema_decay, (1 + k) / (10 + k)): without it (official) early averages still hold the "
        "start, which knows the forget class; refused where the last one would",
    )
    share_generated: bool = Field(
        False, description="fit psi on the images that theta's step draws: 4 network calls an iteration, not 5"
    )
    accumulate: int = Field(1, ge=1, description="parts that the batch is computed in, one after the other")
    precision: Precision = Field(
        "auto", description=f"autocast of the networks; weights and losses are FP32 (official: fp32); auto: {AUTO}"
    )
    compile: bool = Field(False, description="torch.compile, on a GPU only (docs/decisions/0001)")
    checkpoint_every: int = Field(50, ge=1, description="iterations from one checkpoint to the next")
    seed: int = Field(0, ge=0, description="of everything that is drawn: labels, latents, noise levels, noise")

    @model_validator(mode="after")
    def ranges_must_fit(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        if self.fake_score_rate < self.generator_rate:
            raise ValueError("fake_score_rate is below generator_rate: the fake score would lag and training oscillate")
        if not self.ema_ramp and (kept := self.ema_decay**self.iterations) > MOST_OF_THE_START:
            raise ValueError(
                f"ema_decay {self.ema_decay:g} without ema_ramp over {self.iterations} iterations: {kept:.0%} of what "
                "is exported would be the start, which knows what is to be forgotten; set ema_ramp: true"
            )
        if self.share_generated and self.accumulate > 1:
            raise ValueError("share_generated keeps the graphs of all parts, which accumulate is there to avoid")
        return self

    def bound(self) -> dict[str, Any]:
        """The values that a checkpoint and a finished run belong to.

        Not in how many parts a batch goes, which changes none, and not where the teacher lies: that counts by digest.
        """
        free = {"accumulate", "teacher", "teacher_digest"}
        return {key: value for key, value in self.resolved().items() if key not in free}

    def rows(self, conditions: Conditions) -> int:
        """Rows of one whole batch."""
        return self.retained_rows + (self.forget_rows if conditions.forget else 0)


class TrainConfig(LoopConfig):
    """Score forgetting distillation of one teacher (arXiv 2409.11219)."""

    class_names: tuple[str, ...] = Field((), description="names in label order, for a teacher that records none")
    init_from: str | None = Field(
        None, description="a run: the generator starts at its generator, the fake score at its fake score"
    )
    forget: dict[ClassKey, ClassKey] = Field(
        {},
        description="forgotten class → override class, by name or label, or `mixture`; empty: plain distillation, "
        "or with init_from of a run that forgot, more of the same",
    )
    classifier: str | None = Field(
        None,
        description="a judge folder, or a shipped one's name; for the mixture: how likely each retained label is",
    )
    monitor: MonitorConfig = Field(MonitorConfig(), description="what is watched while training, and how often")

    def bound(self) -> dict[str, Any]:
        """Of what is watched only when a judge looks and at how much: that picks the step which is exported."""
        values = {key: value for key, value in super().bound().items() if key != "monitor"}
        if self.monitor.judge is None:
            return values
        return values | {"looks": {"every": self.monitor.every, "samples": self.monitor.samples}}

    @field_validator("forget", mode="before")
    @classmethod
    def failing_overrides_are_refused(cls, value: object) -> object:
        for label, override in value.items() if isinstance(value, dict) else ():
            name = "null" if override is None else str(override)
            if name in FAILING_OVERRIDES:
                raise ValueError(f"override {name} of {label}: {FAILING_OVERRIDES[name]}; {MEND_OVERRIDE}")
        return value

    def require_classifier(self, labels: Labels) -> None:
        """Refuse a mixture without a classifier, and a classifier that nothing would read.

        Raises:
            ConfigError: naming the label.
        """
        mixed = [labels.class_names[label] for label, override in labels.forget.items() if override == MIXTURE]
        if mixed and self.classifier is None:
            raise ConfigError(
                f"override mixture of {mixed[0]} needs a classifier", "name a judge folder of its classes: `classifier`"
            )
        if self.classifier is not None and not mixed:
            raise ConfigError("`classifier` is set, but no override is `mixture`", "leave `classifier` out")
