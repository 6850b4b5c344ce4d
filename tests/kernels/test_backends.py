"""Every backend has the functions of the protocol, with its arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from looksam_kernels import backends
from looksam_kernels.backends.split import Split

IMPLEMENTATIONS = {name: importlib.import_module(f"looksam_kernels.backends.{name}") for name in backends.ORDER}
IMPLEMENTATIONS["split"] = Split({})


def functions(protocol: type) -> dict[str, Callable[..., Any]]:
    return {name: x for name, x in vars(protocol).items() if inspect.isfunction(x) and not name.startswith("_")}


def arguments(function: Callable[..., Any]) -> list[str]:
    """The names of those that must be given."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name != "self"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_it_has_what_the_protocol_names(name: str) -> None:
    for function, declared in functions(backends.Backend).items():
        assert arguments(getattr(IMPLEMENTATIONS[name], function)) == arguments(declared), function
    for function, declared in functions(backends.Extras).items():
        optional = getattr(IMPLEMENTATIONS[name], function, None)
        assert optional is None or arguments(optional) == arguments(declared), function


def test_the_protocol_is_what_the_ops_call() -> None:
    assert set(functions(backends.Backend)) == {"unavailable", "sums", "coefficients", "perturb", "step", "restore"}
    assert set(functions(backends.Extras)) == {"measure", "forget", "first_misfit", "only_on_request"}
