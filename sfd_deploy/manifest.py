"""Manifests: what is in a sealed folder, byte for byte, and where it came from.

A sealed folder's digest is the sha256 of its ``manifest.json``, which lists the sha256 of every
other file and the digests of its parents: one number stands for the whole lineage.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import DigestError, ManifestError

MANIFEST = "manifest.json"
Kind = Literal["teacher", "judge", "generator", "fake-score", "artefact", "reference", "audit", "repository"]
TOOLS = ("sfd-deploy", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt",
         "tensorrt-rtx-cu12-bindings", "numpy", "safetensors", "transformers",
         "tritonclient")  # fmt: skip
# By Linux's names. INT8 graphs draw other images with VNNI than without, and `precision: auto` asks for AMX.
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


class FileRecord(StageConfig):
    """One file's sha256 (hex) and size in bytes."""

    sha256: str
    bytes: int


class Parent(StageConfig):
    """What a folder was made from: kind, name and digest of the sealed folder."""

    kind: Kind
    name: str
    digest: str


class Manifest(StageConfig):
    """Contents and origin of one sealed folder."""

    schema_version: Literal[1] = 1
    kind: Kind
    name: str
    created: str
    files: dict[str, FileRecord]
    parents: tuple[Parent, ...]
    config: dict[str, Any]
    seed: int | None
    versions: dict[str, str]
    host: dict[str, str | int]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Sealed:
    """A folder whose every byte was found to match its manifest."""

    folder: Path
    manifest: Manifest
    digest: str

    @property
    def name(self) -> str:
        """The name it was sealed under."""
        return self.manifest.name

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage that made it recorded for later stages."""
        return self.manifest.facts

    def as_parent(self) -> Parent:
        """How a child's manifest refers to this folder."""
        return Parent(kind=self.manifest.kind, name=self.name, digest=self.digest)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, streamed."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value that digests are taken of; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_manifest(
    folder: Path, kind: Kind, name: str, *, parents: tuple[Parent, ...], config: Mapping[str, Any], seed: int | None,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Hash every file below ``folder`` and write its manifest."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip
    manifest = Manifest(
        kind=kind, name=name, created=datetime.now(UTC).isoformat(timespec="seconds"), files=files, parents=parents,
        config=dict(config), seed=seed, versions=tool_versions(), host=host_facts(), facts=dict(facts),
    )  # fmt: skip
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """What a folder's manifest says; its files are not looked at.

    Raises:
        ManifestError: no manifest, or an unreadable one.
    """
    return _read(folder)[1]


def _read(folder: Path) -> tuple[bytes, Manifest]:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        return raw, Manifest.model_validate_json(raw)
    except FileNotFoundError:
        raise ManifestError(f"{folder}: no {MANIFEST}", "give a folder that sfd-deploy wrote") from None
    except (OSError, ValidationError):
        raise ManifestError(f"{path}: unreadable or damaged", "make the folder again with its stage") from None


def verify(folder: Path, kind: Kind | None = None) -> Sealed:
    """Check every file of a sealed folder against its manifest.

    Raises:
        ManifestError: no manifest, an unreadable one, another kind, a missing or an unlisted file.
        DigestError: a file's bytes changed.
    """
    raw, manifest = _read(folder)
    if kind is not None and manifest.kind != kind:
        raise ManifestError(f"{folder}: is a {manifest.kind}, not a {kind}", f"give a {kind} folder")
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ManifestError(f"{file}: missing, but listed in the manifest", "restore it or run its stage again")
        if (found := sha256_file(file)) != record.sha256:
            raise DigestError(file, record.sha256, found)
    present = {item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file()}
    if unlisted := sorted(present - manifest.files.keys() - {MANIFEST}):
        raise ManifestError(f"{folder / unlisted[0]}: not listed in the manifest", "remove it")
    return Sealed(folder, manifest, hashlib.sha256(raw).hexdigest())


@cache
def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape results, as installed."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def host_facts() -> dict[str, str | int]:
    """The machine: system, architecture, processor, its instruction sets for networks, core count. No host or user."""
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text(encoding="utf-8", errors="replace") if cpu_info.is_file() else ""
    return {
        "system": platform.system(), "machine": platform.machine(),
        "processor": _first_in(text, "model name") or platform.processor() or platform.machine(),
        "instructions": instructions_in(text), "cores": os.cpu_count() or 1,
    }  # fmt: skip


def instructions_in(cpu_info: str) -> str:
    """Those of ``INSTRUCTIONS`` that Linux's /proc/cpuinfo has among its flags, with spaces between."""
    flags = _first_in(cpu_info, "flags").split()
    return " ".join(name for name in INSTRUCTIONS if name in flags)


def _first_in(cpu_info: str, field: str) -> str:
    lines = (line.partition(":") for line in cpu_info.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == field), "")
