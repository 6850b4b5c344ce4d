"""Where the tensors of a column are, and whether that has changed (the twin of csrc/bindings/places.cpp)."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from looksam_kernels.backends import native
from looksam_kernels.table import all_fit

SAME, MOVED, OTHER = 0, 1, 2
"""Nothing has changed; only addresses, by multiples of 16 bytes; element types, strides, or which rows have a tensor."""


class Places(Protocol):
    """A column as it was when last looked at."""

    def look(self, tensors: list[Tensor | None]) -> int:
        """``SAME``, ``MOVED`` or ``OTHER``, held against the last time; ``OTHER`` the first time."""

    def moved(self, tensors: list[Tensor]) -> bool:
        """Is one of these, a tensor a row, at another address than when it was looked at?"""

    def take(self, params: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[int, bool | list[bool]] | None:
        """Looks at p.grad of each, and keeps it until :meth:`release`.

        Returns:
            The difference, and which rows have one: True where all do, else a flag for each. ``None``, and nothing is
            seen, where one does not plainly fit its parameter.
        """

    def tensors(self) -> list[Tensor | None]:
        """Those that were taken."""

    def release(self) -> None:
        """Lets go of them."""

    def addresses(self) -> Any:
        """Of each row, 0 where there is no tensor: int64 in a buffer."""


def places() -> Places:
    compiled = native.compiled()
    return PlainPlaces() if compiled is None else compiled.Places()


class PlainPlaces:
    """Without the extension. Each attribute is read of all tensors before the next, which costs half as much as row by row."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._kinds: tuple[Any, ...] | None = None
        self._taken: list[Tensor | None] = []

    def look(self, tensors: Sequence[Tensor | None]) -> int:
        self._taken = []
        there = [x for x in tensors if x is not None]
        missing = [row for row, x in enumerate(tensors) if x is None] if len(there) < len(tensors) else []
        addresses = [*map(Tensor.data_ptr, there)]
        kinds = (
            missing,
            _offsets(addresses),
            [x.dtype for x in there],
            [*map(Tensor.stride, there)],
            [*map(Tensor.is_neg, there)],
        )
        for row in missing:
            addresses.insert(row, 0)
        before = self._addresses, self._kinds
        self._addresses, self._kinds = addresses, kinds
        if before[1] != kinds:
            return OTHER
        return SAME if before[0] == addresses else MOVED

    def moved(self, tensors: list[Tensor]) -> bool:
        return [*map(Tensor.data_ptr, tensors)] != self._addresses

    def take(self, params: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[int, bool | list[bool]] | None:
        taken = [p.grad for p in params]
        if not all_fit(taken, [*weights], scalar=False):
            return None
        there = [x is not None for x in taken]
        difference, self._taken = self.look(taken), taken
        return difference, all(there) or there

    def tensors(self) -> list[Tensor | None]:
        return self._taken

    def release(self) -> None:
        self._taken = []

    def addresses(self) -> array[int]:
        return array("q", self._addresses)


def _offsets(addresses: list[int]) -> list[int]:
    """Of each address from a multiple of 16 bytes, -1 of none at all; nothing where all are such multiples."""
    if 0 not in addresses and not functools.reduce(operator.or_, addresses, 0) & 15:
        return []
    return [address & 15 if address else -1 for address in addresses]
