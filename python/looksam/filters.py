"""Layer filters: functions of the constructor, which groups and checkpoints hold as one flag a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from looksam.hyper import Group

Accepts = Callable[[Tensor], bool] | None


class _Settled(NamedTuple):
    flags: list[bool]
    params: list[Tensor]
    accepts: Accepts


class LayerFilters:
    """Keeps the flags in step with the parameters of their group, which may be edited in place.

    Args:
        accepts: the constructor's function, for groups that have none of their own.
    """

    def __init__(self, accepts: Accepts) -> None:
        self._accepts = accepts
        self._settled: list[_Settled] = []
        """Of each group, as it was."""

    def settle(self, groups: Sequence[Group]) -> None:
        """
        Raises:
            ValueError: flags that are not one a parameter.
        """
        filtered = [group for group in groups if "layer_filter" in group]
        known = dict(chain.from_iterable(zip(s.params, s.flags, strict=False) for s in self._settled))
        self._settled = [self._settle(i, group, known) for i, group in enumerate(filtered)]

    def _settle(self, i: int, group: Group, known: dict[Tensor, bool]) -> _Settled:
        given, params = group["layer_filter"], list(group["params"])
        if not isinstance(given, list):
            group["layer_filter"] = [_says(given, p) for p in params]
            return _Settled(group["layer_filter"], params, given)
        accepts = self._settled[i].accepts if i < len(self._settled) else self._accepts
        before = next((s for s in self._settled if s.flags is given), None)
        if before is None and len(given) != len(params):
            raise ValueError(
                f"layer_filter has {len(given)} flags for {len(params)} parameters; give a function, or one flag for each"
            )
        made_for = params
        if before is not None:
            accepts = before.accepts
            if len(given) == len(before.params) or len(given) != len(params):  # else the flags were edited, too
                made_for = before.params
        flags = known | dict(zip(made_for, given, strict=False))
        group["layer_filter"] = [flags[p] if p in flags else _says(accepts, p) for p in params]
        return _Settled(group["layer_filter"], params, accepts)


def _says(accepts: Accepts, p: Any) -> bool:
    return accepts is None or bool(accepts(p))
