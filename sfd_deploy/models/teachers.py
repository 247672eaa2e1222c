"""Opening a teacher, wherever it is from: one verified, digested input for every stage.

A teacher is a folder that ``sfd-deploy teacher`` sealed, the name of a shipped one, anybody's diffusers
folder, or a model hub's ``owner/name[@revision]``. A foreign folder has no manifest, so one is made in
memory: its digest is that of the files that will be read, the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sfd_deploy.embedded import embedded_names, resolve
from sfd_deploy.errors import LabelError, ModelError, RunError
from sfd_deploy.labels import Labels, require_distinct
from sfd_deploy.manifest import MANIFEST, FileRecord, Manifest, Sealed, digest_of, sha256_file, verify
from sfd_deploy.models.folder import find_layout, read_json
from sfd_deploy.models.generator import labels_of
from sfd_deploy.models.parameterisation import denoiser_builder
from sfd_deploy.models.sampler import SamplerConfig

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PARTS = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json")
DOWNLOADED = ("model_index.json", "scheduler_config.json", "scheduler/scheduler_config.json", *PARTS,
              *(f"unet/{part}" for part in PARTS))  # fmt: skip


def open_teacher(reference: str | Path, *, class_names: Sequence[str] = (), revision: str | None = None) -> Sealed:
    """The verified teacher that ``reference`` names.

    ``class_names`` name a foreign teacher's labels in order; left out, its ``model_index.json`` does
    (``id2label``), or numbers do. A network with one label more than names has a null label last.

    Raises:
        RunError: no such folder, shipped teacher or hub model.
        ModelError: a layout, network or parameterisation that cannot be used.
        LabelError: the class names do not fit the network's labels.
        ManifestError, DigestError: a sealed folder is not what its manifest says.
    """
    return _named(
        open_reference(
            reference, lambda folder, name, where: _foreign(folder, name, where, class_names), DOWNLOADED, revision
        ),
        class_names,
    )


def open_reference(
    reference: str | Path, describe: Callable[[Path, str, str], Sealed], wanted: Sequence[str], revision: str | None
) -> Sealed:
    """The verified teacher that ``reference`` names: a folder, a shipped name or a model hub's.

    ``describe`` makes the manifest of a foreign folder, given it, its name and where it is found again;
    ``wanted`` are the patterns of what is downloaded.

    Raises:
        RunError: no such folder, shipped teacher or hub model.
        ManifestError, DigestError: a sealed folder is not what its manifest says.
    """
    folder = Path(reference)
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            return verify(folder, "teacher")
        return describe(folder, folder.resolve().name, str(reference))
    if str(reference) in embedded_names():
        return resolve(reference, "teacher")
    name, _, suffix = str(reference).partition("@")
    # Below a folder that is here, a name is a mistyped path, not somebody on a hub.
    if HUB_NAME.fullmatch(name) and not Path(name).parent.is_dir():
        folder = _download(name, revision or suffix or None, wanted)
        # A snapshot's folder is called by its commit: the reference finds these bytes again.
        return describe(folder, name, f"{name}@{folder.name}")
    return resolve(reference, "teacher")  # raises, with the nearest shipped name


def _named(sealed: Sealed, class_names: Sequence[str]) -> Sealed:
    recorded = labels_of(sealed).class_names
    if class_names and tuple(class_names) != recorded:
        raise LabelError(
            f"{sealed.folder}: its manifest names the classes {', '.join(recorded)}", "leave class_names out"
        )
    return sealed


def _foreign(folder: Path, name: str, reference: str, class_names: Sequence[str]) -> Sealed:
    layout = find_layout(folder)
    config = layout.network_config()
    denoiser_builder(layout)  # refuse a parameterisation before gigabytes are hashed
    names = name_classes(folder, config["num_class_embeds"], tuple(class_names), _index(folder))
    size = config["sample_size"]
    facts = {
        "labels": Labels(class_names=names).resolved(),
        "image_shape": [config["in_channels"], *([size, size] if isinstance(size, int) else size)],
        "sampler": SamplerConfig().resolved(),
        "reference": reference,
    }
    return unsealed(folder, name, hash_files(folder, layout.files(folder)), facts)


def unsealed(folder: Path, name: str, files: dict[str, FileRecord], facts: dict[str, Any]) -> Sealed:
    """A foreign teacher with a manifest in memory; its digest is that of the files that are read."""
    manifest = Manifest(
        kind="teacher", name=name, created=datetime.now(UTC).isoformat(timespec="seconds"), files=files, parents=(),
        config={}, seed=None, versions={}, host={}, facts=facts,
    )  # fmt: skip
    return Sealed(folder, manifest, digest_of({path: record.sha256 for path, record in files.items()}))


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    if index.get("_class_name") == "ConsistencyModelPipeline":
        raise ModelError(
            f"{folder}: a consistency model or one-step generator, not a teacher",
            "give the model it was distilled from",
        )
    return index


def name_classes(folder: Path, rows: int, given: tuple[str, ...], index: dict[str, Any]) -> tuple[str, ...]:
    """Names of a network's ``rows`` labels: those given, else the pipeline index' ``id2label``, else numbers.

    Raises:
        LabelError: they are neither ``rows`` nor, with a null label last, one fewer; or two are the same.
    """
    if not given and isinstance(index.get("id2label"), dict):
        given = _index_names(folder, index["id2label"])
    if not given:
        return tuple(str(label) for label in range(rows))
    if len(given) not in {rows, rows - 1}:
        raise LabelError(
            f"{folder}: the network knows {rows} labels, {len(given)} classes are named",
            f"name {rows}, or {rows - 1} if the last label is the null label of guided training",
        )
    require_distinct(given, str(folder))
    return given


def _index_names(folder: Path, id2label: dict[str, Any]) -> tuple[str, ...]:
    try:
        return tuple(str(id2label[str(label)]) for label in range(len(id2label)))
    except KeyError as missing:
        raise LabelError(f"{folder}: id2label has no label {missing}", "mend model_index.json") from None


def hash_files(folder: Path, files: Iterable[Path]) -> dict[str, FileRecord]:
    """Digest and size of every file that is read of a foreign folder, by its name there."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in files
    }


def _download(repository: str, revision: str | None, wanted: Sequence[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:  # every error of its own is one of the two
        raise RunError(
            f"{repository}: no such folder, and the model hub did not give it ({type(error).__name__})",
            "mend the name or revision, or go online",
        ) from None
