"""A bench of tiny everything on the 8x8 digits: it tests mechanics, never quality."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measured import Looked, Measured, Sizes
from benchmarks.workshop import Workshop
from sfd_deploy.audit.figures import count
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.judge import JudgeConfig
from sfd_deploy.training.teacher import TeacherConfig

TINY_SIZES = Sizes(forget=6, override=5, retained=4, reference=3, teacher_forget=2)


def tiny_workshop(folder: Path, pad_to: int | None = None, device: str = "cpu", precision: str = "fp32") -> Workshop:
    """Seconds of work: untrained in all but name."""
    network = {"image_size": pad_to or 8, "channels": 1, "block_channels": [4, 8], "norm_groups": 2}
    train = {"teacher": "unused", "forget": {"1": "0"}, "iterations": 2, "retained_rows": 4, "forget_rows": 2,
             "precision": precision}  # fmt: skip
    teacher = {"network": network, "images": 16, "batch_size": 8, "precision": precision, "pad_to": pad_to}
    judge = {"channels": 1, "widths": [4]}
    return Workshop(
        "digits", folder, Path("digits"), TrainConfig.from_mapping(train, "tiny"),
        TeacherConfig.from_mapping(teacher, "tiny"),
        tuple(JudgeConfig.from_mapping({"classifier": judge | {"architecture": kind}, "epochs": 1, "pad_to": pad_to,
                                        "precision": precision}, "tiny") for kind in ("plain", "residual")),
        device,
    )  # fmt: skip


def calls_to(monkeypatch: pytest.MonkeyPatch, name: str, place: int) -> list[Any]:
    """Which argument number ``place`` each call of ``name`` has; it runs with "cpu" there."""
    module, _, function = name.rpartition(".")
    original: Callable[..., Any] = getattr(sys.modules[module], function)
    asked: list[Any] = []

    def call(*arguments: Any) -> Any:
        asked.append(arguments[place])
        return original(*arguments[:place], "cpu", *arguments[place + 1 :])

    monkeypatch.setattr(name, call)
    return asked


def looked(rates: list[list[int]]) -> Looked:
    return Looked(called=tuple(tuple(row) for row in rates))


def measured(forget_hits: int, n: int, right: int, images: int = 100, spread: float = 1.0) -> Measured:
    """A row whose first ``right`` of ``images`` are right, by both judges, for label 0."""
    called = [[0] * right + [1] * (images - right)] * 2
    hits = np.arange(n) < forget_hits
    return Measured(
        forget={1: count(hits, 0.99)}, retained={0: looked(called)}, spread={0: spread}, frechet=1.0, seconds=60.0
    )


@pytest.fixture(scope="session", autouse=True)
def digits_are_here() -> None:
    """Every bench here is of the digits."""
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits")
