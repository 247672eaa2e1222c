"""Fixtures of the serving and endpoint tests: a tiny run with one graph and one audit record, the real server.

A plugin of ``tests/conftest.py``, so that one server serves the whole session.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sfd_deploy.errors import BackendError
from sfd_deploy.evidence import AUDIT_JSON, ArtefactRecord, AuditRecord, TeacherFigures
from sfd_deploy.export.graph import to_bytes, trace_one_step
from sfd_deploy.manifest import Sealed
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.serving.install import Triton, install_triton, open_triton
from sfd_deploy.serving.launch import Server, launched
from sfd_deploy.serving.stage import build_repository
from tests.conftest import TINY_LABELS, seal_tiny_run, tiny_generator

POLICY = "0" * 64
SETTINGS: dict[str, Any] = {"provider": "CPUExecutionProvider", "arithmetic": "fp32", "threads": 1}
MODEL = "onnx-cpu-fp32"
REPOSITORY_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_graph() -> bytes:
    """The tiny generator's graph, as export writes it."""
    return to_bytes(trace_one_step(tiny_generator(), opset=20))


def artefact_facts(**changes: Any) -> dict[str, Any]:
    facts = {
        "labels": TINY_LABELS.resolved(), "image_shape": [1, 16, 16], "format": "onnx", "target": "cpu",
        "precision": "fp32", "runtime": "onnxruntime", "batch": {"min": 1, "opt": 16, "max": 64},
    }  # fmt: skip
    return {**facts, **changes}


def seal_artefact(run: Run, graph: bytes, name: str = MODEL, **changes: Any) -> Sealed:
    """An artefact folder of ``run`` that holds ``graph``."""
    facts = artefact_facts(**changes)
    file = "model.onnx" if facts["runtime"] == "onnxruntime" else "model.plan"
    with sealed_folder(run.folder / "artefacts" / name, "artefact", facts=facts) as folder:
        (folder / file).write_bytes(graph)
    return run.artefact(name)


def row_of(artefact: Sealed, **changes: Any) -> ArtefactRecord:
    """A passing row for ``artefact``."""
    values = {
        "name": artefact.name, "kind": "artefact", "digest": artefact.digest, "runtime": artefact.facts["runtime"],
        "precision": artefact.facts["precision"], "settings": SETTINGS, "bytes": 1, "verdict": "pass",
    }  # fmt: skip
    return ArtefactRecord.model_validate({**values, **changes})


def seal_audit(run: Run, *rows: ArtefactRecord, policy_digest: str = POLICY) -> Sealed:
    """An audit folder of ``run`` with ``rows``."""
    teacher = TeacherFigures(
        name="teacher", digest="1" * 64, retained_accuracy=0.9, accuracy_by_label={}, spread_by_label={}, frechet=1.0,
        images_per_second=1.0, network_evaluations=35,
    )  # fmt: skip
    record = AuditRecord(
        run=run.name, policy_name="default", policy_digest=policy_digest, policy={}, plan_digest="2" * 64, plan={},
        judges=(), teacher=teacher, artefacts=rows, exit_code=0,
    )  # fmt: skip
    with sealed_folder(run.folder / "audit", "audit") as folder:
        (folder / AUDIT_JSON).write_text(record.model_dump_json(), encoding="utf-8")
    return run.audit()


def seal_audited_run(folder: Path, graph: bytes) -> Run:
    """A run with one artefact that passed."""
    run = seal_tiny_run(folder)
    seal_audit(run, row_of(seal_artefact(run, graph)))
    return run


@pytest.fixture
def audited_run(tmp_path: Path, tiny_graph: bytes) -> Run:
    """A run that a test may change."""
    return seal_audited_run(tmp_path / "run", tiny_graph)


def seal_audited_text_run(folder: Path) -> Run:
    """A run of prompts with one artefact that passed."""
    from tests.export.text_runs import exported_text_run  # late: it needs transformers

    run = Run(Path(shutil.copytree(exported_text_run("sd2")[0].folder, folder)))
    seal_audit(run, row_of(run.artefact(MODEL)))
    return run


@pytest.fixture
def audited_text_run(tmp_path: Path) -> Run:
    """A run of prompts that a test may change."""
    return seal_audited_text_run(tmp_path / "text-run")


@dataclass(frozen=True)
class Served:
    """The run behind the server that all tests share."""

    run: Run
    server: Server

    @property
    def graph(self) -> Path:
        """The artefact's own file, not the repository's copy."""
        return self.run.artefact(MODEL).folder / "model.onnx"


@pytest.fixture(scope="session")
def triton() -> Triton:
    """The environment in SFD_DEPLOY_TRITON or .triton, set up if need be."""
    folder = Path(os.environ.get("SFD_DEPLOY_TRITON", REPOSITORY_ROOT / ".triton"))
    try:
        return open_triton(folder)
    except BackendError:
        try:
            return install_triton(folder)
        except BackendError as error:
            pytest.skip(f"needs the Triton server: {error}")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_graph: bytes, triton: Triton) -> Iterator[Served]:
    """The real server with the tiny artefact; read-only."""
    folder = tmp_path_factory.mktemp("served")
    run = seal_audited_run(folder / "run", tiny_graph)
    repository = build_repository(run, POLICY)
    with launched(repository.folder / "python", triton, folder / "triton.log") as server:
        yield Served(run, server)


@pytest.fixture(scope="session")
def served_text(tmp_path_factory: pytest.TempPathFactory, triton: Triton) -> Iterator[Served]:
    """The real server with the tiny artefact of prompts; read-only."""
    folder = tmp_path_factory.mktemp("served-text")
    run = seal_audited_text_run(folder / "run")
    repository = build_repository(run, POLICY)
    with launched(repository.folder / "python", triton, folder / "triton.log") as server:
        yield Served(run, server)
