"""float32 masters of float16 and bfloat16 parameters, for parameters that others write too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NOT_FLOAT16 = (
    "rounding is for bfloat16 parameters, and one is of float16: convert it to bfloat16, or leave rounding out, for a float32 "
    "master copy"
)


def needs_master(p: Tensor, rounding: str | None) -> bool:
    """Would the parameter's own precision round small updates and perturbations away? Not if its ``rounding`` is chosen.

    Raises:
        ValueError: a rounding of a float16 parameter.
    """
    if rounding is not None and p.dtype == torch.float16:
        raise ValueError(NOT_FLOAT16)
    return p.dtype not in (torch.float32, torch.float64) and rounding is None


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
