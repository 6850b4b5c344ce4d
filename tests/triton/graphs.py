"""CUDA graphs without a GPU: what a capture records, and what its replay finds.

Tensors are on the CPU and kernels run in Triton's interpreter, but as on a GPU a capture runs no kernel and no torch
operation "on the device", a replay runs all of them with the memory of the capture, and memory from before the capture must
still be there. (Torch operations do run in a capture here, since their results are needed to go on: what they wrote is
found out of date by the first replay.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.graphs import Graphs
from looksam_kernels.backends.triton.launch import Launch

Node = tuple[Callable[..., Any], Any, Any, Any]
"""Function, arguments, keyword arguments, result."""


class Gpu:
    """Stands in for the device: knows the capture that is under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graph: Graph | None = None
        self.captured: list[Tensor] = []
        """All that was made in captures, which nothing outside may read."""
        self.page_locked: set[int] = set()
        """Written once, by the host, and not by a graph."""
        self._launch = Launch.__call__
        monkeypatch.setattr(Launch, "__call__", lambda launch, *arguments: self.launch(launch, *arguments))
        monkeypatch.setattr(gpu, "capturing", lambda device: self.graph is not None)
        reserve = Graphs.reserve

        def reserve_outside(graphs: Graphs, *arguments: Any) -> None:
            assert self.graph is None, "page-locked memory is asked for in a capture"
            reserve(graphs, *arguments)
            self.page_locked.add(graphs._room.untyped_storage().data_ptr())

        monkeypatch.setattr(Graphs, "reserve", reserve_outside)

    def launch(self, launch: Any, grid: Any, device: Any, *arguments: Any) -> None:
        if self.graph is not None:
            self.graph.record(self._launch, (launch, grid, device, *arguments), {}, None)
            return
        made = {id(x) for x in self.captured}
        assert not any(id(x) in made for x in tree_iter(arguments)), "an eager launch reads what a graph will write"
        self._launch(launch, grid, device, *arguments)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        self.graph = Graph(self)
        try:
            with self.graph:
                yield self.graph
        finally:
            self.graph = None


class Graph(TorchDispatchMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.nodes = gpu, list[Node]()
        self.own: dict[int, Tensor] = {}
        """Made in this capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(self.on_host(x) for x in tree_iter(result)):
            for x in tree_iter(result):
                if isinstance(x, Tensor) and not any(x is y for y in tree_iter(args)):
                    self.own[id(x)] = x
                    self.gpu.captured.append(x)
            self.record(func, args, kwargs or {}, result)
        return result

    def on_host(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.gpu.page_locked

    def record(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.nodes.append((function, *tree_map(self.remember, (args, kwargs)), result))

    def remember(self, x: Any) -> Any:
        """The graph keeps its own memory alive, and no other."""
        return weakref.ref(x) if isinstance(x, Tensor) and id(x) not in self.own else x

    def replay(self) -> None:
        for function, args, kwargs, result in self.nodes:
            again = function(*tree_map(recall, args), **tree_map(recall, kwargs))
            for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr() and old.shape == new.shape:
                    old.copy_(new)  # of another shape: a buffer that the next operation resizes and writes


def recall(x: Any) -> Any:
    if isinstance(x, weakref.ref):
        found = x()
        assert found is not None, "a graph reads memory that was given up"
        return found
    return x
