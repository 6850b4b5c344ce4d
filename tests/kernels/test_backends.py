"""Every backend has the functions of the protocol, with its arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from looksam_kernels import TensorTable, backend_info, backends, sums
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
    assert set(functions(backends.Extras)) == {
        "measure",
        "measure_and_perturb",
        "measure_and_step",
        "forget",
        "take_gradients",
        "first_misfit",
        "only_on_request",
    }


@pytest.mark.parametrize("backend", [name for name in backends.ORDER if backend_info("cpu")[name].available])
@pytest.mark.parametrize("absent", [(), (1,), (0, 1, 2)])
def test_gradients_taken_at_once_are_those_of_a_list(backend: str, absent: tuple[int, ...]) -> None:
    params = [torch.nn.Parameter(torch.ones(n, 2)) for n in (1, 2, 3)]
    for row, p in enumerate(params):
        p.grad = None if row in absent else torch.full_like(p, row)
    table = TensorTable([p.detach() for p in params], backend=backend, g=[torch.zeros_like(p) for p in params])
    if not table.take_gradients("g", params):
        table["g"] = [p.grad for p in params]
    assert "g" in table
    assert table.present("g") == [row not in absent for row in range(3)]
    assert table.is_full("g") is (not absent)
    assert all(x is p.grad for x, p in zip(table["g"], params, strict=True))
    found = sums(table, [("g", "g")]).values[0]
    assert found.tolist() == [0.0 if p.grad is None else p.grad.square().sum().item() for p in params]
    table.drop("g")
    assert table["g"] == [None] * 3
    assert table.present("g") == [False] * 3
    assert not table.is_full("g")


@pytest.mark.skipif(not backend_info("cpu")["native"].available, reason="the other backends take lists")
def test_gradients_that_do_not_fit_are_left_to_the_list_which_has_the_words() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    table = TensorTable([p.detach()], backend="native")
    p.grad = torch.zeros(2, 2)
    assert table.take_gradients("g", [p])
    p.grad.resize_(4)
    assert not table.take_gradients("g", [p])
    with pytest.raises(ValueError, match=r"column 'g', row 0: shape \(4,\) does not fit parameter \(2, 2\)"):
        table["g"] = [p.grad]
