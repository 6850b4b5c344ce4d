"""Triton: for GPUs without a compiled extension, NVIDIA's and AMD's. The kernels stand in ``kernels``.

On a machine without a GPU the kernels run on CPU tensors in Triton's interpreter, for tests, and only when asked for.

Rows of the same element types, with the same columns present, form a *bucket*; each op is one to four launches a
bucket, after one copy of what has changed for the device: addresses and hyper-parameters. Rows that no kernel can walk
through (not dense, or laid out differently from column to column) take the reference. The coefficients are formulas.py,
made into a function of the kernel ``evaluate`` (:mod:`looksam_kernels.backends.triton.rules`).
"""

from __future__ import annotations

from torch import Tensor

from looksam_kernels.backends import native
from looksam_kernels.backends.triton.evaluation import coefficients, measure
from looksam_kernels.backends.triton.gpu import only_on_request, unavailable
from looksam_kernels.backends.triton.perturbation import perturb, restore
from looksam_kernels.backends.triton.reductions import sums
from looksam_kernels.backends.triton.update import step

__all__ = [
    "coefficients",
    "first_misfit",
    "measure",
    "only_on_request",
    "perturb",
    "restore",
    "step",
    "sums",
    "unavailable",
]


def first_misfit(tensors: list[Tensor | None], weights: list[Tensor | None], scalar: bool) -> int:
    compiled = native.compiled()
    return 0 if compiled is None else int(compiled.first_misfit(tensors, weights, scalar))
