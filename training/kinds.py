"""Which training a config asks for: ``kind: text-to-image``, or class labels without that key."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

from sfd_deploy.config import read_values
from sfd_deploy.errors import ConfigError, RunError
from sfd_deploy.prompts import TEXT_TO_IMAGE
from sfd_deploy.runs import Run
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.stage import train
from sfd_deploy.training.started import find_start
from sfd_deploy.training.text_config import TextTrainConfig
from sfd_deploy.training.text_stage import train_text

AnyConfig = TrainConfig | TextTrainConfig


def load_config(name_or_file: str) -> AnyConfig:
    """A training config from a preset's name or a file.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    return config_of(*read_values(name_or_file, "train"))


def config_of(values: Any, source: str) -> AnyConfig:
    """The config that parsed YAML says.

    Raises:
        ConfigError: an unknown kind, or what the kind's config refuses.
    """
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in {None, TEXT_TO_IMAGE}:
        raise ConfigError(
            f"{source}: unknown kind {kind!r}", f"write `kind: {TEXT_TO_IMAGE}`, or leave it out for class labels"
        )
    return (TrainConfig if kind is None else TextTrainConfig).from_mapping(values, source)


def changed(
    config: AnyConfig, *, teacher: str | None = None, init_from: str | None = None, concept: str | None = None,
    substitute: str | None = None,
) -> AnyConfig:  # fmt: skip
    """``config`` with what a command line says besides; None changes nothing.

    Raises:
        ConfigError: a concept for a config that forgets nothing by name.
    """
    given = {"teacher": teacher, "init_from": init_from}
    config = config.model_copy(update={key: value for key, value in given.items() if value is not None})
    if concept is None and substitute is None:
        return config
    if not isinstance(config, TextTrainConfig):
        raise ConfigError("a concept is named, but the config is of class labels", "name classes in its `forget`")
    return config.naming(concept, substitute)


def run_training(config: AnyConfig, folder: Path, device: str = "auto") -> Run:
    """Train what ``config`` asks for; raises as ``train`` and ``train_text`` do."""
    if isinstance(config, TextTrainConfig):
        return train_text(config, folder, device)
    return train(config, folder, device)


def resume(folder: Path, device: str = "auto") -> Run:
    """Go on with the training of a run folder, under the config and in the folder that it was started in.

    Raises:
        RunError: nothing was started there.
    """
    started = find_start(Run(folder).work)
    if started is None:
        raise RunError(f"{folder}: no training to resume", "start one with `sfd-deploy train --config`")
    place = folder.resolve()
    with chdir(started.here()):
        run_training(config_of(started.config, started.source), place, device)
    return Run(folder)
