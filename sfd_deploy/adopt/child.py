"""Run as a script, in a process of its own: the generator's tensors of a PyTorch checkpoint to safetensors.

The only place where a pickle is opened: by PyTorch's restricted unpickler, which builds tensors and plain
containers and calls nothing else, under a limit of memory, time and file size. Imports nothing of ours, and
errors are left to kill it: ``checkpoint.py`` reads the exit, and checks whatever was written.

Usage: ``python -P child.py CHECKPOINT TARGET SECONDS``; prints one JSON line about what was found.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Room beside the checkpoint itself: one copy of an entry, and safetensors' buffer of it.
COPIES, SPARE_BYTES = 3, 2**29


def extract(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Write the generator's tensors, where there are any; say what the checkpoint holds.

    Raises:
        Whatever the restricted unpickler, the allocator or the file system raise.
    """
    states = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(checkpoint))
    entry, tensors = generator_entry(states)
    if tensors is not None:
        plain = {name.removeprefix("module."): value.detach().contiguous().clone() for name, value in tensors.items()}
        save_file(plain, target)
    return {"entry": entry, "step": step_of(states), "found": outline(states)}


def generator_entry(states: Any) -> tuple[str, dict[str, Tensor] | None]:
    """Which entry is the one-step generator, and its tensors; none where there is no such entry.

    The official distillation saves ``[fake score, its optimiser, generator, its optimiser, step, EMA]``, the last
    one only with an EMA; the official teacher training ``[network, optimiser, step, EMA]``.
    """
    if is_tensors(states):
        return "state dict", states
    if not isinstance(states, list):
        return "unknown", None
    if len(states) == 6 and isinstance(states[4], int) and is_tensors(states[5]):
        return "ema", states[5]
    if len(states) == 5 and isinstance(states[4], int) and is_tensors(states[2]):
        return "generator", states[2]
    if len(states) in {3, 4} and is_tensors(states[0]) and isinstance(states[2], int):
        return "teacher", None
    return "unknown", None


def step_of(states: Any) -> int | None:
    """The last training step, counted from 0, where the checkpoint says it."""
    return states[4] if isinstance(states, list) and len(states) > 4 and isinstance(states[4], int) else None


def is_tensors(value: Any) -> bool:
    """Whether ``value`` maps names to plain floating-point tensors."""
    return (
        isinstance(value, dict) and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(item, Tensor) and item.layout is torch.strided and item.is_floating_point()
                for item in value.values())
    )  # fmt: skip


def outline(states: Any) -> str:
    """What the checkpoint holds, in a few words."""
    if isinstance(states, (list, tuple)):
        return f"a {type(states).__name__} of {len(states)}"
    if isinstance(states, dict):
        return f"a dict with {', '.join(sorted(str(key) for key in states)[:4]) or 'nothing'}"[:120]
    return f"a {type(states).__name__}"


def limit(checkpoint_bytes: int, seconds: int) -> None:
    """Bound memory, processor time, written bytes and core dumps of this process; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + COPIES * checkpoint_bytes + SPARE_BYTES
    for kind, bound in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, checkpoint_bytes + SPARE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (bound, bound))


if __name__ == "__main__":
    source, seconds = Path(sys.argv[1]), int(sys.argv[3])
    limit(source.stat().st_size, seconds)
    sys.stdout.write(json.dumps(extract(source, Path(sys.argv[2]))) + "\n")
