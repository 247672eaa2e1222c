"""A run's audited artefacts to one sealed folder of Triton model repositories.

Serving is where the audit's verdict takes effect: an artefact goes in only with a passing row for
exactly these bytes, this runtime, these settings and this policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sfd_deploy.errors import ManifestError
from sfd_deploy.evidence import ArtefactRecord, AuditRecord, EvidenceError, read_record, require_pass
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.prompts import draws_from_prompts
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.runtime.conditions import Conditions, conditions_of
from sfd_deploy.runtime.seam import Runtime, draw_all, to_uint8
from sfd_deploy.serving.config import ServingConfig
from sfd_deploy.serving.repository import Entry, Probe, batch_range, flavours_of, write_model

REPOSITORY = "repository"


def build_repository(
    run: Run, policy_digest: str, artefacts: Sequence[str] = (), config: ServingConfig | None = None
) -> Sealed:
    """Write ``runs/NAME/repository/{python,onnxruntime,tensorrt}/<artefact>/``.

    ``artefacts`` left out means all that passed the audit and that Triton can serve; the others are
    recorded with the reason.

    Raises:
        EvidenceError: an artefact without a passing row for its digest, runtime, settings and policy,
            or nothing to serve.
        RunError, ManifestError, DigestError: no audit, no such artefact, or changed bytes.
    """
    config = config or ServingConfig()
    audit = run.audit()
    record = read_record(audit)
    left_out = {} if artefacts else _left_out(run, record)
    chosen = artefacts or [name for name in run.artefact_names() if name not in left_out]
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "nothing was exported"
        raise EvidenceError(f"{run.folder}: nothing to serve ({reasons})", "serve what passed `sfd-deploy audit`")
    entries = [_entry(run.artefact(name), audit, record, policy_digest) for name in dict.fromkeys(chosen)]
    facts: dict[str, Any] = {"models": [], "left_out": left_out, "policy_digest": policy_digest}
    parents = (*(entry.artefact.as_parent() for entry in entries), audit.as_parent())
    target = run.folder / REPOSITORY
    with sealed_folder(target, "repository", parents=parents, config=config.resolved(), facts=facts) as folder:
        for entry in entries:
            for flavour in flavours_of(entry.artefact):
                write_model(folder / flavour, flavour, entry, config)
                facts["models"].append({"name": entry.name, "repository": flavour, **entry.evidence})
    return verify(target, "repository")


def _left_out(run: Run, record: AuditRecord) -> dict[str, str]:
    reasons = {name: _reason(run.artefact(name), record.row(name)) for name in run.artefact_names()}
    return {name: reason for name, reason in reasons.items() if reason}


def _reason(artefact: Sealed, row: ArtefactRecord | None) -> str:
    if unserved := _unserved(artefact):
        return unserved
    if row is None:
        return "not audited"
    return "" if row.verdict == "pass" else f"verdict {row.verdict}"


def _unserved(artefact: Sealed) -> str:
    """Why Triton cannot serve an artefact, whatever its audit says; nothing where it can."""
    if flavours_of(artefact):
        return ""
    if draws_from_prompts(artefact.folder):
        return "prompts are served by the python back end, from ONNX graphs"
    return f"Triton cannot load a {artefact.facts['runtime']} engine"


def _entry(artefact: Sealed, audit: Sealed, record: AuditRecord, policy_digest: str) -> Entry:
    if unserved := _unserved(artefact):
        raise EvidenceError(f"{artefact.name}: {unserved}", "serve an artefact of ONNX graphs")
    row = _require_audited(record, artefact, policy_digest)
    asked = conditions_of(artefact)
    runtime = _open_as_served(artefact, row, asked)
    try:
        require_pass(record, artefact, runtime.name, dict(runtime.settings), policy_digest)
        probe = _draw_probe(runtime, artefact, asked)
    finally:
        runtime.close()
    evidence = {
        "artefact": artefact.name, "artefact_digest": artefact.digest, "audit_digest": audit.digest,
        "policy_digest": policy_digest, "runtime": row.runtime, "precision": row.precision,
    }  # fmt: skip
    return Entry(artefact, row.settings, evidence, probe)


def _require_audited(record: AuditRecord, artefact: Sealed, policy_digest: str) -> ArtefactRecord:
    # Bytes that were not audited are not loaded either; what runs them is compared once it is open.
    row = record.row(artefact.name)
    return require_pass(record, artefact, row.runtime if row else "", row.settings if row else {}, policy_digest)


def _open_as_served(artefact: Sealed, row: ArtefactRecord, asked: Conditions) -> Runtime:
    """The artefact in the runtime that Triton will run it in; the thread count is the audit's."""
    if artefact.facts["runtime"] == "trt":
        return asked.open(artefact)
    # A row without a thread count equals no runtime's settings and is refused afterwards.
    precision, threads = artefact.facts["precision"], int(row.settings.get("threads", 0))
    if asked.texts is not None:
        from sfd_deploy.runtime.text import TextOnnxRuntime

        return TextOnnxRuntime(artefact.folder, precision, asked.texts, "cpu", threads)
    from sfd_deploy.runtime.ort import OnnxRuntime

    return OnnxRuntime(artefact.folder / "model.onnx", precision, "cpu", threads)


def _draw_probe(runtime: Runtime, artefact: Sealed, asked: Conditions) -> Probe:
    shape = tuple(artefact.facts["image_shape"])
    if runtime.image_shape != shape:
        raise ManifestError(
            f"{artefact.folder}: draws images of {runtime.image_shape}, its manifest says {shape}", "export it again"
        )
    labels = np.arange(len(asked.names), dtype=np.int64)
    latents = Latents.of_stream("sample", 0, 0, len(labels))
    _, largest = batch_range(artefact)
    return Probe(labels, latents.seeds, to_uint8(draw_all(runtime, latents, labels, largest)), asked.texts)
