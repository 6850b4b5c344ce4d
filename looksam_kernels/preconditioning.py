"""Preconditioned ascent: the factor T of a base's own preconditioner, in place of ASAM's.

T = 1 / (sqrt(v') + eps) of each element, where v' is the base's second moment as a step with g would make it: for Adam
v' = (beta2 v + (1 - beta2) g^2) / (1 - beta2^t), t the update that this would be. Zhang, Li & Giannakis 2025, with the
preconditioner of Kingma & Ba 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.numbers import one_minus_power, scalar_dtype
from looksam_kernels.updates import BASES, Scalars, hyper_of, own

if TYPE_CHECKING:
    from looksam_kernels.table import TensorTable


class Preconditioner(NamedTuple):
    """T of every element, for :func:`looksam_kernels.sums` and :func:`looksam_kernels.perturb`."""

    column: str
    """The state that holds v."""
    numbers: Tensor
    """Float64 [4, rows], on the table's device: the factors of v and of g^2 in v' (the second with the loss scale that g
    contains taken out), what the root of v' is multiplied by, and eps."""

    def of_rows(self, rows: Sequence[int], device: torch.device) -> Preconditioner:
        """Row by row: a list of numbers as an index is copied to the device, and waits for it."""
        return self._replace(numbers=torch.stack([self.numbers[:, row] for row in rows], -1).to(device))

    def root(self, row: int, g: Tensor, v: Tensor) -> Tensor:
        """1 / T of a row."""
        of_v, of_g, correction, eps = self.numbers[:, row].to(g.device, g.dtype)
        return (of_v * v + of_g * g * g).sqrt() * correction + eps


def over(x: Tensor, root: Tensor) -> Tensor:
    """T x; 0 where the root is, as g and v are 0 there. (-0.0, which changes no bit of what it is added to.)"""
    return torch.where(root > 0, x / root, -0.0)


def preconditioner(
    table: TensorTable, base: str, groups: Sequence[Scalars], grad_scale: Tensor | None = None
) -> Preconditioner:
    """That of a base for the gradients in the column ``g``.

    Args:
        groups: the base's hyper-parameters of each group by name, as of :func:`looksam_kernels.step`.
        grad_scale: the loss scale that g contains.

    Raises:
        ValueError: the base has no second moment, or a row with a g lacks the state that holds it.
    """
    moment = BASES[base].second_moment if base in BASES else None
    if moment is None:
        raise ValueError(f"base {base!r} has no second moment; those that have one: {', '.join(with_second_moment())}")
    if not table.is_full(moment.state):
        for row, (takes_part, there) in enumerate(zip(table.present("g"), table.present(moment.state), strict=True)):
            if takes_part and not there:
                raise ValueError(f"row {row} takes part, but column {moment.state!r} has no tensor for it")
    counts = _counts(table) + 1
    inv_scale = 1.0 if grad_scale is None else 1 / grad_scale.to(counts).reshape(())
    parts, first = [], 0
    for group, rows in groupby(table.group):  # numbers that are the same in all rows are filled in on the device
        last = first + len([*rows])
        count, h = counts[first:last], groups[group]
        decay = 1.0 if moment.decay is None else hyper_of(h, moment.decay)
        new = 1.0 if moment.decay is None else 1 - decay
        corrects = own(h, "bias_correction") if "bias_correction" in BASES[base].hyper else moment.corrected
        numbers = (decay, new * inv_scale**2, one_minus_power(decay, count).rsqrt() if corrects else 1.0, own(h, "eps"))
        parts.append(torch.stack([_filled(count, x) for x in numbers]))
        first = last
    return Preconditioner(moment.state, torch.cat(parts, 1) if parts else counts.new_zeros(4, 0))


def _filled(like: Tensor, x: Any) -> Tensor:
    return x.to(like).expand_as(like) if isinstance(x, Tensor) else torch.full_like(like, x)


def with_second_moment() -> list[str]:
    """The names of the bases that have one."""
    return [name for name, base in BASES.items() if base.second_moment is not None]


def _counts(table: TensorTable) -> Tensor:
    """How many updates each row has had; 0 in rows without a count."""
    dtype, device = scalar_dtype(table.device), table.device
    counts = table["step"]
    if not (counts and table.is_full("step") and all(x.dtype == torch.float32 and x.device == device for x in counts)):
        zero = torch.zeros((), device=device)
        counts = [zero if x is None else x.to(device, torch.float32) for x in counts]
    return torch.stack(counts).to(dtype) if counts else torch.zeros(0, dtype=dtype, device=device)
