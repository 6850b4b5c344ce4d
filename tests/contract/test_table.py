"""docs/contract.md: no sentence without a test, no test that is not there, no sentence missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SENTENCES = 44


def defined() -> set[str]:
    """The names of all test functions of the four folders."""
    files = [
        f
        for folder in ("contract", "distributed", "interop", "field")
        for f in (ROOT / "tests" / folder).glob("test_*.py")
    ]
    trees = [ast.parse(f.read_text()) for f in files]
    return {
        n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"
    }


def rows() -> dict[int, list[str]]:
    """Sentence -> the tests that its row names."""
    lines = (ROOT / "docs" / "contract.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ \|", line)]
    assert all(len(row) == 4 and row[3] for row in cells), "four columns, each with its status"
    return {int(row[0]): re.findall(r"`(test_\w+)`", row[2]) for row in cells}


def test_every_sentence_has_its_tests() -> None:
    table, tests = rows(), defined()
    assert sorted(table) == list(range(1, SENTENCES + 1))
    for number, names in table.items():
        assert names, f"sentence {number} has no test"
        assert any(name.startswith(f"test_contract_{number:02}_") for name in names), number
        assert set(names) <= tests, f"sentence {number}: {set(names) - tests} are not there"


def test_every_numbered_test_has_its_sentence() -> None:
    numbers = {int(m[1]) for name in defined() if (m := re.match(r"test_contract_(\d+)_", name))}
    assert numbers == set(rows())
