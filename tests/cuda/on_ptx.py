"""A pytest plugin: the launches of the native backend's CPU tensors, by the CUDA binding, executed from nvcc's PTX."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from . import on_harness
from .machine import Machine
from .ptx import Module

Launched = Callable[[str, Machine], None]


class Kernels:
    """Every kernel in some PTX files, by the name that it has in C++."""

    def __init__(self, files: list[Path]) -> None:
        self._of: dict[str, tuple[Module, str]] = {}
        for path in files:
            module = Module(path.read_text())
            mangled = list(module)
            filtered = subprocess.run(
                ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for name, symbol in zip(filtered, mangled, strict=True):  # void looksam::cuda::kernel<...>(...)
                self._of[_plain(name.removeprefix("void ").rsplit("(", 1)[0])] = (module, symbol)
        self._draws = random.Random(0)
        self.watcher: Launched | None = None
        """Called after each launch."""

    def __call__(self, name: str, blocks: int, arguments: bytes) -> None:
        module, symbol = self._of[_plain(name)]
        machine = Machine(module[symbol], blocks, arguments, self._draws)
        machine.run()
        if self.watcher is not None:
            self.watcher(name, machine)


def _plain(name: str) -> str:
    """Demanglers differ in their spaces, and in what they write behind numbers."""
    return name.replace(" ", "").replace("ul>", ">")


KERNELS = Kernels([Path(name) for name in os.environ["LOOKSAM_PTX"].split(os.pathsep)])
on_harness.native._C.run_launches_with(KERNELS)
