"""The precision of scalars, and inner products that do not overflow before it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64. Scalars and sums are float32 there."""


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y>, in :func:`scalar_dtype`, the products too: those of finite float32 numbers may have no place in float32.

    Where float32 is all there is, the factors are divided by their largest before.
    """
    dtype = scalar_dtype(x.device)
    if dtype == torch.float64 or x.numel() == 0:
        return (x.to(dtype) * y.to(dtype)).sum()
    a, b = (torch.where((m := z.abs().amax()) > 0, m, 1.0) for z in (x, y))
    return ((x / a) * (y / b)).sum() * a * b


def one_minus_power(base: Any, exponent: Tensor) -> Tensor:
    """1 - base^exponent, without loss where it is small and float64 is not there."""
    if exponent.dtype == torch.float64 or isinstance(base, Tensor) or base == 0:
        return 1 - base**exponent
    return -torch.expm1(exponent * math.log(base))
