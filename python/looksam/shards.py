"""Parameters of which each rank holds a shard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Module

from looksam_kernels import TensorTable, ops
from looksam_kernels.formulas import Coefficients, Groups, Sums, kept_norm
from looksam_kernels.updates import BASES, lamb_apply, lamb_direction

MaybeTensors = Sequence[Tensor | None]


class Whole:
    """Parameters that every rank holds whole: nothing is to be added up."""

    all_reduce: Callable[[Sums], Sums] | None = None

    def local(self, tensors: MaybeTensors) -> MaybeTensors:
        return tensors

    def measure_and_step(self, table: TensorTable, rule: str, base: str, groups: Groups, **how: Any) -> Tensor:
        return ops.measure_and_step(table, rule, base, groups, **how)

    def step(self, table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
        ops.step(table, base, coefficients, groups)

    def reshard(self, model: Module | None) -> None:
        """Gathered copies of the parameters are out of date after every write."""


class Shards(Whole):
    """DTensor parameters. The ops see the local shards, and sums are added up over the ranks that hold the others.

    A sum is added over the mesh dimensions along which its tensor is sharded, so replicas are not counted twice. One
    small all-reduce per op and sharded mesh dimension. State is DTensors again, sharded as the parameters are; kept
    norms (``q_norm_sq``) are of the whole tensor.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        from torch.distributed.tensor import DTensor

        self._is_sharded = lambda x: isinstance(x, DTensor)
        self._placements = [p.placements if isinstance(p, DTensor) else None for p in params]
        self._members: dict[Any, list[bool]] = {}
        for row, p in enumerate(params):
            if isinstance(p, DTensor):
                for dim, placement in enumerate(p.placements):
                    if not placement.is_replicate():
                        group = p.device_mesh.get_group(dim)
                        self._members.setdefault(group, [False] * len(params))[row] = True
        self.all_reduce = self._add_up

    def local(self, tensors: MaybeTensors) -> MaybeTensors:
        """Gradients are first laid out as their parameters are."""
        return [self._local(x, placements) for x, placements in zip(tensors, self._placements, strict=True)]

    def _local(self, x: Any, placements: Any) -> Any:
        if not self._is_sharded(x):
            return x
        if x.placements != placements:
            x = x.redistribute(placements=placements)
        return x._local_tensor  # as to_local() under no_grad, without a Parameter around it

    def _add_up(self, sums: Sums) -> Sums:
        """Sums of the local shards -> sums of the whole tensors. Kept norms are that already."""
        whole = self._over_ranks(sums.values)
        kept = [kept_norm(pair) is not None for pair in sums.pairs]
        rows = [sums.values[i] if known else whole[i] for i, known in enumerate(kept)]
        return Sums(sums.pairs, torch.stack(rows)) if any(kept) else Sums(sums.pairs, whole)

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Adds up ``values`` [..., rows] over the ranks that hold shards of each row."""
        for group, sharded in self._members.items():
            mask = torch.tensor(sharded, device="cpu").to(values.device, non_blocking=True)
            part = torch.where(mask, values, 0.0)
            distributed.all_reduce(part, group=group)
            values = torch.where(mask, part, values)
        return values

    def measure_and_step(self, table: TensorTable, rule: str, base: str, groups: Groups, **how: Any) -> Tensor:
        trust_ratio = BASES[base].takes_trust_ratio
        _, found = ops.measure(table, rule, groups, all_reduce=self.all_reduce, trust_ratio=trust_ratio, **how)
        self.step(table, base, found, groups)
        return found.found_inf

    def step(self, table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
        takes_part = table.present(coefficients.inputs[0])
        norms = table[f"{coefficients.writes}_norm_sq"]
        written = [i for i, x in enumerate(norms) if x is not None and takes_part[i] and coefficients.q is not None]
        before = [norms[i].clone() for i in written]
        if base == "lamb":
            self._lamb(table, coefficients, groups)
        else:
            ops.step(table, base, coefficients, groups)
        if written:
            zero = torch.zeros((), dtype=torch.float64, device=table.device)
            whole = self._over_ranks(torch.stack([zero if x is None else x for x in norms]))
            for i, old in zip(written, before, strict=True):
                norms[i].copy_(torch.where(coefficients.found_inf > 0, old, whole[i]))

    def _lamb(self, table: TensorTable, coefficients: Coefficients, groups: Groups) -> None:
        """LAMB with the norms of whole layers: the local part of u for all tensors, the norms, then the update.

        Formula: :func:`looksam_kernels.step`. The fused update needs its norms at once, so here u is a temporary as
        large as the local shards.
        """
        first = coefficients.inputs[0]
        origins = [
            None if x is None else table["b" if table.perturbed[row] or table.has_master(row) else "w"][row].clone()
            for row, x in enumerate(table[first])
        ]
        added = ops.addition(table, coefficients)
        ops.step(table, "grad", coefficients, groups)
        keep = coefficients.found_inf > 0
        squares = [torch.zeros(2, dtype=torch.float64, device=table.device)] * len(table)
        updates: dict[int, tuple[Tensor, Tensor]] = {}
        for row, origin in enumerate(origins):
            if origin is not None:
                w = origin.to(table["exp_avg"][row].dtype)
                updates[row] = w, _lamb_direction(table, row, first, w, groups[table.group[row]], keep)
                squares[row] = torch.stack([x.square().sum(dtype=torch.float64) for x in updates[row]])
        w_norm, u_norm = self._over_ranks(torch.stack(squares, dim=1)).sqrt()
        for row, (w, u) in updates.items():
            new = lamb_apply(w, u, w_norm[row], u_norm[row], groups[table.group[row]])
            if (post := added[row]) is not None:
                new = new + post
            if table.rounding is not None and table.rounds_stochastically(row):
                new = table.rounding(new, "step", table["step"][row], row, table["w"][row])
            new = torch.where(keep, w, new)
            if table.has_master(row):
                table["b"][row].copy_(new)
            table["w"][row].copy_(new)

    def reshard(self, model: Module | None) -> None:
        """A module that keeps its gathered parameters after backward would run the next pass at the old weights."""
        for module in _fsdp_modules(model):
            module.reshard()


def _lamb_direction(table: TensorTable, row: int, first: str, w: Tensor, group: Any, keep: Tensor) -> Tensor:
    """LAMB's u of one tensor; moves its states and its count."""
    state = {name: table[name][row] for name in BASES["lamb"].states}
    count = table["step"][row]
    u, new = lamb_direction(w, table[first][row].to(w.dtype), state, count.double() + 1, group)
    for name, x in new.items():
        state[name].copy_(torch.where(keep, state[name], x))
    count.copy_(torch.where(keep, count, count + 1))
    return u


