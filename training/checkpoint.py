"""Checkpoints: networks, optimisers and the step in one safetensors file, written atomically, bound to a config.

No pickle: optimiser state is flattened to tensors. The file is replaced only when the new one is
complete on disk, so a kill at any moment leaves the previous checkpoint.
"""

from __future__ import annotations

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

from sfd_deploy.errors import ConfigError, ManifestError


class Checkpoint:
    """The state of one training: what is saved, and where.

    Args:
        file: the checkpoint's path.
        networks: by name; their ``state_dict`` is saved and restored.
        optimisers: by name; state per parameter index.
        config: the resolved config; resuming under another is refused.
    """

    def __init__(
        self, file: Path, networks: Mapping[str, nn.Module], optimisers: Mapping[str, Optimizer], config: dict[str, Any]
    ) -> None:
        self.file, self.networks, self.optimisers = file, networks, optimisers
        self.config = json.dumps(config, sort_keys=True)

    def save(self, step: int, notes: dict[str, Any]) -> None:
        """Write step, tensors and JSON ``notes``: temporary name, fsync, rename."""
        tensors = {f"{name}/{key}": value.contiguous() for name, net in self.networks.items()
                   for key, value in net.state_dict().items()}  # fmt: skip
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {
                    f"{name}/{index}/{key}": torch.as_tensor(value).contiguous() for key, value in state.items()
                }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".writing")
        metadata = {"step": str(step), "config": self.config, "notes": json.dumps(notes)}
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, self.file)

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load everything back; returns the step and the notes, (0, {}) when there is no checkpoint.

        Raises:
            ManifestError: the file is damaged.
            ConfigError: it belongs to another config.
        """
        if not self.file.exists():
            return 0, {}
        try:
            with safe_open(self.file, framework="pt") as handle:
                metadata = handle.metadata()
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError):
            raise ManifestError(f"{self.file}: damaged checkpoint", "delete it and train again") from None
        if metadata["config"] != self.config:
            changed = _changed_keys(json.loads(metadata["config"]), json.loads(self.config))
            raise ConfigError(
                f"{self.file}: checkpoint of another config ({', '.join(changed)} differ)",
                "resume with the config it was started with, or train into a new folder",
            )
        for name, network in self.networks.items():
            network.load_state_dict(_under(name, tensors))
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
        # Fused optimisers walk raw memory: a moment must lie in memory as its parameter does.
        laid_out = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[name] = laid_out
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
