"""What an optimizer's groups and state held at one moment, and whether they still do (the twin of csrc/bindings/snapshot.cpp)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, compress
from typing import Any, Protocol

import torch
from torch import Tensor

from looksam_kernels.backends import native
from looksam_kernels.memory import address, readable
from looksam_kernels.table import TensorTable

PARAMS, PLACES, STATE, CONTENTS = 1, 2, 4, 8
"""What can change: which parameters there are; where their elements lie; which tensors the state holds of them; what
stands in those whose contents are followed."""

Groups = Sequence[Mapping[str, Any]]
States = Mapping[Any, MutableMapping[str, Any]]


class Snapshot(Protocol):
    """Compares by identity, so that a question costs no more than looking. Keeps alive what it compares."""

    def changes(self, groups: Groups, state: States, weights: Sequence[Tensor] | None) -> int:
        """Which of ``PARAMS``, ``PLACES``, ``STATE`` and ``CONTENTS`` have changed, added up.

        Args:
            weights: those of now, where they are not the tensors themselves that the snapshot was given.
        """

    def written(self) -> None:
        """To be called after our own writes to the contents."""


def take(
    groups: Groups, state: States, weights: Sequence[Tensor], entries: Sequence[str], contents: Sequence[Tensor] = ()
) -> Snapshot:
    """
    Args:
        groups, state: of a ``torch.optim.Optimizer``.
        weights: whose places are followed: dense tensors.
        entries: the names in a parameter's state that are followed; other entries may change unseen.
        contents: tensors that are also followed when they are written in place.
    """
    compiled = native.compiled()
    follows = compiled is not None and readable(weights) and isinstance(state, dict)
    if follows and all(isinstance(s, dict) for _, s in _of_params(state)):
        return compiled.Snapshot(groups, state, weights, entries, contents)
    return PlainSnapshot(groups, state, weights, entries, contents)


class PlainSnapshot:
    """The one without the extension, and for a state that is not made of dicts. Everything of one kind is read of all tensors
    before the next, which costs a third of reading tensor by tensor."""

    def __init__(
        self,
        groups: Groups,
        state: States,
        weights: Sequence[Tensor],
        entries: Sequence[str],
        contents: Sequence[Tensor] = (),
    ) -> None:
        self._weights, self._entries, self._contents = weights, entries, contents
        self._params = [list(g["params"]) for g in groups]
        self._places = _places(weights)
        self._state = self._read(state)
        self._whole = _Whole(state, frozenset(entries)) if _is_plain(state) else None
        self.written()

    def changes(self, groups: Groups, state: States, weights: Sequence[Tensor] | None) -> int:
        params = [g["params"] for g in groups]
        found = 0 if len(params) == len(self._params) and all(map(_same, params, self._params)) else PARAMS
        found |= 0 if _places(self._weights if weights is None else weights) == self._places else PLACES
        found |= 0 if self._is_state(state) else STATE
        return found | (0 if self._versions == _versions(self._contents) else CONTENTS)

    def written(self) -> None:
        self._versions = _versions(self._contents)

    def _is_state(self, state: States) -> bool:
        """Where something else than before is in the state, it may still be in entries that are not followed."""
        return (self._whole is not None and self._whole.holds(state)) or _same(self._read(state), self._state)

    def _read(self, state: States) -> list[Any]:
        return [x for p, s in _of_params(state) for x in (p, s, *(s.get(name) for name in self._entries))]


class _Whole:
    """A state that is made of dicts, for parameters alone: all names and values in the order in which they stand there."""

    def __init__(self, state: States, entries: frozenset[str]) -> None:
        self._params, self._of_param = [*state], [*state.values()]
        self._names = [*chain.from_iterable(self._of_param)]
        self._followed = [name in entries for name in self._names]
        self._values = self._values_of(self._of_param)

    def holds(self, state: States) -> bool:
        """Has it the same names, and the same objects under those that are followed?"""
        of_param = [*state.values()]
        return (
            _same(state, self._params)
            and _same(of_param, self._of_param)
            and [*chain.from_iterable(of_param)] == self._names
            and _same(self._values_of(of_param), self._values)
        )

    def _values_of(self, of_param: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [*compress(chain.from_iterable(map(dict.values, of_param)), self._followed)]  # type: ignore[arg-type]


def _is_plain(state: States) -> bool:
    return all(isinstance(p, Tensor) and isinstance(s, dict) for p, s in state.items())


def _of_params(state: States) -> Iterator[tuple[Tensor, MutableMapping[str, Any]]]:
    """A class may keep anything under other keys."""
    return ((p, s) for p, s in state.items() if isinstance(p, Tensor))


def gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """``p.grad`` of each."""
    compiled = native.compiled()
    return [p.grad for p in params] if compiled is None else compiled.gradients(params)


def clear_gradients(params: Sequence[Tensor]) -> None:
    """Sets ``p.grad`` of each to ``None``."""
    compiled = native.compiled()
    if compiled is not None:
        compiled.clear_gradients(params)
    else:
        for p in params:
            p.grad = None


def any_shared(table: TensorTable, column: str) -> bool:
    """Does another tensor share the memory of one in this column, as a buffer does whose parts are gradients?"""
    if table.is_held(column) and hasattr(table.handle, "any_shared"):
        return bool(table.handle.any_shared(column))
    tensors, compiled = table[column], native.compiled()
    if compiled is not None:
        return bool(compiled.any_shared(tensors))
    dense = [x for x in tensors if x is not None and x.layout is torch.strided]
    storages = [*map(Tensor.untyped_storage, dense)]
    uses = map(torch._C._storage_Use_Count, [x._cdata for x in storages])
    return max(uses, default=0) > 2  # its tensor's, and that of the question


def first_same_place(table: TensorTable, column: str, other: str) -> int:
    """The first row whose tensors in two columns begin at the same address, or -1."""
    if table.is_held(column) and table.is_held(other) and hasattr(table.handle, "first_same_place"):
        return int(table.handle.first_same_place(column, other))
    compiled = native.compiled()
    if compiled is not None:
        return int(compiled.first_same_place(table[column], table[other]))
    starts = [[0 if x is None else x.data_ptr() for x in table[name]] for name in (column, other)]
    return next((row for row, (x, y) in enumerate(zip(*starts, strict=True)) if x == y != 0), -1)


def observed() -> bool:
    """Does a profiler, or whoever else, listen to torch's operations? Also where that cannot be told."""
    compiled = native.compiled()
    return compiled is None or bool(compiled.has_observers())


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each has been written; an inference tensor does not count."""
    try:
        return [x._version for x in tensors]
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]


def _places(tensors: Sequence[Tensor]) -> list[Any]:
    """Where each lives and how its elements lie there. An address belongs to one device; where there is none, the device is
    asked for."""
    try:
        addresses = [*map(Tensor.data_ptr, tensors)] if {*map(type, tensors)} <= DENSE else [*map(address, tensors)]
    except RuntimeError:  # functorch: there is no storage
        addresses = [*map(address, tensors)]
    devices = [x.device for x in tensors] if 0 in addresses else []
    return [addresses, devices, [x.dtype for x in tensors], [x.shape for x in tensors], [*map(Tensor.stride, tensors)]]


DENSE = frozenset((Tensor, torch.nn.Parameter))
"""The classes whose tensors have memory, or raise if they are asked for it."""


def _same(a: Iterable[Any], b: Sequence[Any]) -> bool:
    a = a if isinstance(a, list) else list(a)
    return len(a) == len(b) and all(map(operator.is_, a, b))
