"""What ``sfd-deploy train`` can be told with ``kind: text-to-image``. Defaults are the short-run choices measured on
a small teacher; the values of the official code, for Stable Diffusion 1.5, are those of the sd15 presets.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import ConfigError
from sfd_deploy.prompts import Prompts
from sfd_deploy.training.config import LoopConfig
from sfd_deploy.training.guidance import Guidance
from sfd_deploy.training.text_previews import PreviewConfig
from sfd_deploy.training.text_watch import TextWatchConfig

UNGUIDED_TEACHER = "guidance.teacher 1: an unguided teacher has no negative prompt"
LIST = "a text file with one prompt a line, or a shipped list's name"


class PhraseConfig(StageConfig):
    """Forget a concept by its name: the teacher is asked another phrase in the same prompts."""

    prompts: str = Field(description=f"what is forgotten: {LIST}; {{concept}} in it stands for the phrase")
    phrase: str | None = Field(None, min_length=1, description="the concept's name, taken literally in any case")
    substitute: str = Field(min_length=1, description="what the teacher is asked in place of the phrase")


class AttributeConfig(StageConfig):
    """Forget an attribute: the teacher is asked for the bare subject, guided away from every keyword."""

    keywords: str = Field(description=f"words for the attribute: {LIST}")
    subjects: str = Field(
        description=f"what has it: {LIST}; each is forgotten with each keyword where {{keyword}} is in it, or else"
        " before and behind it, and retained bare, guided away from the keywords"
    )


class GuidanceConfig(StageConfig):
    """Scales of classifier-free guidance, 1 for none; the generator is never guided (SiD-LSG, arXiv 2406.01561)."""

    fake_score_fit: float = Field(3.0, ge=1, description="kappa_1, psi while it is fitted (official: 4.5)")
    fake_score: float = Field(
        3.0, ge=1, description="kappa_2, psi in theta's step; apart from kappa_1, psi is not what was fitted"
    )
    teacher: float = Field(3.0, ge=1, description="kappa_4, phi (official: 4.5)")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share of prompts left empty in psi's step, where psi is guided (official: 0.1)"
    )
    fake_score_negative: bool = Field(
        False, description="negative prompts for psi too, not for the teacher alone (official: false)"
    )

    @property
    def guides_fake_score(self) -> bool:
        """Whether psi's answer to the empty prompt is ever used."""
        return self.fake_score_fit != 1 or self.fake_score != 1

    @model_validator(mode="after")
    def empty_prompt_must_be_fitted(self) -> Self:
        if self.guides_fake_score and self.dropout == 0:
            raise ValueError("dropout 0 with a guided fake score: its answer to the empty prompt is never fitted")
        return self

    def bind(self, prompts: Prompts) -> Guidance:
        """These scales for ``prompts``."""
        empty, negatives = prompts.unconditional, prompts.negatives
        return Guidance(
            self.fake_score_fit, self.fake_score, self.teacher,
            dropout=self.dropout if self.guides_fake_score else 0.0,
            unconditional=empty,
            away=tuple(negatives.get(prompt, empty) for prompt in range(prompts.count)) if negatives else (),
            fake_score_away=self.fake_score_negative,
        )  # fmt: skip


class AdapterConfig(StageConfig):
    """LoRA: low-rank matrices beside the U-Net's, trained in their place (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, description="of each matrix pair")
    alpha: int = Field(16, ge=1, description="what a pair adds is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="layers with a pair, by the end of their names"
    )


class TextTrainConfig(LoopConfig):
    """Score forgetting distillation of a Stable-Diffusion-shaped teacher, in latent space (arXiv 2409.11219)."""

    kind: Literal["text-to-image"] = Field(description="without it, the config is of class labels")
    retained: str = Field(description=f"prompts that stay: {LIST}; better thousands than tens, never with the concept")
    forget_phrase: PhraseConfig | None = Field(None, description="a concept that goes by name")
    forget_attribute: AttributeConfig | None = Field(None, description="an attribute that goes by negative prompt")
    init_from: str | None = Field(
        None, description="a run of this teacher: the generator starts at its generator, the fake score at its own"
    )
    guidance: GuidanceConfig = Field(GuidanceConfig(), description="of teacher and fake score")
    previews: PreviewConfig = Field(PreviewConfig(), description="pictures that the training shows of itself")
    watch: TextWatchConfig | None = Field(
        None, description="prompt families that judges are shown now and then: the best look is exported, not the last"
    )
    gradient_checkpointing: bool = Field(
        False, description="the U-Nets compute activations twice instead of keeping them: less memory, the same step"
    )
    lora: AdapterConfig | None = Field(
        None, description="train adapters on shared, frozen weights: less memory; left out, every weight is trained"
    )
    retained_rows: int = Field(48, ge=1, description="batch rows with retained prompts (official: 8)")
    forget_rows: int = Field(16, ge=1, description="batch rows with forget prompts (official: 8)")
    forget_weight: float = Field(0.2, gt=0, description="lambda, the forget part's weight in both steps (official: 1)")
    alpha: float = Field(1.0, ge=0.5, le=1.2, description="SiD's alpha (official for text: 1)")
    sigma_min: float = Field(0.138, gt=0, description="timestep 20 of Stable Diffusion's schedule (official)")
    sigma_max: float = Field(12.97, gt=0, description="timestep 979 of Stable Diffusion's schedule (official)")
    fake_score_rate: float = Field(3e-4, gt=0, description="Adam's learning rate of psi (official: 3e-6)")
    generator_rate: float = Field(1e-4, gt=0, description="Adam's learning rate of theta (official: 1e-6)")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the generator, per step; 0: none (official: none)")

    @model_validator(mode="after")
    def recipes_must_fit(self) -> Self:
        if self.forget_phrase is not None and self.forget_attribute is not None:
            raise ValueError("forget_phrase and forget_attribute are both set; forget one, then the other (init_from)")
        if self.forget_attribute is not None and self.guidance.teacher == 1:
            raise ValueError(f"forget_attribute with {UNGUIDED_TEACHER}")
        if self.share_generated and self.guidance.guides_fake_score:
            raise ValueError("share_generated fits psi on images of theta's step, where no prompt is left empty")
        return self

    def bound(self) -> dict[str, Any]:
        """All but what is only shown."""
        return {key: value for key, value in super().bound().items() if key != "previews"}

    @property
    def lists(self) -> tuple[str, ...]:
        """Every prompt list that is read, by name or file."""
        by_phrase, attribute = self.forget_phrase, self.forget_attribute
        named = () if by_phrase is None else (by_phrase.prompts,)
        return (self.retained, *named, *(() if attribute is None else (attribute.keywords, attribute.subjects)))

    def naming(self, phrase: str | None, substitute: str | None) -> TextTrainConfig:
        """The same config with the concept that a command line named.

        Raises:
            ConfigError: nothing is forgotten by name here, or a phrase is empty.
        """
        if phrase is None and substitute is None:
            return self
        if self.forget_phrase is None:
            raise ConfigError("this config forgets nothing by name (forget_phrase)", "leave the concept out")
        for option, words in (("--concept", phrase), ("--substitute", substitute)):
            if words is not None and not words.strip():
                raise ConfigError(f"{option} is empty", "give the words")
        values = self.resolved()
        given = {"phrase": phrase, "substitute": substitute}
        values["forget_phrase"] |= {key: value for key, value in given.items() if value is not None}
        return type(self).from_mapping(values, "command line")
