"""A variant is a row: it names its rules and its numbers, and has no mathematics of its own."""

import inspect

import pytest

import looksam

LINES = 40
"""With docstring and signature."""


@pytest.mark.parametrize("cls", looksam.VARIANTS.values(), ids=list(looksam.VARIANTS))
def test_a_variant_is_a_short_row(cls):
    functions = [x.__qualname__ for x in vars(cls).values() if inspect.isfunction(x)]  # torch adds a wrapped step
    assert [name for name in functions if name.startswith(cls.__name__)] == [f"{cls.__name__}.__init__"]
    assert len(inspect.getsource(cls).splitlines()) <= LINES
