"""Passes of which each rank keeps its own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Module

from looksam_kernels import TensorTable
from looksam_kernels.formulas import DESCENTS, STORED

MaybeTensors = Sequence[Tensor | None]


class TwoRanks:
    """Two ranks with the same parameters, each of which computes one of two gradients.

    Raises:
        ValueError: the group has not two ranks.
    """

    def __init__(self, group: Any) -> None:
        size = distributed.get_world_size(group)
        if size != 2:
            raise ValueError(f"process_group must have two ranks, not {size}")
        self.rank = distributed.get_rank(group)
        self._group = group
        self._rows: list[bool] | None = None
        """Which gradients there are; both ranks know that the other has the same ones."""

    def exchange(self, mine: MaybeTensors) -> list[Tensor | None]:
        """The other rank's gradients of the same parameters: an all-gather for each dtype.

        Raises:
            RuntimeError: it has gradients of other parameters.
        """
        self._agree([x is not None for x in mine])
        theirs: list[Tensor | None] = [None] * len(mine)
        for dtype in dict.fromkeys(x.dtype for x in mine if x is not None):
            rows = [(i, x) for i, x in enumerate(mine) if x is not None and x.dtype == dtype]
            flat = torch.cat([x.reshape(-1) for _, x in rows])
            both = [torch.empty_like(flat) for _ in range(2)]
            distributed.all_gather(both, flat, group=self._group)
            for (i, x), part in zip(rows, both[1 - self.rank].split([x.numel() for _, x in rows]), strict=True):
                theirs[i] = torch.empty_like(x).copy_(part.view(x.shape))  # in x's memory order, and aligned
        return theirs

    def _agree(self, rows: list[bool]) -> None:
        if rows == self._rows:
            return
        both: list[Any] = [None, None]
        distributed.all_gather_object(both, rows, group=self._group)
        if both[0] != both[1]:
            odd = [i for i, (a, b) in enumerate(zip(*both, strict=True)) if a != b]
            raise RuntimeError(f"only one of the two ranks has a gradient of the parameters number {odd}")
        self._rows = rows


class Replicas:
    """m-sharpness: each rank perturbed along its own gradient; the update must be the same on all.

    Args:
        model: a ``DistributedDataParallel``, for its process group; default: all ranks.
    """

    def __init__(self, model: Module | None) -> None:
        self._group = getattr(model, "process_group", None)

    def agree(self, table: TensorTable, descent: str, last: str, found_inf: Tensor | None) -> Tensor | None:
        """Averages the gradients of earlier passes that the direction uses or measures, in place, and ``found_inf``'s maximum.

        Without it the replicas would drift: LookSAM's q is made of g and s, and s is already the average.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return found_inf
        rule = DESCENTS[descent]
        used = dict.fromkeys((*rule.inputs, *chain.from_iterable(rule.pairs)))
        known = [name for name in used if name != last and name not in STORED]
        for name in known:
            self._average([x for x in table[name] if x is not None])
        if found_inf is not None:
            found_inf = found_inf.clone()
            distributed.all_reduce(found_inf, distributed.ReduceOp.MAX, group=self._group)
        return found_inf

    def _average(self, gradients: list[Tensor]) -> None:
        """One all-reduce for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for x in gradients:
            by_dtype.setdefault(x.dtype, []).append(x)
        for same in by_dtype.values():
            flat = torch.cat([x.reshape(-1) for x in same]) / distributed.get_world_size(self._group)
            distributed.all_reduce(flat, group=self._group)
            for x, average in zip(same, flat.split([x.numel() for x in same]), strict=True):
                x.copy_(average.view_as(x))
