"""Of a test's combinations those that run every time: enough that each two values from different ``parametrize`` meet.

A test over backends x variants x bases x options is a product of hundreds. Most faults depend on one value or on how two of
them meet; those that need three are left to ``make nightly``, which runs the whole product. What is chosen depends on the
test's values alone. Exempt are tests marked ``whole``, those that need a GPU, and combinations that are asked for by id.
"""

from __future__ import annotations

import heapq
import zlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import pytest

from tests.nightly import NIGHTLY

Axis = tuple[Hashable, ...]
"""The values of one ``parametrize`` in one combination: as many as it has names."""


def parts_of(combination: Sequence[Axis]) -> set[Hashable]:
    """What a combination is there for: the row of each axis, and each two values of different axes."""
    rows = {(i, row) for i, row in enumerate(combination)}
    numbered = [[(i, j, value) for j, value in enumerate(row)] for i, row in enumerate(combination)]
    return rows | {(x, y) for one, other in combinations(numbered, 2) for x in one for y in other}


def covering(all_of_them: Sequence[Sequence[Axis]]) -> list[int]:
    """The places of some combinations that together have all the parts: again and again one of those with most new ones. Which
    of them a hash says, or it would be the first value of an axis that most others meet."""
    parts = [parts_of(combination) for combination in all_of_them]
    missing = set().union(*parts)
    heap = [(-len(has), zlib.crc32(repr(all_of_them[place]).encode()), place) for place, has in enumerate(parts)]
    heapq.heapify(heap)
    chosen = []
    while missing:
        claimed, drawn, place = heapq.heappop(heap)
        new = len(parts[place] & missing)
        if new < -claimed:  # others have taken some in the meantime
            heapq.heappush(heap, (-new, drawn, place))
            continue
        chosen.append(place)
        missing -= parts[place]
    return sorted(chosen)


def axes_of(item: pytest.Function) -> list[Axis]:
    """Its values by ``parametrize``; those that are no plain values by their places in it."""
    callspec = item.callspec
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    names = [tuple(x.strip() for x in mark.split(",")) if isinstance(mark, str) else tuple(mark) for mark in marks]
    names += [(name,) for name in callspec.params if not any(name in axis for axis in names)]

    def key(name: str) -> Hashable:
        value = callspec.params[name]
        return repr(value) if value is None or isinstance(value, str | int | float | bool) else callspec.indices[name]

    return [tuple(key(name) for name in axis if name in callspec.params) for axis in names]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if NIGHTLY:
        return
    by_test: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        exempt = item.get_closest_marker("whole") or item.get_closest_marker("gpu") or item.nodeid in config.args
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not exempt:
            by_test[item.nodeid.partition("[")[0]].append(item)
    left_out = []
    for products in by_test.values():
        chosen = set(covering([axes_of(item) for item in products]))
        left_out += [item for place, item in enumerate(products) if place not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
