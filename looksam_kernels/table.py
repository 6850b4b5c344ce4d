"""TensorTable: aligned lists of tensors. A row is one parameter; a column is one role that it plays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from looksam_kernels import backends
from looksam_kernels.memory import readable
from looksam_kernels.rounding import Rounding

NOTHING = type(None)
PLAIN = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
Column = list[Any]
"""A tensor or ``None`` a row."""


def holds_scalars(column: str) -> bool:
    """Has the column one number a row (0-dim tensors)? ``step``, the update count, float32; ``q_norm_sq``, the cached
    ||q_p||^2, float64; ``<x>_scale``, how far along x the weights rest, float64."""
    return column == "step" or column.endswith(("_norm_sq", "_scale"))


class TensorTable:
    """Aligned lists of tensors, the one argument that every op takes.

    Columns by name, each a list with one tensor or ``None`` a row:

    =================  ==================================================================================
    ``w``              the parameters; their storage is only ever written in place
    ``b``              where :func:`looksam_kernels.perturb` saves w. Of a wider dtype than w it is instead
                       w's *master copy*: always exact, read and written in place of w by every op
    ``g``, ``s``, ...  gradients or other directions; ``None`` = takes no part
    ``q``              LookSAM's orthogonal component, with ``q_norm_sq`` beside it
    base states        ``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``; ``step`` counts the updates
    =================  ==================================================================================

    Args:
        w: parameters: floating point, dense, any mix of devices and of float64, float32, float16, bfloat16. Sums, norms and
            coefficients are those of all rows together, on the device of the first.
        group: index of each row's hyper-parameter group; default: all 0.
        device: where an empty table is: on the CPU if this is not said. Of any other it is the device of its first parameter.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or ``None`` for the first that runs on w's device, chosen
            for each where there are several.
        rounding: how new weights of bfloat16 without a master copy are rounded; ``None``: to nearest. It needs ``step``.
        columns: further columns.

    Raises:
        ValueError: lists of unequal length, a tensor whose shape differs from its parameter's.
        TypeError: sparse, complex or integer tensors.
        RuntimeError: the backend asked for does not run on this device.
    """

    def __init__(
        self,
        w: Iterable[Tensor],
        group: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
        backend: str | None = None,
        rounding: Rounding | None = None,
        **columns: Sequence[Tensor | None],
    ) -> None:
        weights = list(w)
        self._columns: dict[str, Column | None] = {}
        """``None``: the backend alone holds it."""
        self._present: dict[str, list[bool]] = {}
        self._everywhere = [True] * len(weights)
        """What :meth:`present` returns for every column without gaps."""
        self.group = list(group) if group is not None else [0] * len(weights)
        if len(self.group) != len(weights):
            raise ValueError(f"group has {len(self.group)} entries for {len(weights)} parameters")
        self.perturbed = [False] * len(weights)
        """Rows whose w is away from its backup: set by perturb, cleared by step and restore."""
        devices = list(dict.fromkeys(device_of(x) for x in weights)) or [_complete(torch.device(device or "cpu"))]
        self.device = devices[0]
        there = readable(x for x in weights if x.device.type != "meta")  # the meta device is asked for like any other
        self.backend: backends.Backend = backends.select(backend, *devices, readable=there)
        self.rounding = rounding
        """Of bfloat16 weights without a master copy. It stays as it is."""
        self.dirty: set[str] = set()
        """Columns set since the backend last looked at them."""
        self.handle: Any = None
        """Whatever the backend keeps for this table between calls."""
        self["w"] = weights
        for name, tensors in columns.items():
            self[name] = tensors

    def __len__(self) -> int:
        return len(self.group)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __getitem__(self, name: str) -> Column:
        """A column; one that was never set has ``None`` in every row."""
        column = self._columns.get(name)
        if column is None and name in self._columns:
            self._columns[name] = column = self.handle.get(name)
        return column or [None] * len(self)

    def __setitem__(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        if len(tensors) != len(self):
            raise ValueError(f"column {name!r} has {len(tensors)} tensors for {len(self)} parameters")
        tensors = list(tensors)
        weights = tensors if name == "w" else self["w"]
        if not self._all_fit(name, tensors, weights):
            for row, (x, w) in enumerate(zip(tensors, weights, strict=True)):
                if x is not None and w is not None:
                    _check(name, row, x, w)
        self._columns[name] = tensors
        present = [x is not None for x in tensors]
        self._present[name] = present if False in present else self._everywhere
        self.dirty.add(name)

    def take_gradients(self, name: str, params: Sequence[Tensor]) -> bool:
        """Sets a column to ``p.grad`` of each of ``params`` in one call of the backend, which keeps the tensors until they
        are asked for.

        Returns:
            False where the backend does not, or one does not fit: ``self[name] = ...`` then says what is wrong.
        """
        take = getattr(self.backend, "take_gradients", None)
        present = take(self, name, params) if take is not None else None
        if present is None:
            return False
        self._columns[name] = None
        self._present[name] = self._everywhere if present is True else present
        self.dirty.discard(name)
        return True

    def _all_fit(self, name: str, tensors: Column, weights: Column) -> bool:
        """Does every tensor plainly fit its parameter? Asked of the whole column first, because gradients come anew every step."""
        first_misfit = getattr(self.backend, "first_misfit", None)
        if first_misfit is not None:
            return bool(first_misfit(tensors, weights, holds_scalars(name)) < 0)
        return all_fit(tensors, weights, holds_scalars(name))

    def is_held(self, name: str) -> bool:
        """Does the backend alone hold this column, so that a list of it would have to be made?"""
        return name in self._columns and self._columns[name] is None

    @property
    def backend_name(self) -> str:
        """``"native"``, ``"triton"`` or ``"reference"``; of rows on several devices all that run, as in ``"native and triton"``."""
        return backends.name_of(self.backend)

    def drop(self, name: str) -> None:
        """Forgets a column, so that its tensors are freed at once if nothing else holds them."""
        if name in self._columns:
            del self._columns[name], self._present[name]
            self.dirty.add(name)
            forget = getattr(self.backend, "forget", None)
            if forget is not None:
                forget(self, name)

    def present(self, name: str) -> list[bool]:
        """Which rows have a tensor in this column."""
        return self._present.get(name) or [False] * len(self)

    def is_full(self, name: str) -> bool:
        """Has every row a tensor in this column?"""
        return self._present.get(name) is self._everywhere

    def has_master(self, row: int) -> bool:
        """Is b the master copy of w, rather than a place to save it in?"""
        b = self["b"][row]
        return b is not None and b.dtype != self["w"][row].dtype

    def rounds_stochastically(self, row: int) -> bool:
        """Are new weights of this row rounded by ``rounding``?"""
        return self.rounding is not None and self["w"][row].dtype == torch.bfloat16 and not self.has_master(row)

    def arithmetic(self, row: int) -> torch.dtype:
        """The type in which a row is computed: float64 where w or its master copy is, else float32."""
        wide = self["w"][row].dtype == torch.float64 or (self.has_master(row) and self["b"][row].dtype == torch.float64)
        return torch.float64 if wide else torch.float32


def device_of(w: Tensor) -> torch.device:
    """Rows of different devices are parts of a table with several (:mod:`looksam_kernels.backends.split`)."""
    return w.device


def all_fit(tensors: Column, weights: Column, scalar: bool) -> bool:
    """Does every tensor plainly fit its parameter? Each attribute is read of all before the next, which costs half as much
    as row by row."""
    if NOTHING in {*map(type, tensors), *map(type, weights)}:
        pairs = [(x, w) for x, w in zip(tensors, weights, strict=True) if x is not None and w is not None]
        tensors, weights = [x for x, _ in pairs], [w for _, w in pairs]
    return bool(
        {x.layout for x in tensors} <= {torch.strided}
        and {x.dtype for x in tensors} <= PLAIN
        and [x.device for x in tensors] == [w.device for w in weights]
        and ({x.dim() for x in tensors} <= {0} if scalar else [x.shape for x in tensors] == [w.shape for w in weights])
    )


def _complete(device: torch.device) -> torch.device:
    """A tensor's device has an index."""
    return torch.empty(0, device=device).device


def _check(name: str, row: int, x: Tensor, w: Tensor) -> None:
    if x.layout is not torch.strided:
        raise TypeError(
            f"column {name!r}, row {row}: {x.layout} tensors are not supported; "
            "make the gradient dense (for an embedding: sparse=False)"
        )
    if not x.is_floating_point():
        raise TypeError(f"column {name!r}, row {row}: {x.dtype} is not supported; use a real floating point dtype")
    if x.shape != (() if holds_scalars(name) else w.shape):
        raise ValueError(f"column {name!r}, row {row}: shape {tuple(x.shape)} does not fit parameter {tuple(w.shape)}")
    if x.device != w.device:
        raise ValueError(f"column {name!r}, row {row}: on {x.device}, but its parameter is on {w.device}")
