"""Triton: for GPUs without a compiled extension, NVIDIA's and AMD's. The kernels stand in ``kernels``.

On a machine without a GPU the kernels run on CPU tensors in Triton's interpreter, for tests, and only when asked for.

Rows of the same element types, with the same columns present, form a *bucket*; each op is one to four launches a
bucket, after one copy of what has changed for the device: addresses and hyper-parameters. Rows that no kernel can walk
through (not dense, or laid out differently from column to column) take the reference. The coefficients are formulas.py,
made into a function of the kernel ``evaluate`` (:mod:`looksam_kernels.backends.triton.rules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from looksam_kernels.backends import native
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.evaluation import coefficients, measure
from looksam_kernels.backends.triton.gpu import only_on_request, unavailable
from looksam_kernels.backends.triton.handle import handle_of
from looksam_kernels.backends.triton.perturbation import perturb, restore
from looksam_kernels.backends.triton.reductions import sums
from looksam_kernels.backends.triton.update import step
from looksam_kernels.table import TensorTable, all_fit

__all__ = [
    "coefficients",
    "first_misfit",
    "forget",
    "measure",
    "only_on_request",
    "perturb",
    "restore",
    "step",
    "sums",
    "take_gradients",
    "unavailable",
]


def take_gradients(table: TensorTable, column: str, params: Sequence[Tensor]) -> Any:
    """Not in a capture, whose columns are its own."""
    if gpu.capturing(table.device):
        return None
    return handle_of(table).take(column, params, table["w"])


def forget(table: TensorTable, column: str) -> None:
    """Gradients that were taken."""
    handle_of(table).release(column)


def first_misfit(tensors: list[Tensor | None], weights: list[Tensor | None], scalar: bool) -> int:
    compiled = native.compiled()
    if compiled is None:
        return -1 if all_fit(tensors, weights, scalar) else 0
    return int(compiled.first_misfit(tensors, weights, scalar))
