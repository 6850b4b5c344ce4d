"""docs/parity.md says how far each method is from the code that it is compared with, and nothing differs without a reason."""

import warnings

import pytest

from tests.optim import parity

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("row", parity.ROWS, ids=lambda row: f"{row.method}, {row.source}, {row.setting}")
def test_a_method_is_that_of_its_source_or_there_is_a_reason(row: parity.Row) -> None:
    if not parity.there(row):
        pytest.skip(f"needs {row.package}")
    found = parity.difference(row)
    if row.reason:
        assert found > 100 * parity.ROUNDING, "the reason has gone"
    else:
        assert found <= parity.ROUNDING


def test_the_page_is_what_the_script_makes() -> None:
    missing = {row.package for row in parity.ROWS if not parity.there(row)}
    if missing:
        pytest.skip(f"needs {', '.join(map(str, missing))}")
    text = parity.PAGE.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert parity.filled(text) == text, "run: python -m tests.optim.parity"
