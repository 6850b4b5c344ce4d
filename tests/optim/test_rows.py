"""A variant is a row: it names its rules and its numbers, and has no mathematics of its own."""

import inspect
import re

import pytest
import torch

import looksam
from looksam import variants

LINES = 40
"""With docstring and signature, without the introduction that the one has which users see first."""
ROWS = {name: cls for name, cls in looksam.VARIANTS.items() if cls.__module__ == variants.__name__}
"""What chooses its steps or its samples as well lives elsewhere."""


@pytest.mark.parametrize("cls", ROWS.values(), ids=list(ROWS))
def test_a_variant_is_a_short_row(cls):
    functions = [x.__qualname__ for x in vars(cls).values() if inspect.isfunction(x)]  # torch adds a wrapped step
    assert [name for name in functions if name.startswith(cls.__name__)] == [f"{cls.__name__}.__init__"]
    source = re.sub(r"\n\n    (Beside these|Example::).*?(?=\n    \"{3})", "", inspect.getsource(cls), flags=re.DOTALL)
    assert len(source.splitlines()) <= LINES


def test_most_variants_are_rows():
    assert {"sam", "looksam", "layersam", "gsam", "wsam", "crsam", "vasso", "friendlysam"} <= ROWS.keys()


COSTS = re.compile(r"Passes per step: (?P<passes>.+?)\. Extra memory: (?P<memory>.+?)\.\s")
COMPUTED = {
    "esam": "1 + 0.83/k",  # gamma = 0.5: the forward without a graph is a third of a pass, the second pass half of one
    "aesam": "1 or 2",  # the gradient decides
    "aelooksam": "1 or 2",
}


@pytest.mark.parametrize("name", looksam.VARIANTS)
def test_the_costs_in_the_docstring_are_those_of_the_plans(name):
    needed = {"total_steps": 9} if "total_steps" in inspect.signature(looksam.VARIANTS[name]).parameters else {}
    optimizer = looksam.VARIANTS[name]([torch.nn.Parameter(torch.ones(1))], "sgd", momentum=0.9, **needed)
    sharp, between = optimizer.variant.sharp, optimizer.variant.between
    if "k" in optimizer.param_groups[0]:
        passes = f"{len(between.passes)} + {len(sharp.passes) - len(between.passes)}/k"
    else:
        passes = f"{len(sharp.passes)}"
    copies = ["w" for x in sharp.passes if x.ascent is not None][:1] + [sharp.writes] * (sharp.writes is not None)
    memory = (
        f"{len(copies)} model {'copy' if len(copies) == 1 else 'copies'} ({', '.join(copies)})" if copies else "none"
    )
    found = COSTS.search(" ".join(looksam.VARIANTS[name].__doc__.split()) + " ")
    assert found is not None
    assert (found["passes"], found["memory"]) == (COMPUTED.get(name, passes), memory)
