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
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfd_deploy import latents
from sfd_deploy.errors import BackendError, DigestError, ManifestError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import Sealed, sha256_file
from sfd_deploy.prompts import draws_from_prompts
from sfd_deploy.serving.config import ServingConfig

Flavour = Literal["python", "onnxruntime", "tensorrt"]
# Which flavours can serve an artefact, by the runtime it was made for. Triton cannot load trt-rtx engines.
FLAVOURS: dict[str, tuple[Flavour, ...]] = {"onnxruntime": ("python", "onnxruntime"), "trt": ("tensorrt",)}
# Prompts take a tokenizer and three graphs in a chain, which the python back end alone has.
TEXT_FLAVOURS: dict[str, tuple[Flavour, ...]] = {"onnxruntime": ("python",)}
PROBE = "probe.npz"
BACKEND = Path(__file__).with_name("backend")


@dataclass(frozen=True)
class Probe:
    """Images (B, C, H, W) uint8 that the artefact itself drew for ``labels`` and ``seeds`` (B,).

    ``texts`` are the prompts that ``labels`` number, None where they are class labels.
    """

    labels: NDArray[np.int64]
    seeds: NDArray[np.int64]
    images: NDArray[np.uint8]
    texts: tuple[str, ...] | None = None

    def save(self, path: Path) -> None:
        """Write as an .npz file."""
        texts = np.array(self.texts or (), np.str_)
        np.savez(path, labels=self.labels, seeds=self.seeds, images=self.images, texts=texts)

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["labels"], found["seeds"], found["images"], tuple(found["texts"].tolist()) or None)


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

    @property
    def draws_from_prompts(self) -> bool:
        """Whether it is asked by prompt, not by class label."""
        return draws_from_prompts(self.artefact.folder)


def flavours_of(artefact: Sealed) -> tuple[Flavour, ...]:
    """The flavours that can serve an artefact; none is what Triton cannot serve."""
    known = TEXT_FLAVOURS if draws_from_prompts(artefact.folder) else FLAVOURS
    return known.get(artefact.facts["runtime"], ())


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
    # model.onnx or model.plan, here or one in each part's folder, and external weights if there are any.
    for name, record in artefact.manifest.files.items():
        if PurePosixPath(name).name.startswith("model."):
            (version / name).parent.mkdir(exist_ok=True)
            copied = Path(shutil.copyfile(artefact.folder / name, version / name))
            if (found := sha256_file(copied)) != record.sha256:
                raise DigestError(artefact.folder / name, record.sha256, found)


def _add_python_files(entry: Entry, version: Path) -> None:
    shutil.copyfile(BACKEND / "model.py", version / "model.py")
    shutil.copyfile(latents.__file__, version / "latents.py")
    drawing = "prompts.py" if entry.draws_from_prompts else "labels.py"
    shutil.copyfile(BACKEND / drawing, version / "drawing.py")
    own = _text_facts(entry, version) if entry.draws_from_prompts else {"labels": entry.labels.count}
    facts = {
        "files": {
            path.relative_to(version).as_posix(): sha256_file(path)
            for path in sorted(version.rglob("*")) if path.is_file()
        },
        **own,
        "image_shape": entry.image_shape,
        "settings": dict(entry.settings),
        "evidence": dict(entry.evidence),
    }  # fmt: skip
    (version / "serving.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _text_facts(entry: Entry, version: Path) -> dict[str, Any]:
    from sfd_deploy.serving.tokens import TOKENIZER, write_tokenizer  # late: it needs transformers

    tokens = write_tokenizer(entry.artefact, version / TOKENIZER)
    return {"tokens": tokens, "latent_shape": entry.artefact.facts["latent_shape"]}


def model_config(flavour: Flavour, entry: Entry, config: ServingConfig) -> Any:
    """Triton's ``ModelConfig`` message for one model."""
    pb = _messages()
    best, largest = batch_range(entry.artefact)
    message = pb.ModelConfig(name=entry.name, backend=flavour, max_batch_size=largest)
    message.version_policy.specific.versions.append(1)
    if flavour == "python":
        if entry.draws_from_prompts:
            message.input.add(name="prompt", data_type=pb.TYPE_STRING, dims=[1])
        else:
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
