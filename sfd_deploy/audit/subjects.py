"""Subjects: the sealed folders that an audit draws from, and what is known of each before it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sfd_deploy.errors import RunError
from sfd_deploy.manifest import Sealed
from sfd_deploy.runs import Run

# What a back end loads; cards, training records and parity notes are not the model, nor is an adapter that is merged.
MODEL_SUFFIXES = {".onnx", ".onnx_data", ".plan", ".engine", ".data", ".safetensors", ".xml", ".bin"}


@dataclass(frozen=True)
class Subject:
    """One row to be: a generator, an artefact, or a teacher on trial."""

    sealed: Sealed

    @property
    def name(self) -> str:
        """Its row's name."""
        return self.sealed.name

    @property
    def kind(self) -> str:
        """generator, artefact or teacher."""
        return self.sealed.manifest.kind

    @property
    def runtime(self) -> str:
        """The back end it was made for."""
        return str(self.sealed.facts["runtime"]) if self.kind == "artefact" else "pytorch"

    @property
    def precision(self) -> str:
        """fp32, fp16 or int8."""
        return str(self.sealed.facts["precision"]) if self.kind == "artefact" else "fp32"

    @property
    def model_files(self) -> tuple[tuple[str, int], ...]:
        """Digest and size of every file that a back end loads."""
        files = self.sealed.manifest.files
        return tuple((record.sha256, record.bytes) for name, record in sorted(files.items())
                     if _is_loaded(PurePosixPath(name)))  # fmt: skip

    @property
    def bytes(self) -> int:
        """Size of the model."""
        return sum(size for _, size in self.model_files)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the artefacts it was built from: an engine's graph."""
        return tuple(parent.name for parent in self.sealed.manifest.parents if parent.kind == "artefact")


def _is_loaded(name: PurePosixPath) -> bool:
    # The same weights under another tokenizer are another model.
    return name.parts[0] == "tokenizer" or (name.suffix in MODEL_SUFFIXES and name.parts[0] != "lora")


def run_subjects(run: Run, generator: Sealed, names: Sequence[str]) -> tuple[Subject, ...]:
    """The run's generator and everything exported from it, or of these the ``names``.

    Raises:
        RunError: an artefact that was not exported, or that was exported from another generator.
    """
    found = []
    for name in names or ("generator", *run.artefact_names()):
        sealed = generator if name == "generator" else run.artefact(name)
        if name != "generator" and not _descends(run, sealed, generator):
            raise RunError(
                f"{sealed.folder}: was not exported from this run's generator {generator.digest[:12]}",
                "export it again with `sfd-deploy export`",
            )
        found.append(Subject(sealed))
    return tuple(found)


def _descends(run: Run, artefact: Sealed, generator: Sealed) -> bool:
    for parent in artefact.manifest.parents:
        if parent.digest == generator.digest:
            return True
        if parent.kind == "artefact" and parent.name in run.artefact_names():
            graph = run.artefact(parent.name)
            if graph.digest == parent.digest and _descends(run, graph, generator):
                return True
    return False
