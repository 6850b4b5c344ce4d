"""Loading a checkpoint without rounding it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from looksam_kernels.numbers import scalar_dtype

StateDict = dict[str, Any]


def load_exactly(
    optimizer: Optimizer,
    load: Callable[[StateDict], None],
    state_dict: StateDict,
    moves: bool,
    translate: Callable[[StateDict], StateDict],
) -> None:
    """``load(state_dict)``, after which every tensor has the dtype that it was saved with.

    Torch casts state to the parameter's dtype, which would round the float32 state of low-precision parameters.

    Args:
        load: torch's own ``load_state_dict``.
        translate: of what the user's hooks leave of the given one, what is loaded.
        moves: bring all tensors to the parameter's device; torch leaves ``step`` where it was saved.
    """
    final: StateDict = {}

    def capture(_: Optimizer, given: StateDict) -> StateDict:
        final.update(translate(given))
        return final

    handle = optimizer.register_load_state_dict_pre_hook(capture)
    try:
        load(state_dict)
    finally:
        handle.remove()
    ids = chain.from_iterable(g["params"] for g in final["param_groups"])
    params = chain.from_iterable(g["params"] for g in optimizer.param_groups)
    for key, p in zip(ids, params, strict=True):
        for name, value in final["state"].get(key, {}).items():
            mine = optimizer.state[p].get(name)
            if isinstance(value, Tensor) and isinstance(mine, Tensor) and mine.dtype != (kept := _kept(value, p)):
                optimizer.state[p][name] = mine = value.to(kept).to(p.device, copy=True)
            if moves and isinstance(mine, Tensor):
                optimizer.state[p][name] = mine.to(p.device)


def _kept(value: Tensor, p: Tensor) -> torch.dtype:
    """The dtype that was saved, where the parameter's device has it."""
    return scalar_dtype(p.device) if value.dtype == torch.float64 else value.dtype
