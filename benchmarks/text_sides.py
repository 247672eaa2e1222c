"""What the text-to-image training benchmark trains: a pipeline of random weights, and the ways to train it.

Sizes are Stable Diffusion 1.5's. Time and memory do not depend on the weights, so none are downloaded. There is no
text encoder, which has done its part before the first iteration (the table of encoded prompts is random too), and no
VAE, which previews alone ask. An untrained network is no epsilon network: the check on that is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.official_text import OfficialTextSchedule
from benchmarks.sides import Side
from sfd_deploy.models.denoiser import Denoiser, DiscreteDenoiser
from sfd_deploy.models.text.network import PromptedUNet
from sfd_deploy.prompts import Prompts
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.loop import SfdLoop, Start
from sfd_deploy.training.lora import adapted_start
from sfd_deploy.training.text_config import AdapterConfig, TextTrainConfig
from sfd_deploy.training.text_inputs import prompts_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SOMEBODY = "FIRST LAST"  # in a preset that leaves the name to its user: prompts are counted here, not encoded


@dataclass(frozen=True)
class Shape:
    """Sizes of a U-Net and of encoded prompts; the defaults are Stable Diffusion 1.5's."""

    latent_size: int = 64
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    heads: int = 8
    norm_groups: int = 32
    tokens: int = 77
    width: int = 768

    def unet(self) -> UNet2DConditionModel:
        """An untrained U-Net with cross attention on all levels but the last, channels-last as a loaded one is."""
        from diffusers import UNet2DConditionModel

        attending = len(self.block_channels) - 1
        unet = UNet2DConditionModel(
            sample_size=self.latent_size, in_channels=4, out_channels=4, block_out_channels=self.block_channels,
            layers_per_block=self.layers_per_block, norm_num_groups=self.norm_groups,
            down_block_types=(*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending), cross_attention_dim=self.width,
            attention_head_dim=self.heads,  # so called in Stable Diffusion's config, and read as the number of heads
        )  # fmt: skip
        return unet.to(memory_format=torch.channels_last)

    def teacher(self, prompts: int) -> Denoiser:
        """An epsilon network on Stable Diffusion's schedule, over ``prompts`` random prompts."""
        from diffusers import DDIMScheduler

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet, table = self.unet(), torch.randn(prompts, self.tokens, self.width)
        schedule = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        return DiscreteDenoiser(PromptedUNet(unet, table), schedule).eval()


STABLE_DIFFUSION = Shape()
SMALL = Shape(
    latent_size=8, block_channels=(8, 16), layers_per_block=1, heads=2, norm_groups=4, tokens=4, width=8
)  # fmt: skip


@dataclass(frozen=True)
class TextTask:
    """What every variant trains: a config, its prompts, and a teacher that stays on the CPU as it is."""

    config: TextTrainConfig
    prompts: Prompts
    teacher: Denoiser


def open_text_task(name: str, rows: int, shape: Shape) -> TextTask:
    """A train config by preset or file with ``rows`` retained rows, forget rows in its own ratio, in one part.

    Raises:
        ConfigError: no such config, or not one of prompts.
        PromptError: a prompt list that cannot be used.
    """
    config = TextTrainConfig.load(name, "train")
    forget_rows = max(1, round(rows * config.forget_rows / config.retained_rows))
    changes = {"retained_rows": rows, "forget_rows": forget_rows, "accumulate": 1}
    config = TextTrainConfig.from_mapping(config.resolved() | changes, name)
    if config.forget_phrase is not None and config.forget_phrase.phrase is None:
        config = config.naming(SOMEBODY, None)
    prompts = prompts_of(config)
    teacher = shape.teacher(prompts.count)
    if config.gradient_checkpointing:
        teacher.unet.unet.enable_gradient_checkpointing()
    return TextTask(config, prompts, teacher)


def ours(task: TextTask, device: str, **changes: Any) -> Side:
    """Our loop as ``sfd-deploy train`` runs it."""
    config = task.config.model_copy(update=changes)
    teacher = copy.deepcopy(task.teacher).to(device)
    start = Start() if config.lora is None else adapted_start(teacher, Start(), config.lora, config.seed)
    loop = SfdLoop(
        config, task.prompts, teacher, start, workers=Workers(torch.device(device)),
        guidance=config.guidance.bind(task.prompts),
    )  # fmt: skip
    return Side(loop.iterate, loop.averaged())


def literal(task: TextTask, device: str) -> Side:
    """The official schedule, literally: FP32, four terms, as many forget as retained rows."""
    schedule = OfficialTextSchedule(task.config, task.prompts, task.teacher, device)
    return Side(schedule.iterate, schedule.theta)


BF16, FP32, LORA, LITERAL = "ours, bf16", "ours, fp32", "ours, bf16, LoRA", "literal, fp32"
ADAPTER = AdapterConfig()
VARIANTS: dict[str, Callable[[TextTask, str], Side]] = {
    BF16: partial(ours, precision="bf16", lora=None),
    FP32: partial(ours, precision="fp32", lora=None),
    LORA: partial(ours, precision="bf16", lora=ADAPTER),
    LITERAL: literal,
}
