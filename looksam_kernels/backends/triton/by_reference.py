"""Rows that no kernel can walk through take the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from looksam_kernels.formulas import Coefficients
from looksam_kernels.table import TensorTable


def elsewhere(table: TensorTable, rows: list[int], op: Callable[[TensorTable, list[int]], None]) -> None:
    """Does an op on rows that no kernel walks through: by the reference, in a table of their own."""
    if rows:
        columns: dict[str, Any] = {name: [table[name][row] for row in rows] for name in table}
        rounding = table.rounding and table.rounding._replace(rows=rows)
        group = [table.group[row] for row in rows]
        part = TensorTable(group=group, backend="reference", rounding=rounding, **columns)
        part.perturbed = [table.perturbed[row] for row in rows]
        op(part, rows)


def of_rows(c: Coefficients, rows: list[int]) -> Coefficients:
    """Row by row: a list of numbers as an index is copied to the device, and waits for it."""

    def chosen(x: Tensor) -> Tensor:
        return torch.stack([x[..., row] for row in rows], -1)

    q, post, trust = (None if x is None else chosen(x) for x in (c.q, c.post, c.trust))
    return c._replace(d=chosen(c.d), q=q, post=post, trust=trust)
