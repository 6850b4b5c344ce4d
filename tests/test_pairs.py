"""Which combinations run every time."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from tests.pairs import covering, parts_of

pytest_plugins = ["pytester"]

BACKENDS, VARIANTS, BASES, STEPS = ("a", "b"), range(15), range(12), range(3)
PRODUCT = [tuple((x,) for x in combination) for combination in product(BACKENDS, VARIANTS, BASES, STEPS)]


def test_every_two_values_of_different_axes_meet_in_a_part_of_the_product() -> None:
    chosen = [PRODUCT[place] for place in covering(PRODUCT)]
    assert {(x, y) for _, (x,), (y,), _ in chosen} == set(product(VARIANTS, BASES))
    assert {(x, y) for (x,), (y,), _, _ in chosen} == set(product(BACKENDS, VARIANTS))
    assert {(x, y) for _, _, (x,), (y,) in chosen} == set(product(BASES, STEPS))
    assert len(chosen) <= 1.1 * len(VARIANTS) * len(BASES)
    for axis, values in enumerate((BACKENDS, VARIANTS, BASES, STEPS)):
        counts = Counter(combination[axis] for combination in chosen)
        assert min(counts.values()) >= 0.6 * len(chosen) / len(values), "each is met about as often"


def test_rows_of_one_parametrize_all_run_and_their_values_meet_those_of_the_others() -> None:
    rows = [("sam", "sgd"), ("sam", "lamb"), ("looksam", "sgd"), ("looksam", "lion"), ("sam", "sgd2")]
    combinations = [((backend,), row) for backend in BACKENDS for row in rows]
    chosen = [combinations[place] for place in covering(combinations)]
    assert {row for _, row in chosen} == set(rows)
    assert {(backend, value) for (backend,), row in chosen for value in row} == {
        (backend, value) for backend in BACKENDS for row in rows for value in row
    }


@pytest.mark.parametrize("axes", [1, 2])
def test_a_product_of_one_or_two_axes_stays_whole(axes: int) -> None:
    combinations = [tuple((x,) for x in values) for values in product("abc", repeat=axes)]
    assert covering(combinations) == [*range(3**axes)]


def test_a_part_is_a_row_or_two_values() -> None:
    assert len(parts_of([(1,), (2, 3)])) == 2 + 2


def test_what_is_left_out_is_reported_and_what_is_asked_for_runs(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.pairs import pytest_collection_modifyitems")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("x", range(3))
        @pytest.mark.parametrize("y", range(3))
        @pytest.mark.parametrize("z", range(3))
        def test_product(x, y, z): ...

        @pytest.mark.whole
        @pytest.mark.parametrize("x", range(2))
        @pytest.mark.parametrize("y", range(2))
        @pytest.mark.parametrize("z", range(2))
        def test_whole(x, y, z): ...
        """
    )
    result = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider")
    passed = result.parseoutcomes()["passed"]
    assert 9 + 8 <= passed < 27
    assert result.parseoutcomes()["deselected"] == 27 + 8 - passed
    every = [
        f"{next(pytester.path.glob('test_*.py')).name}::test_product[{z}-{y}-{x}]"
        for x, y, z in product("012", repeat=3)
    ]
    assert pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", *every).parseoutcomes() == {"passed": 27}
