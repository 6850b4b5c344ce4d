"""What captured CUDA graphs read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Graphs:
    """What captured CUDA graphs of a table read when they are replayed. They do not say when they end: it is kept as long as
    the table. A graph that is captured again, from the same tensors, needs nothing more."""

    COLUMNS = 64
    """Columns of addresses that captures may lack before the next eager op; besides, the places of all chunks."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._sources: dict[Any, Tensor] = {}
        """Page-locked numbers that a copy within a graph reads."""
        self._room = torch.empty(0, dtype=torch.uint8)

    def hold(self, x: Tensor) -> None:
        """Something that an eager op has put on the device, where it is never written again."""
        self._held[x.data_ptr()] = x

    def reserve(self, size: int, device: torch.device) -> None:
        """At least half as many bytes of page-locked memory, which torch before 2.8 does not allocate in a capture."""
        if len(self._room) < size // 2:
            self._room = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")

    def send(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy on the device that is made anew in every replay."""
        key = (x.dtype, x.shape, tuple(x.flatten().tolist()))
        if key not in self._sources:
            size = x.numel() * x.element_size()
            if size > len(self._room):
                raise RuntimeError(
                    f"the graphs captured since the last eager step read {size} bytes more of addresses than the Triton "
                    "backend has page-locked memory for; take an eager step between captures"
                )
            self._sources[key] = self._room[:size].view(x.dtype).view(x.shape).copy_(x)
            self._room = self._room[-(-size // 8) * 8 :]
        return self._sources[key].to(device, non_blocking=True, copy=True)
