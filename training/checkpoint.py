"""Checkpoints: networks, optimisers and the step in one safetensors file, written atomically, bound to a config.

No pickle: optimiser state is flattened to tensors. The file is replaced only when the new one is
complete on disk, so a kill at any moment leaves the previous checkpoint; what is in it is hashed. Tensors are
whole, so that a training goes on over another number of processes than it was saved from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sfd_deploy.config import differing
from sfd_deploy.errors import ConfigError, ManifestError, RunError
from sfd_deploy.training.distributed import laid_out_as, load_whole_state, whole, whole_state


class Checkpoint:
    """The state of one training: what is saved, and where.

    Args:
        file: the checkpoint's path.
        networks: by name; their ``state_dict`` is saved and restored.
        optimisers: by name; state per parameter index.
        config: the resolved config; resuming under another is refused.
        writes: False in all but one of several processes, which only take part in gathering.
    """

    def __init__(
        self, file: Path, networks: Mapping[str, nn.Module], optimisers: Mapping[str, Optimizer],
        config: dict[str, Any], writes: bool = True,
    ) -> None:  # fmt: skip
        self.file, self.networks, self.optimisers, self.writes = file, networks, optimisers, writes
        self.config = json.dumps(config, sort_keys=True)

    def save(self, step: int, notes: dict[str, Any]) -> None:
        """Write step, tensors and JSON ``notes``: temporary name, fsync, rename.

        Raises:
            RunError: the place cannot be written, or is full; the earlier checkpoint stays.
        """
        tensors = self._tensors()
        if not self.writes:
            return
        temporary = self.file.with_suffix(".writing")
        metadata = {"step": str(step), "config": self.config, "notes": json.dumps(notes)}
        metadata["sha256"] = _sha256(tensors, metadata)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, self.file)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.file}: cannot be written ({error})", "free space or choose another folder") from None

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}/{key}": value.contiguous() for name, network in self.networks.items()
                   for key, value in whole_state(network).items()}  # fmt: skip
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}/{index}/{key}": whole(torch.as_tensor(value)).contiguous()
                            for key, value in state.items()}  # fmt: skip
        return tensors

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load everything back; returns the step and the notes, (0, {}) when there is no checkpoint.

        Raises:
            ManifestError: the file is damaged, or is no checkpoint.
            ConfigError: it belongs to another config.
        """
        if not self.file.exists():
            return 0, {}
        try:
            with safe_open(self.file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError):
            raise _unusable(self.file) from None
        if metadata.pop("sha256", None) != _sha256(tensors, metadata):
            raise _unusable(self.file)
        if metadata["config"] != self.config:
            changed = differing(json.loads(metadata["config"]), json.loads(self.config))
            raise ConfigError(
                f"{self.file}: checkpoint of another config ({changed} differ)",
                "resume with the config it was started with, or train into a new folder",
            )
        for name, network in self.networks.items():
            load_whole_state(network, _under(name, tensors))
        for name, optimiser in self.optimisers.items():
            _restore_optimiser(optimiser, _under(name, tensors))
        return int(metadata["step"]), json.loads(metadata["notes"])


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _restore_optimiser(optimiser: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        parameter = parameters[int(index)]
        laid_out = laid_out_as(parameter, value) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[name] = laid_out
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hex sha256 of all that is saved: safetensors itself would not notice a flipped bit."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _unusable(file: Path) -> ManifestError:
    return ManifestError(f"{file}: not a checkpoint, or damaged", "delete it and train again")
