"""A variant is a row: it names its rules and its numbers, and has no mathematics of its own."""

import inspect
import re

import pytest

import looksam
from looksam import variants

LINES = 40
"""With docstring and signature."""
ROWS = {name: cls for name, cls in looksam.VARIANTS.items() if cls.__module__ == variants.__name__}
"""What chooses its steps or its samples as well lives elsewhere."""


@pytest.mark.parametrize("cls", ROWS.values(), ids=list(ROWS))
def test_a_variant_is_a_short_row(cls):
    functions = [x.__qualname__ for x in vars(cls).values() if inspect.isfunction(x)]  # torch adds a wrapped step
    assert [name for name in functions if name.startswith(cls.__name__)] == [f"{cls.__name__}.__init__"]
    source = re.sub(r"\n    Example::.*?(?=\n    \"{3})", "", inspect.getsource(cls), flags=re.DOTALL)
    assert len(source.splitlines()) <= LINES


def test_most_variants_are_rows():
    assert {"sam", "looksam", "layersam", "gsam", "wsam", "crsam", "vasso", "friendlysam"} <= ROWS.keys()
