"""The sizes of a program, by the GPU's architecture: one table.

Chosen by what can be counted without a GPU (``tests/triton/launches.py`` compiles every launch, with these sizes or others): no
kernel spills registers, and full chunks are read and written in 16-byte words. Which of the sizes that fulfil this is the
fastest has to be measured on the GPU, and has not been: ``python -m benchmarks.tuning`` does it, and prints the line for the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Tuning(NamedTuple):
    chunk: int = 2048
    """Elements of a program of the kernels that walk through columns, a power of two."""
    threads: int = 256
    """Of a program of any kernel."""
    registers: int | None = None
    """The most that a thread may have, for compilers that can be told so."""

    @property
    def width(self) -> int:
        """Elements of a thread: with 8, one 16-byte word of bfloat16, two of float32."""
        return self.chunk // self.threads


NVIDIA = Tuning(registers=128)
"""Said outright, the limit of 128 registers, with which two programs share a processor, is one that ptxas fits into; its own is
the same, but there Adan on bfloat16 spills with Triton 3.8."""
DEFAULT = {"cuda": NVIDIA}
"""By the name of Triton's backend, for architectures that are not in the table: cuda, hip (AMD) or xpu (Intel)."""
TABLE = {
    ("cuda", 80): NVIDIA,
    ("cuda", 90): NVIDIA,
    ("cuda", 100): NVIDIA,
    ("cuda", 120): NVIDIA,
    ("hip", "gfx90a"): Tuning(),
    ("hip", "gfx942"): Tuning(),
}
ROWS_BLOCK = 128
"""Rows of a program of ``advance``."""
RULE_BLOCK = 512
"""Rows that ``evaluate`` takes at a time."""

_forced: Tuning | None = None


def tuning_of(target: Any) -> Tuning:
    """
    Args:
        target: Triton's, with ``backend`` and ``arch``; ``None``: the interpreter.
    """
    if _forced is not None:
        return _forced
    if target is None:
        return Tuning()
    return TABLE.get((target.backend, target.arch)) or DEFAULT.get(target.backend, Tuning())


@contextmanager
def use_tuning(tuning: Tuning) -> Iterator[None]:
    """These sizes for all tables whose first op is in the block, to measure them."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


def compiler_options(target: Any) -> dict[str, int]:
    """What Triton's compiler is told: also the number of registers where it has such an option."""
    tuning = tuning_of(target)
    options = {"num_warps": tuning.threads // target.warp_size}
    if tuning.registers is not None and target.backend == "cuda":
        options["maxnreg"] = tuning.registers
    return options
