"""What the device must know of a column: where its tensors are, and of what kind they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Trait(NamedTuple):
    """What the kernels must know of a tensor at compile time, and of its strides."""

    dtype: torch.dtype
    aligned: bool
    order: tuple[int, ...] | None


class Column(NamedTuple):
    """As the device knows it."""

    traits: tuple[Trait | None, ...]
    kind: int
    """A number for the traits: columns with the same traits have the same."""
    addresses: Tensor


def traits_of(tensors: Sequence[Tensor | None], scalar: bool) -> tuple[Trait | None, ...]:
    return tuple(None if x is None else _trait(x, scalar) for x in tensors)


def _trait(x: Tensor, scalar: bool) -> Trait:
    return Trait(x.dtype, x.data_ptr() % 16 == 0, () if scalar else _memory_order(x))


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """Which element lies where: the strides of the dimensions longer than 1; ``None`` if x is not dense, or if its numbers are
    not those in memory: negated when they are read, or zeros that are nowhere."""
    if x.is_neg() or (x.data_ptr() == 0 and x.numel() > 0):
        return None
    strides = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected and x.numel() > 0:
            return None
        expected *= size
    return tuple(stride for stride, _ in strides) if x.numel() > 0 else ()
