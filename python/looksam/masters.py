"""float32 masters of float16 and bfloat16 parameters, for parameters that others write too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def needs_master(p: Tensor) -> bool:
    """Would the parameter's own precision round small updates and perturbations away?"""
    return p.dtype not in (torch.float32, torch.float64)


class Masters:
    """Keeps masters in step with their parameters.

    A master is what the updates read and write; the parameter is its rounding. When other code has written the
    parameter (a checkpoint was loaded, an average copied in), the master takes over the new value wherever it no longer
    rounds to it. Loading a checkpoint into model and optimizer, in either order, therefore keeps the exact master.

    Args:
        rows: (the parameter, its local tensor, its master).
    """

    def __init__(self, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._rows = list(rows)
        self._versions: Sequence[int] | None = None

    def follow(self) -> None:
        """To be called when the gradients are computed, before anything moves."""
        if not self._rows or self._now() == self._versions:
            return
        for _, p, master in self._rows:
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))

    def written(self) -> None:
        """To be called after our own writes."""
        if self._rows:
            self._versions = self._now()

    def _now(self) -> Sequence[int]:
        return [p._version for p, _, _ in self._rows]
