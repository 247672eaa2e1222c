"""Train a judge: a classifier of real images, sealed with its errors and feature statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from sfd_deploy.errors import DataError
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import WEIGHTS, Classifier, ClassifierConfig
from sfd_deploy.measure.sealing import measure_judge
from sfd_deploy.progress import log_to
from sfd_deploy.runs import sealed_folder
from sfd_deploy.training.checkpoint import Checkpoint
from sfd_deploy.training.data import ImagesConfig, LabelledImages
from sfd_deploy.training.distributed import require_alone
from sfd_deploy.training.made import bound_to, require_unmade
from sfd_deploy.training.memory import MemoryLimitError, is_out_of_memory
from sfd_deploy.training.precision import AUTO, Precision, autocast
from sfd_deploy.training.steps import Skips, run_steps, say_estimate
from sfd_deploy.training.streams import stream
from sfd_deploy.training.text_teacher.coloured import ColouredImages, load_coloured

CHECKPOINT_EVERY = 500


class JudgeConfig(ImagesConfig):
    """How a judge is trained."""

    classifier: ClassifierConfig
    coloured: Literal["object", "colour"] | None = Field(
        None, description="colour the images as a text-to-image teacher's are, and judge this; names are the captions'"
    )
    epochs: int = Field(12, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW's peak, one cycle")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's")
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="share of the target spread over all classes")
    shift: int = Field(2, ge=0, description="random shift in pixels, either way")
    edges: Literal["black", "repeat"] = Field("black", description="what a shift moves in: -1, or the edge again")
    flip: bool = Field(True, description="random horizontal flips")
    patches: float = Field(
        0.0, ge=0, le=1, description="share of training images painted in patches of two colourings, `coloured` alone:"
        " else a spoilt image of one object is taken for another",
    )  # fmt: skip
    precision: Precision = Field("auto", description=f"autocast of the forward pass while training; auto: {AUTO}")
    min_accuracy: float = Field(0.0, ge=0, le=1, description="on held-out real images; below it the judge is refused")
    seed: int = Field(0, ge=0, description="of weights, order, shifts, flips and colours")

    @model_validator(mode="after")
    def coloured_images_are_given(self) -> Self:
        if self.coloured and self.class_names:
            raise ValueError("coloured judges take their class_names from the captions: leave the key out")
        if self.coloured and self.pad_to is not None:
            raise ValueError("coloured images are padded already: leave pad_to out")
        if self.patches and self.coloured != "object":
            raise ValueError("patches are of coloured images, judged by their object")
        if self.coloured and self.classifier.channels != 3:
            raise ValueError(f"coloured images have 3 channels, the classifier {self.classifier.channels}")
        return self


def make_judge(config: JudgeConfig, source: Path, target: Path, device: str = "cpu") -> Sealed:
    """Train a judge on the images in ``source`` and seal it as ``target``; resumes from ``target``.work.

    Raises:
        DataError, RunError: as ``load_both`` and ``require_unmade``, before the first step.
        DivergedError, LimitError, …: as ``train_judge`` and ``seal_judge``.
    """
    train, held_out = load_both(config, source)
    require_unmade(target, "judge", config, train)
    work = target.with_name(f"{target.name}.work")
    with log_to(work / "train.log"):
        classifier = train_judge(config, train, work / "checkpoint.safetensors", device)
    return seal_judge(config, classifier, train, held_out, target, source.name)


def load_both(config: JudgeConfig, source: Path) -> tuple[LabelledImages, LabelledImages]:
    """What a judge is trained on, and the held-out images that it is measured on.

    Raises:
        DataError: as ``load_judged``; the splits are of different classes; or images that do not fit the classifier.
    """
    train, held_out = (load_judged(config, source, split) for split in ("train", "test"))
    if train.class_names != held_out.class_names:
        ours, theirs = (", ".join(data.class_names) for data in (train, held_out))
        raise DataError(
            f"{source}: classes to train on are {ours}, held-out ones {theirs}", "give both splits the same classes"
        )
    classifier, halvings = config.classifier, len(config.classifier.widths) - 1
    channels, *sides = train.shape
    if channels != classifier.channels:
        raise DataError(f"{source}: images have {channels} channels, the classifier {classifier.channels}",
                        "set `classifier.channels`")  # fmt: skip
    if min(sides) < 2**halvings:
        raise DataError(f"{source}: {min(sides)} pixels cannot be halved {halvings} times", "give fewer `widths`")
    return train, held_out


def load_judged(config: JudgeConfig, source: Path, split: str) -> LabelledImages:
    """The images of ``split`` ("train" or "test") that the judge is trained or measured on.

    Raises:
        DataError: missing, damaged or too large, or not Fashion-MNIST where it is to be coloured.
    """
    if config.coloured:
        return load_coloured(source, split, config.coloured, config.seed)
    return config.read(source, split)


def augment(images: Tensor, config: JudgeConfig, draws: torch.Generator) -> Tensor:
    """Shift each image by up to ``shift`` pixels, with ``edges`` moved in, and flip half of them."""
    if config.shift:
        padded = _padded(images, config)
        offsets = torch.randint(2 * config.shift + 1, (2, len(images)), generator=draws)
        rows = offsets[0][:, None, None] + torch.arange(images.shape[2])[None, :, None]
        columns = offsets[1][:, None, None] + torch.arange(images.shape[3])[None, None, :]
        each = torch.arange(len(images))[:, None, None]
        images = padded[each, :, rows, columns].permute(0, 3, 1, 2)
    if config.flip:
        flips = torch.rand(len(images), generator=draws) < 0.5
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
    return images


def _padded(images: Tensor, config: JudgeConfig) -> Tensor:
    sides = [config.shift] * 4
    if config.edges == "repeat":
        return nn.functional.pad(images, sides, mode="replicate")
    return nn.functional.pad(images, sides, value=-1.0)


def one_cycle(peak: float, total: int) -> list[float]:
    """Learning rate of each of ``total`` steps: torch's OneCycleLR, as a list, so that resuming is an index."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.OneCycleLR(dummy, peak, total, cycle_momentum=False)
    rates = []
    for _ in range(total):
        rates.append(float(schedule.get_last_lr()[0]))
        dummy.step()
        schedule.step()
    return rates


