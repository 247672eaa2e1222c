"""What a text-to-image training is made from: the teacher, an earlier run, and every prompt by number."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sfd_deploy.errors import ConfigError, PromptError, RunError
from sfd_deploy.manifest import Sealed
from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser
from sfd_deploy.models.folder import read_weights
from sfd_deploy.models.text.folder import SAVE_AGAIN, open_text_teacher
from sfd_deploy.models.text.network import PromptedUNet
from sfd_deploy.phrases import require_without
from sfd_deploy.prompt_lists import prompt_list, shipped_lists
from sfd_deploy.prompts import Prompts, negative_prompts, phrase_prompts, plain_prompts, prompts_in
from sfd_deploy.training.inputs import (
    OTHER_FOLDER,
    Origin,
    open_run_of,
    require_pinned,
    require_same_level,
    require_same_network,
)
from sfd_deploy.training.loop import Start
from sfd_deploy.training.started import find_start
from sfd_deploy.training.text_config import UNGUIDED_TEACHER, TextTrainConfig


@dataclass(frozen=True, kw_only=True)
class TextInputs(Origin):
    """Everything that a text-to-image training reads, verified."""

    prompts: Prompts

    def require_made(self, generator: Sealed) -> None:
        """Of other prompts too."""
        super().require_made(generator)
        if prompts_in(generator.folder) != self.prompts:
            raise RunError(f"{generator.folder.parent}: was trained on other prompts", OTHER_FOLDER)


def open_text_inputs(config: TextTrainConfig, work: Path) -> TextInputs:
    """Open and verify what ``config`` names, in the run whose work folder is ``work``.

    Raises:
        ConfigError: no phrase to forget, another teacher than the pinned one, or one without guidance where the
            earlier run forgot by negative prompt.
        PromptError: a prompt list, or a prompt in it, that cannot be used.
        ModelError: the teacher is no Stable-Diffusion-shaped pipeline.
        RunError: the earlier run is of another teacher, or none.
        ManifestError, DigestError: a folder is not what its manifest says.
    """
    recorded = _recorded(config, work)
    prompts = recorded or prompts_of(config)
    teacher = open_text_teacher(config.teacher)
    require_pinned(config, teacher)
    if config.init_from is None:
        return TextInputs(teacher=teacher, prompts=prompts)
    earlier = open_run_of(teacher, config.init_from)
    prompts = recorded or still_forgetting(prompts, prompts_in(earlier.generator.folder))
    if prompts.negatives and config.guidance.teacher == 1:
        raise ConfigError(f"{config.init_from} forgot an attribute, and {UNGUIDED_TEACHER}", "guide the teacher")
    return TextInputs(teacher=teacher, earlier=earlier, prompts=prompts)


def _recorded(config: TextTrainConfig, work: Path) -> Prompts | None:
    """The prompts that this very training was started with, where a file that named them is gone."""
    if all(name in shipped_lists() or Path(name).exists() for name in config.lists):
        return None
    if (started := find_start(work)) is None:
        return None
    same = TextTrainConfig.from_mapping(started.config, started.source).bound() == config.bound()
    return prompts_in(work) if same else None


def prompts_of(config: TextTrainConfig) -> Prompts:
    """The prompts that ``config`` alone names.

    Raises:
        ConfigError: no phrase to forget is given.
        PromptError: as ``sfd_deploy.prompts`` says.
    """
    retained = prompt_list(config.retained)
    if (by_phrase := config.forget_phrase) is not None:
        if by_phrase.phrase is None:
            raise ConfigError(
                "no concept to forget is named: forget_phrase.phrase is empty",
                'give it with --concept "THE WORDS" and what is drawn instead with --substitute "OTHER WORDS"',
            )
        return phrase_prompts(retained, prompt_list(by_phrase.prompts), by_phrase.phrase, by_phrase.substitute)
    if (attribute := config.forget_attribute) is not None:
        return negative_prompts(retained, prompt_list(attribute.subjects), prompt_list(attribute.keywords))
    return plain_prompts(retained)


def still_forgetting(prompts: Prompts, earlier: Prompts) -> Prompts:
    """``prompts``, and what ``earlier`` forgot beside it: in no part, it would come back; retained, be taught again.

    The earlier run's retained prompts with a negative prompt stay with it; where both give one, both count.

    Raises:
        PromptError: a prompt was forgotten earlier with another override, or a retained or override prompt holds
            a phrase that either forgets.
        ConfigError: a prompt forgotten by one is retained or an override in the other.
    """
    away = _both_negatives(prompts, earlier)
    texts = tuple(dict.fromkeys((*prompts.texts, *_texts_forgotten(earlier), *away.values())))
    number = {text: index for index, text in enumerate(texts)}
    forgotten = {number[earlier.texts[key]]: number[earlier.texts[value]] for key, value in earlier.forget.items()}
    for prompt, override in forgotten.items():
        if prompts.forget.get(prompt, override) != override:
            raise PromptError(
                f"prompt {texts[prompt]!r} was forgotten by the earlier run, {texts[override]!r} in its place",
                "leave it out: it stays forgotten, and another override would teach it anew",
            )
    forget, phrases = prompts.forget | forgotten, tuple(dict.fromkeys((*prompts.phrases, *earlier.phrases)))
    silent = (number[earlier.texts[prompt]] for prompt in earlier.retained if prompt in earlier.negatives)
    retained = tuple(dict.fromkeys((*prompts.retained, *silent)))
    for kind, asked in (("retained prompt", retained), ("override prompt", dict.fromkeys(forget.values()))):
        require_without(kind, [texts[prompt] for prompt in asked], phrases)
    values = prompts.model_dump() | {
        "texts": texts, "retained": retained, "forget": forget, "phrases": phrases,
        "negatives": {number[prompt]: number[negative] for prompt, negative in away.items()},
    }  # fmt: skip
    return Prompts.from_mapping(values, "these prompts and the earlier run's")


def _both_negatives(prompts: Prompts, earlier: Prompts) -> dict[str, str]:
    """Prompt → negative prompt of either run; of both, the earlier one's words first."""
    then, now = ({one.texts[a]: one.texts[b] for a, b in one.negatives.items()} for one in (earlier, prompts))
    twice = (prompt for prompt in then if now.get(prompt, then[prompt]) != then[prompt])
    return then | now | {prompt: f"{then[prompt]}, {now[prompt]}" for prompt in twice}


