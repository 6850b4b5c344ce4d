"""Numbers on their way to the device."""

from __future__ import annotations

import itertools
import operator
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
    source: list[Any]
    """All that the groups held when they were last looked at."""


Mail = list[tuple[Any, Callable[[Tensor], None]]]
"""Numbers of 8 bytes for the device in a buffer, and what takes them, as int64, when they are there."""

IMMUTABLE = frozenset((float, int, bool, str, tuple, type(None)))


def source_of(groups: Groups, limit: float | None) -> list[Any]:
    """What hyper-parameters are read from."""
    return [limit, *itertools.chain.from_iterable([(*g, *g.values()) for g in groups])]


def is_same(a: list[Any], b: list[Any]) -> bool:
    """Are they the same objects? Then so are the numbers that are read from them, if none can be written in place."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def as_tensor(mail: Mail) -> Tensor:
    """All of it in one tensor on the host, int64."""
    data = bytearray().join([x for x, _ in mail])
    return torch.frombuffer(data, dtype=torch.int64) if data else torch.empty(0, dtype=torch.int64)


def sizes_of(mail: Mail) -> list[int]:
    return [memoryview(x).nbytes // 8 for x, _ in mail]


def values_of(reads: tuple[Read, ...], groups: Groups, scaling: Scaling | None) -> list[Any]:
    """Hyper-parameters as numbers or tensors, [names, groups]."""
    limit = None if scaling is None else scaling.max_grad_norm
    found: list[Any] = [limit if x is LIMIT else x.read(g, x.name) for x in reads for g in groups]
    return [x if isinstance(x, Tensor) else float(x) for x in found]


def any_on_device(values: list[Any]) -> bool:
    """Is there a tensor among them? Its value may have changed unseen, and is copied on the device."""
    return not {float}.issuperset(map(type, values))


def as_numbers(x: Tensor) -> Tensor:
    """As the kernels read sums and coefficients."""
    return x.to(torch.float64).contiguous() if x.dtype != torch.float64 or not x.is_contiguous() else x


def scalar_on(x: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), x, dtype=torch.float64, device=device)
