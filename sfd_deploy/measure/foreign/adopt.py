"""Adopt a judge: somebody else's model is copied into a sealed folder, and the copy measured on labelled images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfd_deploy.errors import ConfigError, ManifestError, ModelError
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.foreign.clip import ClipJudge
from sfd_deploy.measure.foreign.config import ForeignConfig
from sfd_deploy.measure.foreign.detector import NudeNetJudge
from sfd_deploy.measure.foreign.graph import OnnxJudge
from sfd_deploy.measure.foreign.torchscript import TorchScriptJudge
from sfd_deploy.measure.judges import Sight
from sfd_deploy.measure.sealing import Labelled, measure_judge
from sfd_deploy.runs import sealed_folder

MODEL = "model"
KINDS: dict[str, type[ForeignConfig]] = {
    "onnx": OnnxJudge, "torchscript": TorchScriptJudge, "clip": ClipJudge, "nudenet": NudeNetJudge,
}  # fmt: skip


def foreign_config(values: Any, source: str) -> ForeignConfig:
    """The config of an adopted judge from parsed YAML; ``kind`` says which.

    Raises:
        ConfigError: naming the key.
    """
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{source}: `kind` is {kind}", f"an adopted judge's is one of {', '.join(KINDS)}")
    return KINDS[kind].from_mapping(values, source)


def adopt_judge(config: ForeignConfig, source: Path, data: Labelled, target: Path, data_name: str) -> Sealed:
    """Copy, measure and seal the model at ``source``: a complete judge folder, or nothing.

    Raises:
        ModelError, BackendError: the model cannot be used, or not here.
        DataError: the labelled images are not of the judge's classes.
        LimitError: its accuracy is below ``config.min_accuracy``.
    """
    with _blaming(source):
        files = config.files(source)
    file = next(iter(files))
    facts: dict[str, Any] = {"format": config.kind, "data": data_name, "adopted": {"file": file}}
    with sealed_folder(target, "judge", config=config.resolved(), facts=facts) as folder:
        for name, path in files.items():
            (folder / MODEL / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / MODEL / name)
        with _blaming(source, folder / MODEL):
            measured = measure_judge(config.open(folder / MODEL / file), data, config.class_names)
        measured.require(config.min_accuracy, "give a better model, or mend `pixels` or `classes`")
        measured.write(folder)
        facts.update(measured.facts)
    return verify(target, "judge")


def open_adopted(sealed: Sealed) -> Sight:
    """The model of a verified folder that ``adopt_judge`` wrote.

    Raises:
        ManifestError: its model is not in it.
        ModelError, BackendError: it does not run here.
    """
    config = foreign_config(sealed.manifest.config, str(sealed.folder))
    file = sealed.facts["adopted"]["file"]
    if f"{MODEL}/{file}" not in sealed.manifest.files:
        raise ManifestError(
            f"{sealed.folder}: holds no {MODEL}/{file}", "adopt the model again with `sfd-deploy judge`"
        )
    with _blaming(sealed.folder, sealed.folder / MODEL):
        return config.open(sealed.folder / MODEL / file)


@contextmanager
def _blaming(place: Path, copy: Path | None = None) -> Iterator[None]:
    """Errors name where the user has the model, not its copy in a folder that is being written."""
    try:
        yield
    except ModelError as error:
        what = error.what if copy is None else error.what.replace(str(copy), MODEL)
        raise ModelError(f"{place}: {what}", error.mend) from None
