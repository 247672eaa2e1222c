"""Rating a text-to-image training: the prompt families of an audit's probes, by its judges, on the ``select`` stream.

Of what must be gone only the run's own forget prompts are asked: the probes' other forget families are for the
audit alone, so that no step is chosen by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from sfd_deploy.config import StageConfig
from sfd_deploy.embedded import judges_knowing, resolve
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import Judge, load_judge
from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser
from sfd_deploy.models.generator import OneStepGenerator, image_shape
from sfd_deploy.models.text.folder import TextParts
from sfd_deploy.models.text.generator import OneStepTextGenerator
from sfd_deploy.models.text.network import PromptedUNet, encode
from sfd_deploy.models.text.sampler import GuidedTextTeacher, TextSampler
from sfd_deploy.probes import Families, Probes
from sfd_deploy.prompts import Prompts
from sfd_deploy.runtime.families import FamilyRuntime
from sfd_deploy.runtime.seam import Images, Runtime
from sfd_deploy.runtime.text_pytorch import TextGeneratorRuntime, TextTeacherRuntime
from sfd_deploy.training.previews import MOST_PER_LABEL, at_once, device_of, draw_by_label
from sfd_deploy.training.rating import Experts, Rating
from sfd_deploy.training.text_previews import TextPreviews

# Positions in latents that are decoded at once, which is what needs memory: four images of Stable Diffusion 1.5.
POSITIONS = 4 * 64 * 64


class TextWatchConfig(StageConfig):
    """How a text-to-image training is rated. Changes no weight, but which step is picked as the best."""

    probes: str = Field(description="probes, a file or a shipped name, as the audit takes them")
    judges: tuple[str, ...] = Field(
        (), description="judge folders or shipped ones' names; left out, the shipped ones that know the probes' classes"
    )
    every: int = Field(50, ge=1, description="look every so many iterations, and at the last")
    samples: int = Field(64, ge=2, le=MOST_PER_LABEL, description="images per family that its judge is shown at a look")


class TextWatch:
    """Looks at the averaged generator, asked for prompt families; of those who know a family, one judge looks.

    Args:
        config: what is asked, and who judges; judges are verified and opened.
        prompts: the run's own.
        parts: the teacher's pipeline; its text encoder is asked here, once.
        teacher: the yardstick; its network is asked at the first look.
        sealed: the teacher's folder, whose manifest says how it draws.

    Raises:
        ConfigError, PromptError: the probes cannot be used, or are longer than the text encoder reads.
        LabelError: a class that fewer than two judges know.
        RunError: there is no such judge.
        ManifestError, DigestError: a judge's folder is incomplete or was changed.
    """

    def __init__(
        self, config: TextWatchConfig, prompts: Prompts, parts: TextParts, teacher: Denoiser, sealed: Sealed
    ) -> None:
        self.config, self.vae, self.teacher = config, parts.vae, teacher
        probes = Probes.load(config.probes, "probes").model_copy(update={"families": {}})
        judges = _judges(config, probes)
        self.families = probes.bind(prompts, {judge.name: judge.class_names for judge in judges})
        self.sampler = TextSampler.of(sealed, probes.teacher.given())
        self.table = encode(parts, (*self.families.texts, ""))  # the last is what the teacher is guided away from
        self.at_once = at_once(image_shape(teacher.unet), POSITIONS)
        self.rating = Rating(experts_of(self.families, judges), config.samples, self._draw_teacher)

    def due(self, step: int, last: bool = False) -> bool:
        """Whether ``step`` is one to look at."""
        return last or step % self.config.every == 0

    def look(self, step: int, generator: OneStepGenerator) -> dict[str, float]:
        """Draw and rate; figures keyed ``watch/…``."""
        drawing = OneStepTextGenerator(self._asked(generator.denoiser), generator.sigma_init, self.vae)
        runtime = TextGeneratorRuntime(drawing.eval(), device_of(generator))
        return self.rating.look(step, lambda label, count: self._draw(runtime, label, count))

    def _draw_teacher(self, label: int, count: int) -> Images:
        drawing = GuidedTextTeacher(self._asked(self.teacher), self.vae, self.sampler)
        return self._draw(TextTeacherRuntime(drawing.eval(), device_of(self.teacher)), label, count)

    def _draw(self, runtime: Runtime, label: int, count: int) -> Images:
        images: Images = draw_by_label(FamilyRuntime(runtime, self.families), [label], count, self.at_once)[0]
        return images

    def _asked(self, denoiser: Denoiser) -> Denoiser:
        """``denoiser``'s network, asked for the families' prompts and the empty one."""
        if not isinstance(denoiser, DiscreteDenoiser):
            raise TypeError(f"{type(denoiser).__name__} has no schedule")
        return DiscreteDenoiser(PromptedUNet(denoiser.unet.unet, self.table), denoiser.schedule)


@dataclass(frozen=True)
class TextOnlooker:
    """Previews, and where a watch is given ratings: each at its own steps, both at the last."""

    previews: TextPreviews
    watch: TextWatch | None
    last_step: int

    @property
    def rating(self) -> Rating | None:
        """The watch's."""
        return None if self.watch is None else self.watch.rating

    def due(self, step: int, last: bool = False) -> bool:
        """Whether either looks at ``step``."""
        return self.previews.due(step, last) or (self.watch is not None and self.watch.due(step, last))

    def look(self, step: int, generator: OneStepGenerator) -> dict[str, float]:
        """What is due: a grid, figures."""
        last = step == self.last_step
        if self.previews.due(step, last):
            self.previews.look(step, generator)
        return self.watch.look(step, generator) if self.watch is not None and self.watch.due(step, last) else {}


def experts_of(families: Families, judges: Sequence[Judge]) -> Experts:
    """By family, the first of ``judges`` who knows what it shows."""
    chosen = tuple(next(judge for judge in judges if shown in judge.class_names) for shown in families.shows)
    return Experts(families, chosen, families.shows)


def _judges(config: TextWatchConfig, probes: Probes) -> list[Judge]:
    found = [resolve(name, "judge") for name in config.judges or map(str, judges_knowing(probes.classes))]
    with torch.random.fork_rng():  # a judge is built with random weights before its own are loaded
        return [load_judge(sealed) for sealed in found]
