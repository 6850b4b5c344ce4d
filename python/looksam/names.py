"""Names in groups and in state, where a variant's entries stand beside those of its base.

Ours keep their names. An entry of the base that is called like one of ours stands under ``base.<name>``: with a dot, which
no argument of Python has and no scheduler writes. A class that is wrapped gets views in which only its own entries are,
under its own names, so that it works as if it were alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Dict = MutableMapping[Any, Any]
else:

    class Dict(MutableMapping, dict):
        """A dict for those who ask (``isinstance``), though it holds nothing itself."""


PREFIX = "base."


def outer(name: Any, ours: Collection[Any]) -> Any:
    """The base's name of an entry -> the one in our groups and state."""
    return PREFIX + name if name in ours or (isinstance(name, str) and name.startswith(PREFIX)) else name


def inner(name: Any) -> Any:
    """The name in our groups and state -> the base's."""
    return name[len(PREFIX) :] if isinstance(name, str) and name.startswith(PREFIX) else name


class _View(Dict):
    """Copied and pickled as what it shows."""

    def __init__(self, of: MutableMapping[Any, Any], ours: Collection[Any]) -> None:
        self.of, self.ours = of, ours

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[Any, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | dict(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return repr(dict(self))


class BaseEntries(_View):
    """A group, or the state of one parameter, without ``ours``: reads and writes go to ``of``."""

    def __getitem__(self, name: Any) -> Any:
        try:
            return self.of[outer(name, self.ours)]
        except KeyError:
            raise KeyError(name) from None

    def __setitem__(self, name: Any, value: Any) -> None:
        self.of[outer(name, self.ours)] = value

    def __delitem__(self, name: Any) -> None:
        del self.of[outer(name, self.ours)]

    def __iter__(self) -> Iterator[Any]:
        return (inner(name) for name in self.of if name not in self.ours)


class BaseStates(_View):
    """``Optimizer.state`` without ``ours``; as there, a key without state gets an empty one when it is asked for.

    What a class keeps under keys that are no parameters, or in values that are no dicts, is all its own.
    """

    def __getitem__(self, key: Any) -> Any:
        state = self.of.get(key)
        if state is None:
            state = self.of[key] = {}
        return self._view(state)

    def __setitem__(self, key: Any, state: Any) -> None:
        mine = self._view(self.of.get(key))
        if isinstance(mine, BaseEntries) and isinstance(state, MutableMapping):
            new = dict(state)
            mine.clear()
            mine.update(new)
        elif isinstance(state, MutableMapping):
            self.of[key] = {outer(name, self.ours): value for name, value in state.items()}
        else:
            self.of[key] = state

    def __delitem__(self, key: Any) -> None:
        mine = self._view(self.of[key])
        if isinstance(mine, BaseEntries):
            mine.clear()
        if not (isinstance(mine, BaseEntries) and self.of[key]):
            del self.of[key]

    def __contains__(self, key: Any) -> bool:
        return key in self.of and self._shows(self.of[key])

    def __iter__(self) -> Iterator[Any]:
        return (key for key, state in self.of.items() if self._shows(state))

    def replace(self, states: MutableMapping[Any, Any]) -> None:
        """The class has forgotten its state, and begins with another."""
        for key in [key for key in self if key not in states]:
            del self[key]
        for key, state in states.items():
            self[key] = state

    def _view(self, state: Any) -> Any:
        return BaseEntries(state, self.ours) if isinstance(state, MutableMapping) else state

    def _shows(self, state: Any) -> bool:
        """Would the class, alone, have this entry?"""
        return not isinstance(state, MutableMapping) or not state or any(name not in self.ours for name in state)
