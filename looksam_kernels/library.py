"""The ops as ``torch.library`` operators on lists of tensors, for ``torch.compile`` and ``torch.export``.

``torch.ops.looksam.sums``, ``perturb_``, ``restore_``, and for every fused base ``sgd_``, ``adamw_``, ...: the same
backends as :mod:`looksam_kernels.ops`, for callers that hold plain lists and one coefficient a tensor. They build a table
in each call; who steps often keeps a :class:`looksam_kernels.TensorTable`.

A base's operator takes w, its states, the update counts, the gradients g, the second input q with its coefficients c, and
then lr and the hyper-parameters of :data:`looksam_kernels.updates.BASES` in that order::

    torch.ops.looksam.adamw_(w, exp_avg, exp_avg_sq, step, g, q, c, lr, weight_decay, beta1, beta2, eps)

``lars_`` takes LARS's trust ratios, one a tensor, after c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from looksam_kernels import ops
from looksam_kernels.formulas import Coefficients
from looksam_kernels.table import TensorTable
from looksam_kernels.updates import BASES, FLAGS, Base, group_of


@custom_op("looksam::sums", mutates_args=())
def sums(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """<x_p, y_p> of each tensor; float64, shape [tensors]."""
    table = TensorTable(x, g=x, s=y)
    return ops.sums(table, [("g", "s")]).values[0].clone()


@sums.register_fake
def _(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(x), dtype=torch.float64, device=x[0].device if x else "cpu")


@custom_op("looksam::perturb_", mutates_args=("w", "backup"))
def perturb_(w: Sequence[Tensor], backup: Sequence[Tensor], g: Sequence[Tensor], c: Tensor) -> None:
    """backup <- w, w <- w + c_p g_p.

    Args:
        c: shape [tensors].
    """
    ops.perturb(TensorTable(w, device=c.device, b=backup, g=g), _coefficients(("g",), c.reshape(1, -1)))


@custom_op("looksam::restore_", mutates_args=("w",))
def restore_(w: Sequence[Tensor], backup: Sequence[Tensor]) -> None:
    """w <- backup, bit for bit."""
    table = TensorTable(w, b=backup)
    table.perturbed = [True] * len(table)
    ops.restore(table)


def _define(name: str, base: Base) -> Any:
    """``looksam::<name>_``: the base update with d_p = g_p + c_p q_p, for LARS r_p times that; formula:
    :func:`looksam_kernels.step`. Of a state that the hyper-parameters do without the list may be empty."""
    lists = ("w", *base.states, "step", "g", "q")
    written = ("w", *base.states, "step")
    ratio = ("trust",) if base.takes_trust_ratio else ()
    schema = [
        *(f"Tensor({chr(ord('a') + i)}!)[] {x}" for i, x in enumerate(written)),
        *("Tensor[] g", "Tensor[] q", "Tensor c"),
        *(f"Tensor {x}" for x in ratio),
        *(f"{'bool' if x in FLAGS else 'float'} {x}" for x in base.read),
    ]

    def update(*arguments: Any) -> None:
        columns, (c, *values) = dict(zip(lists, arguments, strict=False)), arguments[len(lists) :]
        trust = values.pop(0).to(torch.float64) if ratio else None
        d = torch.stack([torch.ones_like(c), c]).to(torch.float64)
        found = _coefficients(("g", "q"), d if trust is None else d * trust)._replace(trust=trust)
        table = TensorTable(device=c.device, **{column: x for column, x in columns.items() if x or column == "w"})
        ops.step(table, name, found, [group_of(base, values)])

    op = custom_op(f"looksam::{name}_", update, mutates_args=written, schema=f"({', '.join(schema)}) -> ()")
    op.register_fake(lambda *_: None)
    return op


def _coefficients(inputs: tuple[str, ...], d: Tensor) -> Coefficients:
    return Coefficients(inputs, d.to(torch.float64), None, torch.zeros((), device=d.device))


BASE_OPS = {name: _define(name, base) for name, base in BASES.items() if base.update is not None}
for _op in (perturb_, restore_):
    _op.register_fake(lambda *_: None)