def _fsdp_modules(model: Module | None) -> list[Any]:
    """The FSDP2 modules in ``model``; of the whole process if it is not given."""
    from torch.distributed.fsdp import FSDPModule

    if model is not None:
        return [m for m in model.modules() if isinstance(m, FSDPModule)]
    try:
        from torch.distributed._composable_state import _module_state_mapping as states
    except ImportError:
        return []
    return [m for m in list(states) if isinstance(m, FSDPModule)]


def refuse_flat(params: Iterable[Tensor]) -> None:
    """FSDP1 joins the parameters of a module in a flat one and gives each rank a piece of it, whose norm cannot be told
    from that of a whole tensor.

    Raises:
        TypeError: a parameter belongs to a ``FullyShardedDataParallel``.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise TypeError(
            "parameters of FullyShardedDataParallel (FSDP1) are not supported: their norms would be those of this rank's "
            "piece; shard the model with torch.distributed.fsdp.fully_shard (FSDP2), or use DistributedDataParallel"
        )


def refuse_shard_of_optimizer() -> None:
    """ZeroRedundancyOptimizer makes on each rank an optimizer of a part of the parameters. Nothing about them tells that.

    Raises:
        TypeError: called, through any functions, by a ``ZeroRedundancyOptimizer``.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            raise TypeError(
                "ZeroRedundancyOptimizer is not supported: each rank would take the norms of its own part of the "
                "parameters alone; shard the model with torch.distributed.fsdp.fully_shard (FSDP2), which shards the "
                "optimizer's state too, or use DistributedDataParallel with this optimizer on every rank"
            )
        frame = frame.f_back


def shards_of(params: Sequence[Tensor]) -> Whole:
    """Where no tensor is a DTensor (whoever makes one has imported its module) the question costs nothing.

    Raises:
        TypeError: as :func:`refuse_flat`: a model may be wrapped after its optimizer was made.
    """
    refuse_flat(params)
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and any(isinstance(p, module.DTensor) for p in params):
        return Shards(params)
    return Whole()
