"""One run in several processes, started by ``torchrun``: each computes the gradient of its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from .models import BLOCKS

T = TypeVar("T")
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in signature(DDP).parameters else "broadcast_buffers"
"""The name of DDP's option in this version of torch."""
TORCHRUN = "torchrun --nproc-per-node N -m looksam.lab.cli"


@dataclass(frozen=True)
class World:
    """The processes of a run and the place of this one. ``started_by_torchrun``: even a single one then uses DDP."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    started_by_torchrun: bool = False

    def from_first(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns on rank 0, on every rank. If it raises there, the others exit without a word."""
        if self.size == 1:
            return compute()
        outcome: list[Any] = [None, False]
        try:
            if self.rank == 0:
                outcome = [compute(), True]
        finally:
            distributed.broadcast_object_list(outcome, device=torch.device("cpu"))
        if not outcome[1]:
            raise SystemExit(1)
        result: T = outcome[0]
        return result

    def mean(self, value: Tensor) -> Tensor:
        """The average over the processes."""
        if self.size == 1:
            return value
        total = value / self.size
        distributed.all_reduce(total)
        return total

    def wrap(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """``model``, whose backward passes then average over the processes: as DDP, or with its parameters sharded."""
        if not self.started_by_torchrun:
            return model
        if not fsdp:
            # Running statistics are shared where they are used, see share_buffers: not in each of the forward passes.
            options: dict[str, Any] = {BUFFERS: False}
            return DDP(model, **options)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
        for block in model.modules():
            if isinstance(block, BLOCKS):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def share_buffers(self, model: nn.Module) -> None:
        """Rank 0's running statistics for all: each process has seen other images."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)


ALONE = World()


def local_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside add to ``.grad`` without DDP's averaging: the last micro-batch's averages the sum.

    FSDP reduces every micro-batch: what it keeps is the shard of the sum.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun describes in the environment; else ALONE. Connected for the time of the block, unless the
    processes are already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cuda = torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(local_rank % cuda)
    connects = not distributed.is_initialized()
    if connects:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), local_size, True)
    finally:
        if connects:
            distributed.destroy_process_group()


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of a sharded model and its optimizer as whole tensors on the CPU; only rank 0 gets them.

    All ranks must call it.
    """
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
    """Loads the whole tensors of the model, or of ``optimizer`` if one is given, into the shards of each rank."""
    options = StateDictOptions(full_state_dict=True)
    if optimizer is None:
        set_model_state_dict(model, state, options=options)
    else:
        set_optimizer_state_dict(model, optimizer, state, options=options)
