"""Binding: the parameters of all groups, their gradients and their state, as the ops see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from looksam import hyper
from looksam.distributed import Whole, shards_of
from looksam.hyper import Group
from looksam.masters import Masters
from looksam_kernels import TensorTable, ops
from looksam_kernels.formulas import KEEP_NORM

State = dict[str, Any]
"""Of one parameter."""


class StateOfBase(Protocol):
    """What a base update keeps for each parameter."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that the ops read and write."""

    @property
    def comes_first(self) -> bool:
        """Does the base create its state by itself, and must find none of ours until it has?"""

    def states(self, group: Group) -> tuple[str, ...]:
        """The columns that the parameters of a group need."""

    def missing(self, p: Tensor, group: Group, state: State) -> State:
        """What is to be created and ``state`` lacks."""


class Binding:
    """One table for all parameters, in the order of the groups, that follows what changes between the steps.

    It can be made anew at any time: all that must last is in ``state``.

    Args:
        groups, state: of the optimizer.
        base: whose state stands in the table beside the variant's.
        written: the columns of state that the variant writes.
        backend: ``"native"``, ``"triton"``, ``"reference"``; default: the fastest that is there.
    """

    def __init__(
        self,
        groups: list[Group],
        state: dict[Tensor, State],
        base: StateOfBase,
        written: Sequence[str],
        backend: str | None,
    ) -> None:
        self.groups, self.state = groups, state
        self._base, self._written, self._backend = base, written, backend
        self._table: TensorTable | None = None
        self._pointers: list[int] = []
        """Where the parameters of the table were: a model that moves its parameters gets a new table."""
        self._shards, self.masters = Whole(), Masters([])
        self._backup: dict[Tensor, Tensor] = {}
        self._aside: dict[Tensor, dict[str, Tensor]] = {}
        """State of ours that waits until the base has created its own."""
        self._prepared: list[Any] = []
        """What :meth:`take` has already prepared for: it looks at single parameters only when something is new."""

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    @property
    def table(self) -> TensorTable:
        if self._table is None:
            weights = self.shards.local([p.detach() for p in self.params])
            self._pointers = _pointers(weights)
            rows = hyper.row_groups(self.groups)
            self._table = TensorTable([w for w in weights if w is not None], rows, backend=self._backend)
            self._prepared = []
            self._set_columns(self._table)
            self.masters.follow()
        return self._table

    @property
    def shards(self) -> Whole:
        if self._table is None:
            self._shards = shards_of(self.params)
        return self._shards

    def gradients(self) -> Sequence[Tensor | None]:
        """Those of now, what this rank holds of them."""
        return self.shards.local([p.grad for p in self.params])

    def follow(self) -> None:
        """To be called before the weights move: what has been changed outside since the last step."""
        if self._table is not None and self._pointers != _pointers(self._shards.local(self.params)):
            self._table, self._backup = None, {}
        self.masters.follow()

    def take(self, column: str, writes: str | None = None) -> None:
        """Puts the gradients of now into ``column``, and creates all the state, ``writes`` included, that the
        parameters which have one still lack."""
        table = self.table
        table[column] = grads = self.gradients()
        states = [self._base.states(g) for g in self.groups]
        asked = (writes, states, [g is not None for g in grads])
        if asked not in self._prepared:
            for group in self.groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._prepare(p, group, writes)
            self._set_columns(table)
            self._prepared = [*self._prepared[-7:], asked]

    def make_room(self, column: str) -> None:
        """Somewhere to save the weights that a perturbation along ``column`` moves."""
        table = self.table
        if all(table.present("b")):
            return
        rows = zip(self.params, table.present(column), table.present("b"), strict=True)
        new = {p: torch.empty_like(p) for p, moves, has_room in rows if moves and not has_room}
        if new:
            self._backup.update(new)
            self._set_columns(table)

    def restore(self) -> None:
        """The weights are where they were saved, where a step has moved them."""
        if self._table is not None:
            ops.restore(self._table)

    def drop(self, columns: Iterable[str]) -> None:
        """Forgets gradients."""
        if self._table is not None:
            for column in columns:
                self._table.drop(column)

    def hand_over(self) -> None:
        """The base has created its state: ours may stand beside it."""
        for p in [p for p in self._aside if p.grad is not None]:
            self.state[p].update(self._aside.pop(p))

    def _prepare(self, p: Tensor, group: Group, writes: str | None) -> None:
        state = self.state.get(p, {})
        missing = self._base.missing(p, group, state)
        if missing:
            self.state[p] = state = {**missing, **state}
        if writes is not None and writes not in state:
            mine = self._aside.setdefault(p, {}) if self._base.comes_first else state
            mine[writes] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            if writes in KEEP_NORM:
                mine[f"{writes}_norm_sq"] = torch.zeros((), dtype=torch.float64, device=p.device)

    def _set_columns(self, table: TensorTable) -> None:
        params = self.params
        rows = [{**self.state.get(p, {}), **self._aside.get(p, {})} for p in params]
        for name in (*self._base.columns, *(f"{x}{suffix}" for x in self._written for suffix in ("", "_norm_sq"))):
            table[name] = self._shards.local([row.get(name) for row in rows])
        backups = [row.get("master_param", self._backup.get(p)) for p, row in zip(params, rows, strict=True)]
        table["b"] = self._shards.local(backups)
        own = zip(params, table["w"], table["b"], rows, strict=True)
        self.masters = Masters((p, w, b) for p, w, b, row in own if "master_param" in row)


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    return [x.data_ptr() for x in tensors if x is not None]
