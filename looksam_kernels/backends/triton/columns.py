"""What the device must know of a column: where its tensors are, and what kind they are."""

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


class Form(NamedTuple):
    """What the traits of a column follow from, but for the shapes, which are the parameters'."""

    present: list[bool]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    misaligned: list[int]


class Column(NamedTuple):
    seen: list[int]
    """The address of each row when it was last looked at; 0 where there is no tensor."""
    form: Form
    traits: tuple[Trait | None, ...]
    kind: int
    """A number for the traits: columns with the same traits have the same."""
    addresses: Tensor


def trait_of(x: Tensor, scalar: bool) -> Trait:
    return Trait(x.dtype, x.data_ptr() % 16 == 0, () if scalar else _memory_order(x))


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """Which element lies where: the strides of the dimensions longer than 1; ``None`` if x is not dense."""
    strides = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected and x.numel() > 0:
            return None
        expected *= size
    return tuple(stride for stride, _ in strides) if x.numel() > 0 else ()


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
