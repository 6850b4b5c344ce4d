"""What an optimizer's groups and state held at one moment, and whether they still do (the twin of csrc/bindings/snapshot.cpp)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from looksam_kernels.backends import native
from looksam_kernels.memory import address, readable

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
    """The one without the extension, and for a state that is not made of dicts."""

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
        self._places = [_place(w) for w in weights]
        self._state = self._read(state)
        self.written()

    def changes(self, groups: Groups, state: States, weights: Sequence[Tensor] | None) -> int:
        params = [g["params"] for g in groups]
        places = [_place(w) for w in (self._weights if weights is None else weights)]
        found = 0 if len(params) == len(self._params) and all(map(_same, params, self._params)) else PARAMS
        found |= 0 if places == self._places else PLACES
        found |= 0 if _same(self._read(state), self._state) else STATE
        return found | (0 if self._versions == [_version(x) for x in self._contents] else CONTENTS)

    def written(self) -> None:
        self._versions = [_version(x) for x in self._contents]

    def _read(self, state: States) -> list[Any]:
        return [x for p, s in _of_params(state) for x in (p, s, *(s.get(name) for name in self._entries))]


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


def any_shared(tensors: Sequence[Tensor | None]) -> bool:
    """Does another tensor share the memory of one of these tensors, as a buffer does whose parts are gradients?"""
    compiled = native.compiled()
    if compiled is not None:
        return bool(compiled.any_shared(tensors))
    return any(x is not None and x.layout is torch.strided and _is_shared(x) for x in tensors)


def first_same_place(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> int:
    """The first row whose two tensors begin at the same address, or -1."""
    compiled = native.compiled()
    if compiled is not None:
        return int(compiled.first_same_place(tensors, others))
    pairs = enumerate(zip(tensors, others, strict=True))
    return next((i for i, (x, y) in pairs if x is not None and y is not None and x.data_ptr() == y.data_ptr() != 0), -1)


def observed() -> bool:
    """Does a profiler, or whoever else, listen to torch's operations? Also where that cannot be told."""
    compiled = native.compiled()
    return compiled is None or bool(compiled.has_observers())


def _is_shared(x: Tensor) -> bool:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata) > 2  # its tensor's, and that of the question


def _version(x: Tensor) -> int:
    """How often it has been written; an inference tensor does not count."""
    return 0 if x.is_inference() else x._version


def _place(x: Tensor) -> tuple[Any, ...]:
    return address(x), x.dtype, x.device, x.shape, x.stride()


def _same(a: Iterable[Any], b: Sequence[Any]) -> bool:
    a = list(a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