def _texts_forgotten(prompts: Prompts) -> Iterable[str]:
    asked = (*prompts.forget, *prompts.forget.values(), *prompts.negatives, *prompts.negatives.values())
    return (prompts.texts[prompt] for prompt in asked)


def load_text_start(inputs: TextInputs, config: TextTrainConfig, teacher: Denoiser) -> Start:
    """Where generator and fake score start: the earlier run's U-Nets, in the teacher's schedule and prompts.

    Raises:
        RunError: another network or another noise level of the one step.
        ModelError: weights that cannot be read.
    """
    if inputs.earlier is None:
        return Start()
    sealed = inputs.earlier.generator
    require_same_level(sealed, float(sealed.facts["sigma_init"]), config, teacher)
    psi = inputs.earlier.fake_score
    return Start(_like(teacher, sealed.folder), None if psi is None else _like(teacher, psi.folder))


def _like(teacher: Denoiser, folder: Path) -> Denoiser:
    from diffusers import UNet2DConditionModel

    if not isinstance(teacher, DiscreteDenoiser):
        raise TypeError(f"{type(teacher).__name__} has no schedule to share")
    unet = read_weights(UNet2DConditionModel, folder / "unet", SAVE_AGAIN)
    require_same_network(DiscreteDenoiser(PromptedUNet(unet, teacher.unet.table), teacher.schedule), teacher, folder)
    # A copy, so that what was set on the teacher (checkpointed gradients, the layout in memory) holds here too.
    denoiser = copy.deepcopy(teacher)
    denoiser.unet.unet.load_state_dict(unet.state_dict())
    return denoiser
