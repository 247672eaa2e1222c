"""One audited artefact to a model folder of a Triton repository, in three flavours.

Configurations are Triton's own ``ModelConfig`` messages; dims, types and batch limits come from the
artefact's facts. Nothing that was off in the audit is switched on here: no accelerator, no optimisation,
and the instance kind is fixed, since Triton would by default move a model to a GPU it finds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfd_deploy import latents
from sfd_deploy.errors import BackendError, DigestError, ManifestError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed, sha256_file
from sfd_deploy.serving.config import ServingConfig

Flavour = Literal["python", "onnxruntime", "tensorrt"]
# Which flavours can serve an artefact, by the runtime it was made for. Triton cannot load trt-rtx engines.
FLAVOURS: dict[str, tuple[Flavour, ...]] = {"onnxruntime": ("python", "onnxruntime"), "trt": ("tensorrt",)}
PROBE = "probe.npz"
BACKEND = Path(__file__).with_name("backend") / "model.py"


@dataclass(frozen=True)
class Probe:
    """Images (B, C, H, W) uint8 that the artefact itself drew for ``labels`` and ``seeds`` (B,)."""

    labels: NDArray[np.int64]
    seeds: NDArray[np.int64]
    images: NDArray[np.uint8]

    def save(self, path: Path) -> None:
        """Write as an .npz file."""
        np.savez(path, labels=self.labels, seeds=self.seeds, images=self.images)

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["labels"], found["seeds"], found["images"])


@dataclass(frozen=True)
class Entry:
    """An artefact with the evidence that lets it be served.

    ``settings`` are those it was audited with; ``evidence`` are names and digests for the model's configuration.
    """

    artefact: Sealed
    settings: Mapping[str, Any]
    evidence: Mapping[str, str]
    probe: Probe

    @property
    def name(self) -> str:
        """The model's name: the artefact's."""
        return self.artefact.name

    @property
    def image_shape(self) -> list[int]:
        """[C, H, W]."""
        return [int(size) for size in self.artefact.facts["image_shape"]]

    @property
    def labels(self) -> Labels:
        """Class names and what was forgotten."""
        return Labels.from_mapping(self.artefact.facts["labels"], str(self.artefact.folder))


def write_model(repository: Path, flavour: Flavour, entry: Entry, config: ServingConfig) -> None:
    """Write ``repository/<name>`` with its configuration and version 1.

    Raises:
        ManifestError: the artefact's batch range is not one that Triton can keep to.
        DigestError: the artefact changed since it was verified.
        BackendError: tritonclient is not installed.
    """
    folder = repository / entry.name
    version = folder / "1"
    version.mkdir(parents=True)
    _copy_model_files(entry.artefact, version)
    if flavour == "python":
        _add_python_files(entry, version)
        entry.probe.save(folder / PROBE)
    (folder / "config.pbtxt").write_text(to_text(model_config(flavour, entry, config)), encoding="utf-8")


def _copy_model_files(artefact: Sealed, version: Path) -> None:
    # model.onnx or model.plan, and external weights if there are any.
    for name, record in artefact.manifest.files.items():
        if name.startswith("model."):
            copied = Path(shutil.copyfile(artefact.folder / name, version / name))
            if (found := sha256_file(copied)) != record.sha256:
                raise DigestError(artefact.folder / name, record.sha256, found)


def _add_python_files(entry: Entry, version: Path) -> None:
    shutil.copyfile(BACKEND, version / "model.py")
    shutil.copyfile(latents.__file__, version / "latents.py")
    facts = {
        "files": {path.name: sha256_file(path) for path in sorted(version.iterdir())},
        "labels": entry.labels.count,
        "image_shape": entry.image_shape,
        "settings": dict(entry.settings),
        "evidence": dict(entry.evidence),
    }
    (version / "serving.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def model_config(flavour: Flavour, entry: Entry, config: ServingConfig) -> Any:
    """Triton's ``ModelConfig`` message for one model."""
    pb = _messages()
    best, largest = batch_range(entry.artefact)
    message = pb.ModelConfig(name=entry.name, backend=flavour, max_batch_size=largest)
    message.version_policy.specific.versions.append(1)
    if flavour == "python":
        message.input.add(name="class_labels", data_type=pb.TYPE_INT64, dims=[1])
        message.input.add(name="seed", data_type=pb.TYPE_INT64, dims=[1])
        message.output.add(name="images", data_type=pb.TYPE_UINT8, dims=entry.image_shape)
    else:
        message.input.add(name="latents", data_type=pb.TYPE_FP32, dims=entry.image_shape)
        # The graph's labels are (B,); Triton knows no empty dims, so it sees (B, 1) and reshapes.
        message.input.add(name="class_labels", data_type=pb.TYPE_INT64, dims=[1]).reshape.SetInParent()
        message.output.add(name="images", data_type=pb.TYPE_FP32, dims=entry.image_shape)
    message.dynamic_batching.preferred_batch_size.append(best)
    message.dynamic_batching.max_queue_delay_microseconds = config.queue_delay_us
    kind = pb.ModelInstanceGroup.KIND_GPU if flavour == "tensorrt" else pb.ModelInstanceGroup.KIND_CPU
    message.instance_group.add(count=config.instances, kind=kind)
    if flavour == "onnxruntime":
        message.parameters["intra_op_thread_count"].string_value = str(entry.settings["threads"])
    for key, value in entry.evidence.items():
        message.parameters[f"sfd_deploy.{key}"].string_value = value
    return message


def batch_range(artefact: Sealed) -> tuple[int, int]:
    """Best and largest batch of an artefact, whose smallest is 1.

    Raises:
        ManifestError: not a range that starts at 1, which is what a server's lone request is.
    """
    batch = artefact.facts["batch"]
    smallest, best, largest = (int(batch[key]) for key in ("min", "opt", "max"))
    if not 1 == smallest <= best <= largest:
        raise ManifestError(
            f"{artefact.folder}: batches of {smallest} to {largest}, best {best}: a server also runs batches of 1",
            "export it with a smallest batch of 1",
        )
    return best, largest


def to_text(message: Any) -> str:
    """A ``ModelConfig`` as protobuf text, with the zeros that this format drops and Triton would guess at."""
    from google.protobuf import text_format

    text = text_format.MessageToString(message)
    return text if message.max_batch_size else f"{text}max_batch_size: 0\n"


def _messages() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise BackendError("tritonclient is not installed", "pip install 'sfd-deploy[serve]'") from None
    return model_config_pb2
