"""``sfd-deploy judge``: train a judge on your own data, or adopt somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sfd_deploy.cli.options import DATA_HELP, device_option, json_option, show, threads_option, use_threads

if TYPE_CHECKING:
    from sfd_deploy.manifest import Sealed


@click.command(epilog="Example: sfd-deploy judge --config fashion-mnist-plain --data DATA --output judges/plain")
@click.option("--config", required=True, metavar="FILE|NAME", help="A judge config, or a preset's name.")
@click.option("--adopt", "source", type=click.Path(path_type=Path), metavar="FILE|FOLDER",
              help="Adopt this model, train none: ONNX, TorchScript, CLIP's folder, or the word nudenet.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help=DATA_HELP)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@device_option
@threads_option
@json_option
def judge(
    config: str, source: Path | None, data: Path | None, output: Path, device: str, threads: int | None, as_json: bool
) -> None:
    """Train a classifier of real images, sealed with its error rates and feature statistics on held-out ones.

    Resumes when run again; OUTPUT.work holds the checkpoint and the log. Ctrl-C saves. With --adopt nothing is
    trained: the model is measured on DATA's test split, or on all of DATA where it has no splits.
    """
    if data is None:
        raise click.UsageError(
            "Missing option '--data': labelled images, for an audit needs each judge's own error on them"
        )
    use_threads(threads)
    sealed = _train(config, data, output, device) if source is None else _adopt(config, source, data, output)
    value = {"folder": str(output), "digest": sealed.digest, **sealed.facts}
    accuracy = f"{sealed.facts['accuracy']:.4f} on {sealed.facts['held_out_images']} held-out images"
    show(value, as_json, lambda console: console.print(f"{output}  {sealed.digest[:12]}  accuracy {accuracy}"))


def _train(config: str, data: Path, output: Path, device: str) -> Sealed:
    from sfd_deploy.runtime.pytorch import torch_device
    from sfd_deploy.training.judge import JudgeConfig, make_judge
    from sfd_deploy.training.precision import settled

    where = torch_device(device)
    return make_judge(settled(JudgeConfig.load(config, "judge"), where), data, output, where)


def _adopt(config: str, source: Path, data: Path, output: Path) -> Sealed:
    from sfd_deploy.config import read_values
    from sfd_deploy.measure.foreign.adopt import adopt_judge, foreign_config
    from sfd_deploy.training.data import load_held_out

    parsed = foreign_config(*read_values(config, "judge"))
    return adopt_judge(parsed, source, load_held_out(data, parsed.class_names), output, data.name)
