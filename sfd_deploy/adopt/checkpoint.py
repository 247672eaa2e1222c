"""A PyTorch checkpoint's generator, read in a child process and checked here before a tensor is used.

The child (``child.py``) opens the pickle and writes safetensors; nothing else of it is believed. A file that wants
to call anything is refused without having called it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfd_deploy.errors import ModelError
from sfd_deploy.manifest import sha256_file

CHILD = Path(__file__).with_name("child.py")
SECONDS = 600
# How `torch.save` began files before 2020: protocol 2, then a magic number.
LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
WHERE_FROM = "give a checkpoint that the official `train_sfd` saved, ckpt-STEP.pth"


@dataclass(frozen=True)
class Checkpoint:
    """The generator's tensors, float32 and finite, by name; which entry of the file they are; the file's sha256."""

    tensors: Mapping[str, Tensor]
    entry: str
    step: int | None
    sha256: str


def read_checkpoint(file: Path, seconds: int = SECONDS) -> Checkpoint:
    """The one-step generator in ``file``: its EMA where there is one.

    Raises:
        ModelError: no such file, not a checkpoint, one that holds more than tensors, a teacher's, one without a
            generator, non-finite weights, or one that breaks a limit of memory or ``seconds``.
    """
    _require_checkpoint(file)
    sha256 = sha256_file(file)
    with TemporaryDirectory(prefix="sfd-deploy-convert-") as folder:
        target = Path(folder) / "generator.safetensors"
        found = _run_child(file, target, seconds)
        _require_generator(file, found)
        tensors = _load(file, target)
    return Checkpoint(tensors, str(found["entry"]), found["step"], sha256)


def _require_checkpoint(file: Path) -> None:
    try:
        with file.open("rb") as handle:
            start = handle.read(len(LEGACY_START))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})", WHERE_FROM) from None
    if zipfile.is_zipfile(file) or start == LEGACY_START:
        return
    if start[:1] == b"\x80":
        raise ModelError(
            f"{file}: is a pickle of objects, not of tensors (networks of EDM and SiD come so), and reading it would"
            " run its code",
            "where you trust it, save the network as a diffusers folder and adopt that",
        )
    raise ModelError(f"{file}: is not a PyTorch checkpoint", WHERE_FROM)


def _run_child(file: Path, target: Path, seconds: int) -> dict[str, Any]:
    # -P: no module is taken from the working directory, where a downloaded file may lie beside others.
    command = [sys.executable, "-P", str(CHILD), str(file.resolve()), str(target), str(seconds)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_FORCE_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"{file}: reading it took more than {seconds} s", WHERE_FROM) from None
    if ended.returncode != 0:
        raise _refusal(file, ended.returncode, ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _refusal(file: Path, code: int, stderr: str) -> ModelError:
    wanted = re.search(r"GLOBAL ([\w.]+)", stderr)
    if wanted is not None:
        return ModelError(
            f"{file}: refused, it holds more than tensors: it asks for {wanted[1]}; nothing of it was run", WHERE_FROM
        )
    if "MemoryError" in stderr or "can't allocate memory" in stderr or "Cannot allocate memory" in stderr:
        return ModelError(f"{file}: refused, it claims more memory than three times its size", WHERE_FROM)
    kinds = re.findall(r"^([\w.]*(?:Error|Exception))\b", stderr, flags=re.MULTILINE)
    reason = f"signal {-code}" if code < 0 else (kinds[-1].rpartition(".")[2] if kinds else f"exit code {code}")
    return ModelError(f"{file}: cannot be read as tensors ({reason})", WHERE_FROM)


def _require_generator(file: Path, found: Mapping[str, Any]) -> None:
    if found["entry"] == "teacher":
        raise ModelError(
            f"{file}: holds a teacher, which draws in many steps, not a one-step generator", WHERE_FROM
        )  # fmt: skip
    if found["entry"] == "unknown":
        raise ModelError(f"{file}: unknown layout, {found['found']}", WHERE_FROM)


def _load(file: Path, target: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(target)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: its tensors could not be copied ({type(error).__name__})", WHERE_FROM) from None
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ModelError(f"{file}: {name} is {value.dtype}, not floating point", WHERE_FROM)
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"{file}: {name} holds numbers that are not finite", WHERE_FROM)
    return {name: value.float() for name, value in tensors.items()}
