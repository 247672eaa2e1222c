"""``sfd-deploy teacher``: train a teacher on your own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sfd_deploy.cli.options import data_option, device_option, json_option, show, threads_option, use_threads

if TYPE_CHECKING:
    from sfd_deploy.manifest import Sealed
    from sfd_deploy.measure.judges import Judge
    from sfd_deploy.training.teacher import TeacherConfig
    from sfd_deploy.training.text_teacher.config import TextTeacherConfig


@click.command(epilog="Example: sfd-deploy teacher --config fashion-mnist --data DATA --output teachers/fashion")
@click.option("--config", required=True, metavar="FILE|NAME", help="A teacher config, or a preset's name.")
@data_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--judge", "judges", type=click.Path(path_type=Path), multiple=True, help="Judge folder that measures it."
)
@device_option
@threads_option
@json_option
def teacher(
    config: str, data: Path, output: Path, judges: tuple[Path, ...], device: str, threads: int | None, as_json: bool
) -> None:
    """Train a class-conditional EDM teacher on IDX files or class sub-folders; resumes when run again.

    With `kind: text-to-image` in the config: a tokenizer, an autoencoder, and a text encoder with its U-Net, on
    Fashion-MNIST's IDX files in colours and with captions.

    OUTPUT.work holds checkpoints, the log, preview grids and TensorBoard files. Ctrl-C saves.
    """
    from sfd_deploy.measure.judges import open_judge, require_distinct_names
    from sfd_deploy.progress import log_to
    from sfd_deploy.runtime.pytorch import torch_device
    from sfd_deploy.training.precision import settled
    from sfd_deploy.training.text_teacher.config import TextTeacherConfig, load_teacher_config

    use_threads(threads)
    where = torch_device(device)
    parsed = settled(load_teacher_config(config), where)
    opened = [open_judge(folder) for folder in judges]
    require_distinct_names(opened)  # not after half an hour
    work = output.with_name(f"{output.name}.work")
    with log_to(work / "train.log"):
        if isinstance(parsed, TextTeacherConfig):
            sealed, agreement = _of_text(parsed, data, output, work, opened, where)
        else:
            sealed, agreement = _of_classes(parsed, data, output, work, opened, where)
    value = {"folder": str(output), "digest": sealed.digest, **sealed.facts}
    show(value, as_json, lambda console: console.print(f"{output}  {sealed.digest[:12]}  {agreement}"))


def _of_classes(
    config: TeacherConfig, data: Path, output: Path, work: Path, judges: Sequence[Judge], device: str
) -> tuple[Sealed, dict[str, float]]:
    from sfd_deploy.measure.judges import require_same_classes
    from sfd_deploy.training.made import require_unmade
    from sfd_deploy.training.teacher import seal_teacher, train_teacher

    images = config.read(data, "train")
    require_same_classes(judges, images.class_names, "the teacher")  # not after half an hour
    require_unmade(output, "teacher", config, images)
    denoiser = train_teacher(config, images, work / "checkpoint.safetensors", device)
    sealed = seal_teacher(config, denoiser, images, output, data_name=data.name, judges=judges)
    return sealed, sealed.facts["label_agreement"]


def _of_text(
    config: TextTeacherConfig, data: Path, output: Path, work: Path, judges: Sequence[Judge], device: str
) -> tuple[Sealed, dict[str, float]]:
    from sfd_deploy.training.made import require_unmade
    from sfd_deploy.training.text_teacher.coloured import load_wardrobe
    from sfd_deploy.training.text_teacher.prompted import FREE
    from sfd_deploy.training.text_teacher.stage import require_known_classes, seal_text_teacher, train_text_teacher

    require_known_classes(judges)  # not after half an hour
    wardrobe = load_wardrobe(data)
    require_unmade(output, "teacher", config, wardrobe.grey, FREE)
    teacher = train_text_teacher(config, wardrobe, work, device)
    sealed = seal_text_teacher(config, teacher, output, data_name=data.name, judges=judges)
    return sealed, sealed.facts["prompt_agreement"]
