"""A pytest plugin: every n-th of the tests that were chosen."""

from __future__ import annotations

import os

import pytest

from tests.gpu.toolchain import EVERY


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = items[:: int(os.environ[EVERY])]
