"""The demos: train, export, audit, serve and ask, in order, on a shipped Fashion-MNIST teacher.

Of class labels or of prompts; all that differs is in ``Demo``. Leaves ``summary.json`` in the run's folder. Each
stage skips what an earlier, unfinished demo completed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfd_deploy.audit.selection import Selection
from sfd_deploy.audit.stage import audit_selection
from sfd_deploy.embedded import resolve
from sfd_deploy.evidence import AuditRecord, contract_row
from sfd_deploy.export.kinds import export_any
from sfd_deploy.latents import Latents
from sfd_deploy.policy.plan import Policy
from sfd_deploy.progress import stderr_console
from sfd_deploy.runs import Run, write_json
from sfd_deploy.runtime.conditions import conditions_of
from sfd_deploy.runtime.endpoint import Transport, TritonRuntime
from sfd_deploy.runtime.seam import draw_all, to_uint8
from sfd_deploy.serving.install import Triton
from sfd_deploy.serving.launch import launched, servable
from sfd_deploy.serving.stage import build_repository
from sfd_deploy.training.kinds import load_config, run_training

SERVED_IMAGES = 200


@dataclass(frozen=True)
class Demo:
    """What one demo trains, compiles and asks: ``config``, ``probes`` and ``policy`` are presets' names."""

    config: str
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    probes: str | None = None
    policy: str = "default"

    def require_teacher(self) -> None:
        """Refuse a demo whose teacher is not in the package.

        Raises:
            RunError: it is not.
        """
        resolve(load_config(self.config).teacher, "teacher")


CLASSES = Demo("fashion-mnist", ("onnx", "trt"), ("fp32", "fp16", "int8"))
PROMPTS = Demo("fashion-t2i-sandal", ("onnx",), ("fp32", "int8"), probes="fashion-t2i-sandal", policy="fashion-t2i")


def run_demo(folder: Path, triton: Triton, demo: Demo = CLASSES, set_up_seconds: float = 0.0) -> dict[str, Any]:
    """Do everything into ``folder``; returns the summary, which is also written there.

    ``exit_code`` in it is the audit's, or 1 if served images differ from the local artefact's.
    """
    started = time.monotonic()
    say = stderr_console().rule
    say("1/4 train: a diffusion teacher becomes a one-step generator that forgets")
    run = run_training(load_config(demo.config), folder)
    say(f"2/4 export: {', '.join(demo.backends)}; {', '.join(demo.precisions)}")
    export_any(run, demo.backends, demo.precisions, {})
    say("3/4 audit: does every artefact still forget?")
    policy = Policy.load(demo.policy, "policy")
    record, _ = audit_selection(Selection(run=run), policy=policy, probes=demo.probes)
    say("4/4 serve: a real Triton server, real clients")
    served = _serve(run, policy, triton)
    seconds = {"set_up": set_up_seconds, "run": time.monotonic() - started}
    summary = summarise(record, served, seconds)
    write_json(folder / "summary.json", summary)
    return summary


def summarise(record: AuditRecord, served: dict[str, bool], seconds: dict[str, float]) -> dict[str, Any]:
    """The demo's contract for machines: rates from 0 to 1."""
    keys = ("retained_accuracy", "images_per_second", "network_evaluations")
    teacher = {key: getattr(record.teacher, key) for key in keys}
    return {
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "teacher": teacher,
        "artefacts": [contract_row(row) for row in record.artefacts],
        "served": served,
        "exit_code": record.exit_code or (0 if served["images_match"] else 1),
    }


def _serve(run: Run, policy: Policy, triton: Triton) -> dict[str, bool]:
    repository = build_repository(run, policy.digest)
    with launched(servable(repository), triton, run.work / "triton.log") as server:
        by_protocol = {
            "http": _asked(run, server.models, server.http, "http"),
            "grpc": _asked(run, server.models, server.grpc, "grpc"),
        }
    answered = {protocol: all(len(images) for images, _ in pairs) for protocol, pairs in by_protocol.items()}
    matches = all(_within_one_level(*pair) for pairs in by_protocol.values() for pair in pairs)
    return {**answered, "images_match": matches}


def _asked(run: Run, models: Sequence[str], address: str, protocol: Transport) -> list[tuple[Any, Any]]:
    """Per model: the images a client got, and the local artefact's for the same labels or prompts and seeds."""
    pairs = []
    latents = Latents.of_stream("sample", 0, 0, SERVED_IMAGES)
    for model in models:
        artefact = run.artefact(model)
        asked = conditions_of(artefact)
        labels = np.arange(SERVED_IMAGES, dtype=np.int64) % len(asked.names)
        with closing(TritonRuntime(address, model, protocol, rows=1, texts=asked.texts)) as client:
            served = client.draw_uint8(latents, labels)
        with closing(asked.open(artefact)) as local:
            pairs.append((served, to_uint8(draw_all(local, latents, labels, 64))))
    return pairs


def _within_one_level(served: Any, local: Any) -> bool:
    return served.shape == local.shape and int(np.abs(served.astype(int) - local.astype(int)).max()) <= 1


def table_rows(summary: dict[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Columns and rows of the table that the demo prints."""
    columns = ("artefact", "runtime", "forget hits", "99 % bound", "→ override", "retained", "spread", "Fréchet", "dB",
               "images/s", "x teacher", "MB", "verdict")  # fmt: skip
    return columns, [_cells(row) for row in summary["artefacts"]]


def _cells(row: dict[str, Any]) -> Sequence[str]:
    size = f"{row['bytes'] / 1e6:.2f}"
    if row["forget"] is None:
        return (row["name"], row["runtime"], *["–"] * 9, size, row["verdict"])
    forget, psnr, faster = row["forget"], row["psnr_db"], row["speedup_over_teacher"]
    return (
        row["name"], row["runtime"], f"{forget['hits']} of {forget['n']}", f"{forget['upper_99']:.2%}",
        f"{row['override_share']:.1%}", f"{row['retained_accuracy']:.1%}", f"{row['spread']:.2f}",
        f"{row['frechet']:.2f}",
        "–" if psnr is None else f"{psnr:.1f}", f"{row['images_per_second']:.0f}",
        "–" if faster is None else f"{faster:.1f}", size, row["verdict"],
    )  # fmt: skip
