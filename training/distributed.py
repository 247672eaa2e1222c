"""One process or many: what differs between them, in one place. Built on Hugging Face Accelerate.

A plain call is one process and never touches Accelerate, whose state is global to a process. Under
``accelerate launch`` (DDP or FSDP2, by its own config file) each process computes its part of the
global batch; gradients are the global weighted sum.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sfd_deploy.errors import ConfigError, ProcessError

if TYPE_CHECKING:
    from accelerate import Accelerator

LONGEST_WAIT = timedelta(hours=12)


@dataclass(frozen=True)
class Workers:
    """The processes of one training, as this one of them sees them."""

    device: torch.device
    count: int = 1
    index: int = 0
    accelerator: Accelerator | None = None

    @classmethod
    def here(cls, device: str) -> Workers:
        """A process alone on ``device``, or this one of those that ``accelerate launch`` or ``torchrun`` started."""
        if "LOCAL_RANK" not in os.environ:
            return cls(torch.device(device))
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        # Our own config decides on autocast, so that every launcher gives the same arithmetic.
        accelerator = Accelerator(
            mixed_precision="no", cpu=device == "cpu",
            kwargs_handlers=[
                # Buffers are constants; among them may be gigabytes of encoded prompts, broadcast in every call.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                # One process looks and seals while the others wait: longer than the ten minutes that NCCL gives them.
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )  # fmt: skip
        return cls(accelerator.device, accelerator.num_processes, accelerator.process_index, accelerator)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    @property
    def is_sharded(self) -> bool:
        """Whether networks are sharded over the processes (FSDP2)."""
        return self.accelerator is not None and bool(self.accelerator.is_fsdp2)

    def prepare(self, network: nn.Module, adam: torch.optim.Optimizer) -> nn.Module:
        """``network`` to be called in the step that trains it: itself, in DDP's wrapper, or sharded in place."""
        if self.accelerator is None:
            return network
        if self.is_sharded:
            _row_major(network)
        wrapped, _ = self.accelerator.prepare(network, adam)
        return cast(nn.Module, wrapped)

    def shard(self, network: nn.Module) -> None:
        """Shard a network that no optimiser trains, as those are that one trains."""
        if self.is_sharded:
            from torch.distributed.fsdp import fully_shard

            _row_major(network)
            fully_shard(network)

    @contextmanager
    def gathering(self, network: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients only after the ``last`` part of a step; DDP decides so in the forward pass."""
        if self.accelerator is None or last:
            yield
        else:
            with self.accelerator.no_sync(network):
                yield

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.count == 1:
            return list(flags)
        found = torch.tensor([float(flag) for flag in flags], device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def together(self, values: Tensor) -> Tensor:
        """Rows of all processes, one after the other; their numbers may differ."""
        if self.accelerator is None or self.count == 1:
            return values
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        torch.distributed.all_gather(sizes, torch.tensor([len(values)], device=self.device))
        parts = [values.new_empty((int(size), *values.shape[1:])) for size in sizes]
        longest = max(len(part) for part in parts)
        padded = torch.cat([values, values.new_zeros((longest - len(values), *values.shape[1:]))])
        gathered = [torch.empty_like(padded) for _ in parts]
        torch.distributed.all_gather(gathered, padded.contiguous())
        return torch.cat([full[: len(part)] for full, part in zip(gathered, parts, strict=True)])

    @contextmanager
    def needing_each_other(self) -> Iterator[None]:
        """Say of a lost connection what it is: another process ended, and its own error is the one to read.

        Raises:
            ProcessError: in place of what the collective raised.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no type of their own.
            if self.count == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise
            raise ProcessError(
                f"another of the {self.count} processes ended: process {self.index} cannot train without it",
                "see what that one said; the same command goes on from the last checkpoint",
            ) from None

    def wait(self) -> None:
        """Until every process is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def require_rows(self, rows: int, accumulate: int) -> None:
        """Refuse a batch of which some part would be empty.

        Raises:
            ConfigError: fewer rows than processes times ``accumulate``.
        """
        if rows < self.count * accumulate:
            raise ConfigError(
                f"a batch of {rows} rows cannot be split over {self.count} processes and `accumulate` {accumulate}",
                "raise retained_rows, or lower `accumulate` or the number of processes",
            )


def require_alone(task: str) -> None:
    """Refuse a launcher's several processes: each would train the same and write over the other.

    Raises:
        ConfigError: there are several.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"{task}: is trained by one process, and {count} were launched", "start it without launcher")


def _row_major(network: nn.Module) -> None:
    # FSDP2 shards no channels-last weights.
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def local(values: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here; any other tensor itself."""
    return values.to_local() if isinstance(values, DTensor) else values


def whole(values: Tensor) -> Tensor:
    """A sharded tensor gathered in every process; any other tensor itself."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def laid_out_as(model: Tensor, values: Tensor) -> Tensor:
    """``values`` on the device, in the memory layout and sharded as ``model`` is."""
    if isinstance(model, DTensor):
        return distribute_tensor(values.to(model.device), model.device_mesh, model.placements)
    # Fused optimisers walk raw memory: a moment must lie in memory as its parameter does.
    return torch.empty_like(model).copy_(values)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's state, gathered; every process must ask."""
    return {name: whole(value) for name, value in network.state_dict().items()}


def load_whole_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Put a gathered state into a network that may be sharded.

    Raises:
        RuntimeError: names or shapes differ.
    """
    own = network.state_dict()
    fits = {name for name, value in state.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(
        {name: laid_out_as(own[name], value) if name in fits else value for name, value in state.items()}
    )
