"""Rows on several devices: a table for each device, and one step over all of them.

Each device's rows are a part, with a table of their own and the backend that runs there. The sums of all parts come together
on the device of the first row, where the rule makes the coefficients of all rows, so norms are joint; each part then
gets the coefficients of its rows. Copies between GPUs are in the order of their streams. The host
waits for them only where some rows are on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels import table as tables
from looksam_kernels.backends import Adaptive, Backend, name_of, of_rows, reference
from looksam_kernels.formulas import Coefficients, Groups, Pair, Scaling, Sums
from looksam_kernels.masks import Mask
from looksam_kernels.table import TensorTable


class _Part(NamedTuple):
    """The rows of one device."""

    rows: list[int]
    places: Tensor
    """The same numbers, on the device of the whole table's first row."""
    table: TensorTable

    def of(self, c: Coefficients) -> Coefficients:
        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(-1, self.places).to(self.table.device)

        d = c.d.index_select(-1, self.places).to(self.table.device)
        found_inf = c.found_inf.to(self.table.device)
        return c._replace(d=d, q=of_rows(c.q), found_inf=found_inf, post=of_rows(c.post), trust=of_rows(c.trust))

    def adaptive(self, adaptive: Adaptive) -> Adaptive:
        return of_rows(adaptive, self.rows, self.table.device)

    def groups(self, groups: Groups) -> Groups:
        """With lr on this device, where it is a tensor on one."""
        return [{**group, "lr": _to(group.get("lr"), self.table.device)} for group in groups]


class _Parts(NamedTuple):
    """What a whole table keeps."""

    parts: list[_Part]
    order: Tensor
    """Where each row is among the parts' rows."""
    scalars: TensorTable
    """All rows, without elements, on the device of the first: there the rules are evaluated."""


class Split:
    """A backend (see :mod:`looksam_kernels.backends`) made of those of several devices."""

    def __init__(self, backend_of: Mapping[torch.device, Backend]) -> None:
        self._backend_of = dict(backend_of)
        names = [name_of(module) for module in self._backend_of.values()]
        self.__name__ = " and ".join(dict.fromkeys(names))
        for module in self._backend_of.values():
            if hasattr(module, "first_misfit"):
                self.first_misfit = module.first_misfit

    def unavailable(self, device: torch.device) -> str | None:
        return None if device in self._backend_of else f"there is no backend for {device} in it"

    def sums(self, table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums:
        parts, order, _ = self._parts(table)
        found = [part.table.backend.sums(part.table, pairs, part.adaptive(adaptive)).values for part in parts]
        return Sums(tuple(pairs), torch.cat([x.to(table.device) for x in found], dim=1).index_select(1, order))

    def coefficients(
        self,
        table: TensorTable,
        rule: str,
        sums: Sums,
        groups: Groups,
        scaling: Scaling,
    ) -> Coefficients:
        scalars = self._parts(table).scalars
        sums = Sums(sums.pairs, sums.values.to(table.device))
        here = {name: _to(getattr(scaling, name), table.device) for name in ("grad_scale", "found_inf")}
        return scalars.backend.coefficients(scalars, rule, sums, groups, scaling._replace(**here))

    def perturb(self, table: TensorTable, coefficients: Coefficients, adaptive: Adaptive, mask: Mask | None) -> None:
        for part in self._parts(table).parts:
            c, eta = part.of(coefficients), part.adaptive(adaptive)
            if mask is None:
                part.table.backend.perturb(part.table, c, eta, None)
            else:  # it counts the rows of the whole table, which the reference alone can be told
                reference.perturb(part.table, c, eta, mask, part.rows)
            for row, moved in zip(part.rows, part.table.perturbed, strict=True):
                table.perturbed[row] = moved

    def step(self, table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
        for part in self._parts(table).parts:
            part.table.backend.step(part.table, base, part.of(coefficients), part.groups(groups))

    def restore(self, table: TensorTable) -> None:
        for part in self._parts(table).parts:
            part.table.backend.restore(part.table)

    def forget(self, table: TensorTable, column: str) -> None:
        """The parts hold tensors, too."""
        if table.handle is not None:
            for part in table.handle.parts:
                part.table.drop(column)
            table.dirty.discard(column)

    def _parts(self, table: TensorTable) -> _Parts:
        """With the columns that were set since the last op, and the rows that are perturbed now."""
        if table.handle is None:
            table.handle = self._divided(table)
        parts: _Parts = table.handle
        for part in parts.parts:
            for name in table.dirty:
                if name in table:
                    part.table[name] = [table[name][row] for row in part.rows]
                else:
                    part.table.drop(name)
            part.table.perturbed = [table.perturbed[row] for row in part.rows]
        table.dirty.clear()
        return parts

    def _divided(self, table: TensorTable) -> _Parts:
        rows_of: dict[torch.device, list[int]] = {device: [] for device in self._backend_of}
        for row, w in enumerate(table["w"]):
            rows_of[tables.device_of(w)].append(row)

        def numbers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=table.device)

        parts = []
        for device, rows in rows_of.items():
            weights, groups = [table["w"][row] for row in rows], [table.group[row] for row in rows]
            parts.append(
                _Part(
                    rows,
                    numbers(rows),
                    TensorTable(weights, groups, backend=name_of(self._backend_of[device]), rounding=table.rounding),
                )
            )
        together = [row for part in parts for row in part.rows]
        order = numbers([together.index(row) for row in range(len(table))])
        nothing: list[Any] = [torch.empty(0, device=table.device)] * len(table)
        scalars = TensorTable(nothing, table.group, backend=name_of(self._backend_of[table.device]))
        return _Parts(parts, order, scalars)


def _to(x: Any, device: torch.device) -> Any:
    """Tensors on a device go to this one; numbers, and tensors on the host that every device can read, stay."""
    return x.to(device) if isinstance(x, Tensor) and x.device.type != "cpu" else x
