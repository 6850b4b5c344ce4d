"""Numbers on their way to the device."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.backends.triton.rules import LIMIT, Read
from looksam_kernels.formulas import Groups, Scaling


class Numbers(NamedTuple):
    """Hyper-parameters, float64 [names, groups] on the device."""

    seen: list[float]
    on_device: Tensor


Mail = list[tuple["array[Any]", Callable[[Tensor], None]]]
"""Numbers of 8 bytes for the device, and what takes them, as int64, when they are there."""


def values_of(reads: tuple[Read, ...], groups: Groups, scaling: Scaling | None) -> list[Any]:
    """Hyper-parameters as numbers or tensors, [names, groups]."""
    limit = None if scaling is None else scaling.max_grad_norm
    found: list[Any] = [limit if x is LIMIT else x.read(g, x.name) for x in reads for g in groups]
    return [x if isinstance(x, Tensor) else float(x) for x in found]


def any_on_device(values: list[Any]) -> bool:
    """Is there a tensor among them? Its value may have changed unseen, and is copied on the device."""
    return not {float}.issuperset(map(type, values))


def scalar_on(x: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), x, dtype=torch.float64, device=device)
