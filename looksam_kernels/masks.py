"""Random element masks that are computed where they are used, from a counter: no state, no memory traffic.

A kernel asks for element i of row p and gets the same bit on every backend, device and instruction set, whatever the
number of threads. (The twins: csrc/core/masks.h and ``keeps`` in backends/triton/elements.py.)
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)
"""32 bits: an int, or the elements of an int64 tensor."""

BITS = 0xFFFFFFFF


class Mask(NamedTuple):
    """b ~ Bernoulli(keep), independent for each element, row, draw and seed.

    Element i of row p is kept where hash(seed, draw, p, i) < 2^32 keep; i counts the row's elements in their order in
    memory (of parameters that are not dense: in the order of their indices). With tensors sharded over ranks, i counts the
    elements of the rank's own shard.
    """

    keep: float
    """In (0, 1)."""
    seed: int = 0
    """64 bits."""
    draw: int = 0
    """Which mask of the seed's, 32 bits."""

    @property
    def threshold(self) -> int:
        """2^32 keep, of 32 bits."""
        return min(max(round(self.keep * 2.0**32), 1), BITS)

    @property
    def key(self) -> int:
        """What the kernels need of seed and draw, 32 bits."""
        return key_of(0x9E3779B9, self.seed, self.seed >> 32, self.draw)

    def row(self, row: int, w: Tensor) -> Tensor:
        """The bits of a row, bool, in the shape and memory order of its parameter w."""
        return hashes(self.key, row, w) < self.threshold


def key_of(start: int, *words: int) -> int:
    """32 bits of so many words, of each the lowest 32 bits. ``start`` is another for every purpose."""
    key = start
    for word in words:
        key = mix(key ^ (word & BITS))
    return key


def hashes(key: Word, row: int, w: Tensor) -> Tensor:
    """A word for each element of a row, int64, in the shape and memory order of its parameter w."""
    index = torch.empty_like(w, dtype=torch.int64)  # in w's order if w is dense
    if index.stride() != w.stride():
        index = torch.empty(w.shape, dtype=torch.int64, device=w.device)
    index.as_strided((w.numel(),), (1,)).copy_(torch.arange(w.numel(), device=w.device))
    here = mix(mix(key ^ row) ^ (index >> 32))
    return mix(mix(index & BITS ^ here) + here & BITS)


def mix(x: Word) -> Word:
    """A bijection of 32 bits of which every bit depends on every other: the finaliser "lowbias32" (Wellons 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & BITS
    x = (x ^ (x >> 15)) * 0x846CA68B & BITS
    return x ^ (x >> 16)
