"""Filters: functions parameter -> bool of the constructor, which groups and checkpoints hold as one flag a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from looksam.hyper import FILTERS, Group
from looksam.messages import shown

Accepts = Callable[[Tensor], bool] | None


class _Settled(NamedTuple):
    flags: list[bool]
    params: list[Tensor]
    accepts: Accepts


class Filters:
    """Keeps the flags of all filters in step with the parameters of their group, which may be edited in place. ``None`` stays
    as it is, as long as no group has another.

    Args:
        given: the constructor's functions by name, for groups that have none of their own.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._filters = [_Filter(name, given[name]) for name in FILTERS if name in given]

    def settle(self, groups: Sequence[Group]) -> None:
        """
        Raises:
            TypeError: neither a function nor flags. ValueError: flags that are not one a parameter.
        """
        for x in self._filters:
            x.settle(groups)


class _Filter:
    def __init__(self, name: str, accepts: Accepts) -> None:
        self._name, self._accepts = name, accepts
        self._settled: list[_Settled] = []
        """Of each group, as it was."""

    def settle(self, groups: Sequence[Group]) -> None:
        filtered = [group for group in groups if self._name in group]
        if not self._settled and all(group[self._name] is None for group in filtered):
            return
        known = dict(chain.from_iterable(zip(s.params, s.flags, strict=False) for s in self._settled))
        self._settled = [self._settle(i, group, known) for i, group in enumerate(filtered)]

    def _settle(self, i: int, group: Group, known: dict[Tensor, bool]) -> _Settled:
        given, params = group[self._name], list(group["params"])
        if given is not None and not isinstance(given, list) and not callable(given):
            raise TypeError(
                f"{self._name} must be a function parameter -> bool, or one flag for each, not {shown(given)}"
            )
        if not isinstance(given, list):
            group[self._name] = [self._says(given, p) for p in params]
            return _Settled(group[self._name], params, given)
        accepts = self._settled[i].accepts if i < len(self._settled) else self._accepts
        before = next((s for s in self._settled if s.flags is given), None)
        if before is None and len(given) != len(params):
            raise ValueError(
                f"{self._name} has {len(given)} flags for {len(params)} parameters; give a function, or one flag for each"
            )
        made_for = params
        if before is not None:
            accepts = before.accepts
            if len(given) == len(before.params) or len(given) != len(params):  # else the flags were edited, too
                made_for = before.params
        flags = known | dict(zip(made_for, given, strict=False))
        group[self._name] = [flags[p] if p in flags else self._says(accepts, p) for p in params]
        return _Settled(group[self._name], params, accepts)

    def _says(self, accepts: Accepts, p: Any) -> bool:
        return bool((accepts or FILTERS[self._name])(p))
