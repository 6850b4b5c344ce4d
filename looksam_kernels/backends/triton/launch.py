"""Launches, prepared for their constexprs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.tuning import compiler_options


class Launch:
    """A kernel with its constexprs, and what the compiler has made of them: looked up at the first launch, not at every one."""

    def __init__(self, kernel: Any, **constexprs: Any) -> None:
        self.kernel, self.constexprs = kernel, constexprs
        self.compiled: dict[Any, Any] = {}
        """By device and by the types of the arguments."""
        names = [] if _is_interpreted(kernel) else [p.name for p in kernel.params if p.is_constexpr]
        self.trailing = tuple(constexprs[name] for name in names)

    def __call__(self, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
        if 0 in grid:
            return
        if device.type == "cpu":
            self._run(grid, device, arguments)
        else:
            with torch.get_device_module(device).device(device):
                self._run(grid, device, arguments)

    def _run(self, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...]) -> None:
        if _is_interpreted(self.kernel):
            self.kernel[grid](*arguments, **self.constexprs)
            return
        key = (device, *[x.dtype if isinstance(x, Tensor) else type(x) for x in arguments])
        if key in self.compiled:
            self.compiled[key][(*grid, 1, 1)[:3]](*arguments, *self.trailing)
            return
        options = self.constexprs | compiler_options(gpu.target(device))
        if gpu.capturing(device) and not _is_loaded(self.kernel, *arguments, **options):
            name = self.kernel.fn.__name__
            raise RuntimeError(f"the Triton kernel {name!r} would be loaded in a capture: {gpu.WARM_UP}")
        self.compiled[key] = self.kernel[grid](*arguments, **options)


def _is_interpreted(kernel: Any) -> bool:
    return not hasattr(kernel, "device_caches")


def _is_loaded(kernel: Any, *arguments: Any, **constexprs: Any) -> bool:
    """Is it on the current device? The driver loads a kernel at its first launch, and refuses to in a capture."""
    return kernel.warmup(*arguments, grid=(1,), **constexprs).module is not None
