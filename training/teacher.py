"""Train a class-conditional EDM teacher on labelled images (Karras et al., arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd_deploy.embedded import resolve
from sfd_deploy.errors import ConfigError, DataError
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import Judge, require_distinct_names, require_same_classes
from sfd_deploy.models.denoiser import EdmDenoiser, edm_weight
from sfd_deploy.models.generator import image_shape, load_teacher, save_teacher
from sfd_deploy.models.network import NetworkConfig
from sfd_deploy.models.sampler import SamplerConfig
from sfd_deploy.progress import progress_bar
from sfd_deploy.runs import sealed_folder
from sfd_deploy.runtime.pytorch import TeacherRuntime
from sfd_deploy.runtime.seam import Images, draw_all
from sfd_deploy.training.data import ImagesConfig, LabelledImages
from sfd_deploy.training.frame import MonitorConfig, PaceConfig, Training, total_steps, train_to_end
from sfd_deploy.training.made import bound_to
from sfd_deploy.training.previews import LABELS_SHOWN, QUICK_SAMPLER, at_once, device_of, draw_by_label
from sfd_deploy.training.streams import stream

CHECKPOINT_EVERY = 500


class TeacherConfig(PaceConfig, ImagesConfig):
    """How a teacher is trained: EDM's loss and noise levels (arXiv 2206.00364); the pace is ours."""

    network: NetworkConfig
    init_from: str | None = Field(None, description="a teacher folder whose weights to start from")
    log_sigma_mean: float = Field(-1.2, description="mean of ln sigma")
    log_sigma_std: float = Field(1.2, gt=0, description="standard deviation of ln sigma")
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the images, which scales the network")
    seed: int = Field(0, ge=0, description="of weights, images, noise levels and noise")
    monitor: MonitorConfig = MonitorConfig()


def teacher_loss(denoiser: EdmDenoiser, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """EDM loss, one value per image (B,): the weighted squared clean-image error, mean over pixels (eq. 8)."""
    predicted = denoiser(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
    loss: Tensor = edm_weight(sigma, denoiser.sigma_data) * (predicted - images).square().flatten(1).mean(1)
    return loss


def train_teacher(
    config: TeacherConfig, data: LabelledImages, checkpoint_file: Path, device: str = "cpu"
) -> EdmDenoiser:
    """Train to the end, resuming from ``checkpoint_file`` if it is there; returns the EMA denoiser.

    Preview grids and TensorBoard files go beside the checkpoint.

    Raises:
        DataError: the images do not fit the network.
        DivergedError: the loss is not finite.
        MemoryLimitError: the batch does not fit, with the one that would.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    shape = (config.network.channels, config.network.image_size, config.network.image_size)
    if data.shape != shape:
        raise DataError(f"images are {data.shape}, the network wants {shape}", "mend `network` in the config")
    training = TeacherTraining(config, data, device)
    train_to_end(training, checkpoint_file, bound_to(config, data), config.monitor, CHECKPOINT_EVERY)
    return training.averaged


class TeacherTraining(Training):
    """A class-conditional network on labelled images."""

    def __init__(self, config: TeacherConfig, data: LabelledImages, device: str) -> None:
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        self.unet = config.network.build(len(data.class_names))
        if config.init_from is not None:
            _copy_weights(resolve(config.init_from, "teacher"), self.unet)
        super().__init__("teacher", config, self.unet, device)
        self.denoiser = EdmDenoiser(self.unet, config.sigma_data)
        self.averaged = EdmDenoiser(self.ema.network, config.sigma_data)

    def loss(self, step: int, count: int) -> Tensor:
        """Mean EDM loss of random images at random noise levels."""
        config, draws = self.config, stream(self.config.seed, "teacher", step)
        rows = torch.randint(len(self.data), (count,), generator=draws)
        images, labels = self.data.batch(rows)
        sigma = (torch.randn(len(rows), generator=draws) * config.log_sigma_std + config.log_sigma_mean).exp()
        noise = torch.randn(images.shape, generator=draws)
        images, labels, sigma, noise = (values.to(self.device) for values in (images, labels, sigma, noise))
        return teacher_loss(self.denoiser, images, labels, sigma, noise).mean()

    def preview(self, per_row: int) -> Images:
        """A row a label, of the first labels."""
        runtime = TeacherRuntime(self.averaged, QUICK_SAMPLER, self.device)
        return draw_by_label(runtime, range(min(LABELS_SHOWN, len(self.data.class_names))), per_row)


def _copy_weights(source: Sealed, unet: torch.nn.Module) -> None:
    try:
        unet.load_state_dict(load_teacher(source).unet.state_dict())
    except RuntimeError:
        raise ConfigError(f"{source.folder}: its network is another than `network`", "copy its `network`") from None


def label_agreement(denoiser: EdmDenoiser, labels: Labels, judges: Sequence[Judge], per_label: int) -> dict[str, float]:
    """Share of the teacher's own samples that each judge calls by the label asked for, by the judge's name.

    Drawn on the ``select`` stream, with the sampler's defaults; nothing is drawn for no judges.
    """
    if not judges:
        return {}
    runtime = TeacherRuntime(denoiser, SamplerConfig(), device_of(denoiser))
    hits = {judge.name: 0 for judge in judges}
    with progress_bar("agreement", labels.count) as advance:
        for label in range(labels.count):
            wanted = np.full(per_label, label, np.int64)
            latents = Latents.of_stream("select", 0, label * per_label, per_label)
            images = draw_all(runtime, latents, wanted, at_once(runtime.image_shape))
            for judge in judges:
                hits[judge.name] += int((judge.look(images)[0] == label).sum())
            advance(1, labels.class_names[label])
    return {name: count / (labels.count * per_label) for name, count in hits.items()}


def seal_teacher(
    config: TeacherConfig, denoiser: EdmDenoiser, data: LabelledImages, target: Path, *, data_name: str,
    judges: Sequence[Judge] = (), per_label: int = 100,
) -> Sealed:  # fmt: skip
    """Measure a trained teacher with ``judges``, if any, and seal it as a folder that ``train`` opens.

    Raises:
        LabelError: a judge knows other classes, or two share a name.
    """
    labels = Labels(class_names=data.class_names)
    require_distinct_names(judges)
    require_same_classes(judges, data.class_names, "the teacher")
    facts = {
        "labels": labels.resolved(),
        "sigma_data": config.sigma_data,
        "image_shape": list(image_shape(denoiser.unet)),
        "sampler": SamplerConfig().resolved(),
        "data": data_name,
        "data_digest": data.digest,
        "images_seen": total_steps(config) * config.batch_size,
        "label_agreement": label_agreement(denoiser, labels, judges, per_label),
        "judge_accuracy_on_real_images": {judge.name: judge.accuracy for judge in judges},
        "samples_per_label": per_label if judges else 0,
    }
    parents = (resolve(config.init_from, "teacher").as_parent(),) if config.init_from else ()
    with sealed_folder(
        target, "teacher", parents=parents, config=config.resolved(), seed=config.seed, facts=facts
    ) as folder:
        save_teacher(denoiser, folder)
    return verify(target, "teacher")
