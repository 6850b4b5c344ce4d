"""Stochastic rounding of new weights to bfloat16, for parameters without a float32 master copy.

A bfloat16 number has 8 bits: to nearest, a change of less than 2^-9 of a weight is lost, in every step anew. Rounded
stochastically it is kept in the mean. (The twins: csrc/core/rounding.h and ``round_stochastically`` in
backends/triton/elements.py.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.masks import BITS, hashes, key_of, mix

OPS = {"perturb": 1, "step": 2}
"""What the ops that write new weights add to the key."""


class Rounding(NamedTuple):
    """Of a table's bfloat16 weights that have no master copy, by ``perturb`` and ``step``; everything else that is written
    is rounded to nearest.

    x becomes one of the two bfloat16 numbers around it: the one further from 0 with the probability
    (x - nearer) / (further - nearer), in steps of 2^-16, so that the mean is x (Gupta et al. 2015). Which one, a hash of
    (seed, op, step, row, element) decides: the same on every backend, for any number of threads, and after a checkpoint,
    as ``step`` is the row's own count of updates; replayed CUDA graphs count, too. Rows and elements are those of
    :class:`looksam_kernels.Mask`; of tables on several devices each device's rows are counted by themselves.
    """

    seed: int = 0
    """64 bits."""
    rows: Sequence[int] | None = None
    """The rows' numbers where the table is a part of another, whose rows are counted."""

    @property
    def key(self) -> int:
        """What the kernels need of the seed, 32 bits."""
        return key_of(0x7F4A7C15, self.seed, self.seed >> 32)

    def __call__(self, x: Tensor, op: Literal["perturb", "step"], updates: Tensor, row: int, w: Tensor) -> Tensor:
        """What w, of bfloat16, is to hold in place of x, which counts as float32; in float32.

        Args:
            updates: how many the row will have had with the one that is under way, 0-dim.
        """
        number = row if self.rows is None else self.rows[row]
        key = mix(mix(self.key ^ OPS[op]) ^ updates.to(w.device, torch.int64))
        bits = x.to(torch.float32).view(torch.int32).to(torch.int64) & BITS
        moved = bits + (hashes(key, number, w) >> 16) & 0xFFFF0000
        # The largest bfloat16 and beyond, infinite and NaN are left to rounding to nearest.
        kept = torch.where(bits & 0x7FFFFFFF >= 0x7F7F0000, bits, moved)
        return torch.where(kept > 0x7FFFFFFF, kept - 2**32, kept).to(torch.int32).view(torch.float32)
