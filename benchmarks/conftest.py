from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", default="resnet-18,tiny", help="parameter lists, separated by commas")
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--backend", default=None, help="native, triton or reference")
