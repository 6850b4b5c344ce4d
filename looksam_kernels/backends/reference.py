"""The ops in the plainest PyTorch, row by row: runs on every device and in float64, and is the oracle of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from looksam_kernels import formulas
from looksam_kernels.backends import Adaptive
from looksam_kernels.formulas import Coefficients, Groups, Hyper, Pair, Scaling, Sums, kept_norm, stretched
from looksam_kernels.masks import Mask
from looksam_kernels.numbers import dot, scalar_dtype
from looksam_kernels.preconditioning import Preconditioner, over
from looksam_kernels.table import TensorTable
from looksam_kernels.updates import BASES, own

Scalars = Mapping[str, Any]


def unavailable(device: torch.device) -> str | None:
    return None


def sums(table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums:
    values = torch.zeros(len(pairs), len(table), dtype=scalar_dtype(table.device), device=table.device)
    for i, (x, y) in enumerate(pairs):
        for row in range(len(table)):
            values[i, row] = _inner_product(table, row, x, y, adaptive)
    return Sums(tuple(pairs), values)


def _inner_product(table: TensorTable, row: int, x: str, y: str, adaptive: Adaptive) -> Tensor | float:
    if (kept := kept_norm((x, y))) is not None:
        norm_sq = table[kept][row]
        return 0.0 if norm_sq is None or table["g"][row] is None else norm_sq.to(table.device)
    a, b = (_column(table, name, row, adaptive) for name in (x, y))
    return 0.0 if a is None or b is None else dot(a, b).to(table.device)


def _column(table: TensorTable, name: str, row: int, adaptive: Adaptive) -> Tensor | None:
    x = table[stretched(name) or name][row]
    if x is None:
        return None
    x = x.to(table.arithmetic(row))
    return _stretch(table, row, adaptive, x) if stretched(name) else x


def coefficients(
    table: TensorTable,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    return evaluate(rule, sums, Hyper(groups, table.group, table.device, scaling.grad_scale), scaling)


def evaluate(rule: str, sums: Sums, hyper: Hyper, scaling: Scaling) -> Coefficients:
    bad = (~sums.values.isfinite().all()).to(torch.float32)
    if scaling.found_inf is not None:
        bad = torch.maximum(bad, scaling.found_inf.to(bad.device).reshape(()))
    return formulas.evaluate(rule, sums, hyper, bad, scaling)


def perturb(
    table: TensorTable,
    coefficients: Coefficients,
    adaptive: Adaptive,
    mask: Mask | None,
    numbers: Sequence[int] | None = None,
) -> None:
    """``numbers``: the rows' numbers where the table is a part of another, which the mask counts."""
    rounding = table.rounding
    for row, x in enumerate(table[coefficients.inputs[0]]):
        if x is None:
            continue
        w, b = table["w"][row], table["b"][row]
        e = _combine(table, row, coefficients.inputs, coefficients.d)
        e = _stretch(table, row, adaptive, e, for_e=True)
        if not (table.has_master(row) or table.perturbed[row]):
            b.copy_(w)
        if mask is not None:
            e = torch.where(mask.row(row if numbers is None else numbers[row], w), e, -0.0)  # b + -0.0 has b's bits
        moved = b + e
        if rounding is not None and table.rounds_stochastically(row):
            moved = rounding(moved, "perturb", table["step"][row] + 1, row, w)
        w.copy_(torch.where((coefficients.d[:, row] != 0).any().to(w.device), moved, b))
        table.perturbed[row] = True


def restore(table: TensorTable) -> None:
    for row, moved in enumerate(table.perturbed):
        if moved:
            table["w"][row].copy_(table["b"][row])


def step(table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
    first, *_ = coefficients.inputs
    for row in range(len(table)):
        if table[first][row] is not None:
            _step_row(table, row, base, coefficients, groups[table.group[row]])
        elif table.perturbed[row]:
            table["w"][row].copy_(table["b"][row])


def _step_row(table: TensorTable, row: int, base: str, coefficients: Coefficients, group: Scalars) -> None:
    w = table["w"][row]
    origin = table["b"][row] if table.perturbed[row] or table.has_master(row) else w.clone()
    keep = coefficients.found_inf.to(w.device) > 0

    def commit(old: Tensor | None, new: Tensor) -> None:
        if old is not None:
            old.copy_(torch.where(keep, old, new.to(old.dtype)))

    # Before anything is written: what is written may be one of the inputs.
    d = _combine(table, row, coefficients.inputs, coefficients.d)
    post = None if coefficients.post is None else _combine(table, row, coefficients.inputs, coefficients.post)
    if coefficients.q is not None:
        q = _combine(table, row, coefficients.inputs, coefficients.q)
        commit(table[coefficients.writes][row], q)
        commit(table[f"{coefficients.writes}_norm_sq"][row], dot(q, q))

    update = BASES[base].update
    if update is None:
        commit(table[coefficients.inputs[0]][row], d)
        w.copy_(origin)
        return

    if coefficients.trust is not None:
        group = {**group, "base.weight_decay": own(group, "weight_decay") * coefficients.trust[row].to(w.device)}
    count = table["step"][row] + 1
    states = ((name, table[name][row]) for name in BASES[base].states)
    state: dict[str, Any] = {name: x if x is None else x.to(d.dtype) for name, x in states}
    new_w, new_state = update(origin.to(d.dtype), d, state, count.to(scalar_dtype(count.device)), group)
    if post is not None:
        new_w = new_w + post
    if table.rounding is not None and table.rounds_stochastically(row):
        new_w = table.rounding(new_w, "step", count, row, w)
    w.copy_(torch.where(keep, origin, new_w))
    if table.has_master(row):
        commit(origin, new_w)
    for name, new in new_state.items():
        commit(table[name][row], new)
    commit(table["step"][row], count)


def _combine(table: TensorTable, row: int, inputs: Sequence[str], coefficients: Tensor) -> Tensor:
    """sum_i c_i x_i; an input that is absent counts as 0."""
    dtype = table.arithmetic(row)
    total = torch.zeros_like(table["w"][row], dtype=dtype)
    for i, name in enumerate(inputs):
        x = table[name][row]
        if x is not None:
            c = coefficients[i, row].to(x.device, dtype)
            total = total + torch.where(c != 0, c * x.to(dtype), 0.0)
    return total


def _stretch(table: TensorTable, row: int, adaptive: Adaptive, x: Tensor, for_e: bool = False) -> Tensor:
    """T x of one row; for e ASAM's T^2 x, but a preconditioner's T x."""
    if isinstance(adaptive, Preconditioner):
        g, v = (table[name][row] for name in ("g", adaptive.column))
        return x if g is None or v is None else over(x, adaptive.root(row, g.to(x.dtype), v.to(x.dtype)))
    eta = adaptive[row] if adaptive is not None else None
    t = 1.0 if eta is None else table["w"][row].to(x.dtype).abs() + eta
    return (t * t if for_e else t) * x
