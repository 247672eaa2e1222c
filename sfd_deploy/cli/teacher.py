"""``sfd-deploy teacher``: train a teacher on your own data."""

from __future__ import annotations

from pathlib import Path

import click

from sfd_deploy.cli.options import data_option, device_option, json_option, show, threads_option, use_threads


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

    OUTPUT.work holds the checkpoint, the log, preview grids and TensorBoard files. Ctrl-C saves.
    """
    from sfd_deploy.measure.judges import open_judge
    from sfd_deploy.progress import log_to
    from sfd_deploy.runtime.pytorch import torch_device
    from sfd_deploy.training.data import load_images
    from sfd_deploy.training.teacher import TeacherConfig, seal_teacher, train_teacher

    use_threads(threads)
    parsed = TeacherConfig.load(config, "teacher")
    opened = [open_judge(folder) for folder in judges]
    images = load_images(data, "train", parsed.class_names)
    work = output.with_name(f"{output.name}.work")
    with log_to(work / "train.log"):
        denoiser = train_teacher(parsed, images, work / "checkpoint.safetensors", torch_device(device))
    sealed = seal_teacher(parsed, denoiser, images, output, data_name=data.name, judges=opened)
    value = {"folder": str(output), "digest": sealed.digest, **sealed.facts}
    show(
        value,
        as_json,
        lambda console: console.print(f"{output}  {sealed.digest[:12]}  {sealed.facts['label_agreement']}"),
    )