def train_judge(config: JudgeConfig, train: LabelledImages, checkpoint_file: Path, device: str = "cpu") -> Classifier:
    """Train to the end, resuming from ``checkpoint_file`` if it is there.

    Raises:
        ConfigError, ManifestError: the checkpoint is of another config or data, or damaged; several processes.
        DivergedError: losses or gradients stayed non-finite, or a weight is; the last checkpoint stays.
        MemoryLimitError: the batch does not fit.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    require_alone("judge")
    torch.manual_seed(config.seed)
    classifier = config.classifier.build(len(train.class_names)).to(device).train()
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stub lacks it; in place
    optimiser = torch.optim.AdamW(
        classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    checkpoint = Checkpoint(checkpoint_file, {"net": classifier}, {"adam": optimiser}, bound_to(config, train))
    step, notes = checkpoint.restore()
    skips = Skips("judge", classifier)
    total = config.epochs * steps_per_epoch(config, train)
    rates = one_cycle(config.learning_rate, total)
    loss_of = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def iterate(step: int) -> str:
        images, labels = (values.to(device) for values in training_batch(config, train, step))
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(device, config.precision):
            logits = classifier(images)
        loss = loss_of(logits.float(), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.param_groups[0]["lr"] = rates[step]
        value = loss.item()
        if not skips.must(step, value):
            optimiser.step()
        return f"loss {value:.4f}"

    def save(done: int) -> None:
        checkpoint.save(done, skips.notes())

    try:
        say_estimate("judge", iterate, total - step, [classifier], [optimiser], device)
        skips.restore(notes)  # the probes' own skips are not the training's
        run_steps("judge", step, total, iterate, save, CHECKPOINT_EVERY, [classifier])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"out of memory on {device} with a batch of {config.batch_size}",
            "lower `batch_size`, and train into a new folder: a checkpoint keeps to its config",
        ) from None
    skips.tell(total)
    classifier.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return classifier.eval()


def steps_per_epoch(config: JudgeConfig, train: LabelledImages) -> int:
    """Whole batches of the training images; the rest waits for the next epoch's order."""
    return max(1, len(train) // config.batch_size)


def training_batch(config: JudgeConfig, train: LabelledImages, step: int) -> tuple[Tensor, Tensor]:
    """Augmented images (B, C, H, W) and labels (B,) of a step: the next rows of its epoch's random order."""
    epoch, turn = divmod(step, steps_per_epoch(config, train))
    order = torch.randperm(len(train), generator=stream(config.seed, "judge-epoch", epoch))
    rows = order[turn * config.batch_size :][: config.batch_size]
    if isinstance(train, ColouredImages) and config.patches:
        images, labels = train.patchy_batch(rows, config.patches, stream(config.seed, "judge-patches", step))
    else:
        images, labels = train.batch(rows)
    return augment(images, config, stream(config.seed, "judge", step)), labels


def seal_judge(
    config: JudgeConfig, classifier: Classifier, train: LabelledImages, held_out: LabelledImages, target: Path,
    data_name: str,
) -> Sealed:  # fmt: skip
    """Measure a judge that was trained on ``train`` on held-out real images and seal it.

    Raises:
        DataError: a class without two images.
        LimitError: its accuracy is below ``config.min_accuracy``.
    """
    measured = measure_judge(classifier.to("cpu"), held_out, held_out.class_names)
    measured.require(config.min_accuracy, "train longer or wider")
    facts = {"classifier": config.classifier.resolved(), "data": data_name, "data_digest": train.digest,
             **measured.facts}  # fmt: skip
    with sealed_folder(target, "judge", config=config.resolved(), seed=config.seed, facts=facts) as folder:
        save_file(classifier.state_dict(), folder / WEIGHTS)
        measured.write(folder)
    return verify(target, "judge")
