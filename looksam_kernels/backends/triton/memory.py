"""Memory on the device, and what it takes to write it without waiting: streams, captures, copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.graphs import Graphs


class Memory:
    """What is on the device is not written again: new numbers get new memory, and a graph holds on to the old."""

    def __init__(self, device: torch.device, graphs: Graphs) -> None:
        self.device, self.graphs = device, graphs
        self.capturing = False
        """Is the op under way being captured?"""
        self.stream: Any = None
        self.plain = True
        """Is neither a capture under way nor more than one stream in use?"""
        self.streams: set[Any] = set()
        """On which ops ran: memory belongs to one, and may be given up while another still reads it."""
        self.copies: OrderedDict[Any, Tensor] = OrderedDict()
        self._scratch: dict[Any, Tensor] = {}

    def begin(self, capturing: bool) -> None:
        """An op."""
        self.capturing = capturing
        self.stream = gpu.stream(self.device)
        self.streams.add(self.stream)
        self.plain = not capturing and len(self.streams) == 1

    def read(self, *kept: Tensor) -> None:
        """The op under way reads memory that may be given up before it has run."""
        if self.plain:
            return
        for x in kept:
            if self.capturing:
                self.graphs.hold(x)
            else:
                x.record_stream(self.stream)

    def on_device(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers on the device, sent when they change."""
        key = (dtype, tuple(values))
        if key in self.copies:
            self.read(self.copies[key])
            return self.copies[key]
        copy = self.send(torch.tensor(values, dtype=dtype))
        if not self.capturing:
            self.copies[key] = copy
            forget_oldest(self.copies)
        return copy

    def scratch(self, name: str, *shape: int) -> Tensor:
        """float64 memory that nothing reads after the op: where all ops follow each other in one stream, the same again."""
        if not self.plain:
            return torch.empty(shape, dtype=torch.float64, device=self.device)
        key = (name, shape)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=torch.float64, device=self.device)
        return self._scratch[key]

    def send(self, x: Tensor) -> Tensor:
        """A copy on the device, without waiting for it."""
        if self.capturing:
            return self.graphs.send(x, self.device)
        return x if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)


def forget_oldest(kept: OrderedDict[Any, Any], limit: int = 64) -> None:
    if len(kept) > limit:
        kept.popitem(last=False)
