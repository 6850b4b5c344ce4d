"""The memory of bfloat16 weights that docs/amp.md promises is what the allocator hands out, and every kind of weights trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import memory, rounding
from looksam_kernels import backend_info

SHAPES = [(256, 256)] * 4
"""Enough elements that a number for each tensor does not count."""
DOCS = Path(__file__).parents[2] / "docs"


def promised() -> dict[tuple[str, str], tuple[int, int]]:
    """Method and kind of weights -> bytes between steps and at the peak: the table of docs/amp.md, in the order of the script's."""
    rows = re.findall(
        r"^\| (?:SAM|LookSAM-5)? ?\| (?:float32|bfloat16,)[^|]* \| (\d+) \| (\d+) \|",
        (DOCS / "amp.md").read_text(),
        re.MULTILINE,
    )
    names = [(method, kind.name) for method in rounding.METHODS for kind in rounding.KINDS]
    return {name: (int(kept), int(peak)) for name, (kept, peak) in zip(names, rows, strict=True)}


@pytest.mark.parametrize("kind", rounding.KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", rounding.METHODS)
def test_memory_is_what_the_documentation_says(method: str, kind: rounding.Weights) -> None:
    build = memory.variant(method, rounding=kind.rounding, **rounding.METHODS[method])
    used = memory.usage(build, SHAPES, kind.dtype)
    kept, peak = promised()[method, kind.name]
    assert (used.kept, used.grown) == (pytest.approx(kept, abs=0.01), 0)
    if backend_info("cpu")["native"].available:  # the reference works with temporaries
        assert used.peak == pytest.approx(peak, abs=0.01)


@pytest.mark.parametrize("kind", rounding.KINDS, ids=lambda kind: kind.name)
def test_every_kind_learns(kind: rounding.Weights) -> None:
    """In two epochs, twenty steps; of ten classes."""
    assert rounding.accuracy("sam", kind, rho=0.05, lr=3e-3, epochs=2, seed=0) > 25
