"""docs/compatibility.md says what the tests show, and nothing else."""

from __future__ import annotations

import pytest

from tests.field.classes import PACKAGES, importable
from tests.field.compatibility import PAGE, ROOT, TABLES, filled

EVERYTHING = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "compatibility.py")


@pytest.mark.skipif(not all(map(importable, PACKAGES)), reason="not all packages are installed")
def test_the_page_is_made_from_the_data() -> None:
    text = PAGE.read_text()
    assert filled(text) == text, "run: python -m tests.field.compatibility"


@pytest.mark.parametrize("row", [row for rows in TABLES.values() for row in rows], ids=lambda row: row.subject)
def test_every_row_has_its_test(row: object) -> None:
    assert f"def {row.test}" in EVERYTHING or f"\n{row.test}: " in EVERYTHING  # type: ignore[attr-defined]
