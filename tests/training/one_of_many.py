"""Run by test_distributed as one process of several: trains the tiny loop, and the first one writes what came of it.

``python -m tests.training.one_of_many FOLDER SCENARIOS``; SCENARIOS is a JSON object, name → config keys.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from sfd_deploy.errors import DivergedError
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.course import Course
from sfd_deploy.training.distributed import Workers, whole_state
from sfd_deploy.training.loop import SfdLoop
from tests.conftest import TINY_LABELS, tiny_generator

VALUES = {"teacher": "unused", "iterations": 4, "retained_rows": 6, "forget_rows": 3, "precision": "fp32",
          "checkpoint_every": 2}  # fmt: skip


def train(folder: Path, changes: dict[str, Any], workers: Workers) -> dict[str, Any]:
    """Train with its checkpoint in ``folder``.

    In the process of that number, "poison" makes a gradient of the generator NaN, once gradients were exchanged, and
    "interrupt" presses Ctrl-C in step 1. All processes die in the step "stop". With "look" the first one looks, and
    finds its look at that step the best.
    """
    changes = dict(changes)
    poisoned, interrupted, stop, look = (changes.pop(name, None) for name in ("poison", "interrupt", "stop", "look"))
    config = TrainConfig.from_mapping(VALUES | changes, "test")
    loop = SfdLoop(config, TINY_LABELS, tiny_generator().denoiser, workers=workers)
    if poisoned == workers.index:
        loop._apply = poisoning(loop._apply)  # type: ignore[method-assign]
    if interrupted == workers.index:
        loop.generator_step = interrupting(loop.generator_step)  # type: ignore[method-assign]
    exchanges = counted_exchanges(loop)
    course = Course(loop, folder / "checkpoint.safetensors", watch=None if look is None else Watching(look))
    course.record_every = 1
    if stop is not None:
        loop.iterate = die_at(stop, loop.iterate)  # type: ignore[method-assign]
    try:
        generator = course.run()
    except (DivergedError, KeyboardInterrupt) as error:
        return {"stopped": type(error).__name__, "step": course.step, "skipped": loop.skipped}
    state = {"theta": generator, "psi": loop.fake_score}
    tensors = {f"{name}.{key}": value.contiguous() for name, net in state.items()
               for key, value in whole_state(net).items()}  # fmt: skip
    if workers.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "weights.safetensors")
    units = [type(module).__name__ for module in loop.generator.modules() if isinstance(module, FSDPModule)]
    return {"record": course.record, "processes": workers.count, "sharded": units, "exchanges": exchanges,
            "gradients": loop.gradient_figures}  # fmt: skip


@dataclass
class Watching:
    """An onlooker and its rating in one, which likes what it sees at step ``likes`` best."""

    likes: int
    best: Any = None
    doubt: str = ""

    @property
    def rating(self) -> Any:
        return self

    def due(self, _step: int, last: bool = False) -> bool:
        return True

    def look(self, step: int, _generator: Any) -> dict[str, float]:
        if step == self.likes:
            self.best = SimpleNamespace(step=step)
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, _state: dict[str, Any]) -> None:
        pass


def counted_exchanges(loop: SfdLoop) -> dict[str, int]:
    """How often each network's gradients are exchanged, from here on; empty where DDP does not do it."""
    counts: dict[str, int] = {}

    def hook(name, bucket):  # DDP wants no annotation that is a string
        counts[name] += bucket.is_last()
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    for name, network in (("psi", loop.psi), ("theta", loop.theta)):
        if isinstance(network, DistributedDataParallel):
            counts[name] = 0
            network.register_comm_hook(name, hook)
    return counts


def poisoning(apply: Any) -> Any:
    """``apply``, shown NaN in a gradient of the generator in every step."""

    def poisoned(name: str, network: torch.nn.Module, *arguments: Any) -> Any:
        if name == "generator":
            next(network.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        return apply(name, network, *arguments)

    return poisoned


def interrupting(generator_step: Any) -> Any:
    """``generator_step``, with Ctrl-C in step 1."""

    def interrupted(step: int, *arguments: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return generator_step(step, *arguments)

    return interrupted


def die_at(last: int, iterate: Any) -> Any:
    """``iterate``, interrupted in step ``last``."""

    def dying(step: int, watched: bool = False) -> Any:
        if step == last:
            raise KeyboardInterrupt
        return iterate(step, watched)

    return dying


def shard(workers: Workers) -> None:
    """FSDP2 by the shipped file from here on.

    Accelerate turns it on for GPUs alone; PyTorch's own code for it runs on a CPU as well.
    """
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    assert workers.accelerator is not None
    state = workers.accelerator.state
    file = resources.files("sfd_deploy.presets") / "accelerate" / "fsdp2.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))["fsdp_config"]
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=values["fsdp_version"], reshard_after_forward=values["fsdp_reshard_after_forward"],
        cpu_ram_efficient_loading=values["fsdp_cpu_ram_efficient_loading"],
        auto_wrap_policy=values["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=values["fsdp_transformer_layer_cls_to_wrap"].split(","),
    )  # fmt: skip
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main(folder: Path, scenarios: dict[str, dict[str, Any]]) -> None:
    """Every scenario in turn, in this process' part."""
    workers = Workers.here("cpu")
    flags = workers.any_of(workers.index == 1, False, True)
    (folder / f"flags-{workers.index}.json").write_text(json.dumps(flags))
    patience = torch.distributed.distributed_c10d._get_default_group()._get_backend(workers.device).options._timeout
    (folder / f"patience-{workers.index}.json").write_text(json.dumps(patience.total_seconds()))
    for name, changes in scenarios.items():
        if changes.pop("shard", False):
            shard(workers)
        found = train(folder / changes.pop("folder", name), changes, workers)
        (folder / f"{name}-{workers.index}.json").write_text(json.dumps(found))
        workers.wait()
    if workers.accelerator is not None:
        workers.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.alarm(200)  # where one goes on alone, it would wait for the other for ever
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
