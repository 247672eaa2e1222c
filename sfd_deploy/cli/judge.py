"""``sfd-deploy judge``: train a judge on your own data."""

from __future__ import annotations

from pathlib import Path

import click

from sfd_deploy.cli.options import data_option, device_option, json_option, show, threads_option, use_threads


@click.command(epilog="Example: sfd-deploy judge --config fashion-mnist-plain --data DATA --output judges/plain")
@click.option("--config", required=True, metavar="FILE|NAME", help="A judge config, or a preset's name.")
@data_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@device_option
@threads_option
@json_option
def judge(config: str, data: Path, output: Path, device: str, threads: int | None, as_json: bool) -> None:
    """Train a classifier of real images, sealed with its error rates and feature statistics on held-out ones.

    Resumes when run again; OUTPUT.work holds the checkpoint and the log. Ctrl-C saves.
    """
    from sfd_deploy.progress import log_to
    from sfd_deploy.runtime.pytorch import torch_device
    from sfd_deploy.training.judge import JudgeConfig, load_judged, seal_judge, train_judge

    use_threads(threads)
    parsed = JudgeConfig.load(config, "judge")
    train, held_out = (load_judged(parsed, data, split) for split in ("train", "test"))
    work = output.with_name(f"{output.name}.work")
    with log_to(work / "train.log"):
        classifier = train_judge(parsed, train, work / "checkpoint.safetensors", torch_device(device))
    sealed = seal_judge(parsed, classifier, held_out, output, data.name)
    value = {"folder": str(output), "digest": sealed.digest, **sealed.facts}
    accuracy = f"{sealed.facts['accuracy']:.4f} on {sealed.facts['held_out_images']} held-out images"
    show(value, as_json, lambda console: console.print(f"{output}  {sealed.digest[:12]}  accuracy {accuracy}"))
