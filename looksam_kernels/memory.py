"""Tensors that stand for numbers which cannot be read: of FakeTensorMode, of functorch, of subclasses that wrap others."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def address(x: Tensor) -> int:
    """Where the elements begin; 0 where there are none in memory."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(x, fake.FakeTensor):
        return 0  # torch warns of the question
    try:
        return x.data_ptr()
    except RuntimeError:  # functorch: there is no storage
        return 0


def readable(tensors: Iterable[Tensor]) -> bool:
    """Can compiled code read and write them all? Not while operations are recorded, either (``make_fx``): it would not be
    seen."""
    return not _records() and all(address(x) != 0 or x.numel() == 0 or _is_released(x) for x in tensors)


def _is_released(x: Tensor) -> bool:
    """A plain tensor whose storage has been emptied. torch's own operations crash on it, ours have an error."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type == "meta" or torch._is_functional_tensor(x):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _records() -> bool:
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FUNCTIONAL))
