"""What is saved comes back as it was, and a checkpoint of something else is told apart."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import looksam
from tests.contract.support import (
    PAIRS,
    build,
    network,
    train,
)

PLAIN = {"lamb": looksam.LAMB, "lars": looksam.LARS, "lion": looksam.Lion}


def written_and_read(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Keys, their number, types and bits."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b) or a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def makers() -> dict[str, Any]:
    pairs = {f"{v} over {b}": (lambda params, v=v, b=b: build(params, v, b)) for v, b in PAIRS}
    return pairs | {name: (lambda params, cls=cls: cls(params, lr=0.01)) for name, cls in PLAIN.items()}


@pytest.mark.parametrize("name", makers())
def test_field_15_state_dict_after_loading_is_what_was_saved(name: str) -> None:
    model, other = network(), network(1)
    make = makers()[name]
    optimizer = make(
        [{"params": model[0].parameters(), "tag": "body"}, {"params": model[2].parameters(), "lr_scale": 0.5}]
    )
    train(model, optimizer, 3)
    optimizer.param_groups[1]["initial_lr"] = 0.5
    saved = copy.deepcopy(optimizer.state_dict())
    second = make([{"params": other[0].parameters()}, {"params": other[2].parameters()}])
    for _ in range(2):  # and again
        second.load_state_dict(written_and_read(saved))
        assert_equal(saved, second.state_dict())
    clone = copy.deepcopy(second)
    assert_equal(saved, clone.state_dict())
    clone.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert clone.param_groups[-1].keys() - {"tag"} == saved["param_groups"][0].keys() - {"tag"}


@pytest.mark.parametrize("name", PLAIN)
def test_field_15_timms_tests_of_a_state_dict(name: str) -> None:
    """The steps of timm's ``_test_state_dict``: a second optimizer, built on a copy of the weights, with the state of the
    first goes the same way, and keeps it with more groups of other learning rates."""
    weight, bias = (nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10)))
    x = torch.randn(5)
    make = PLAIN[name]
    optimizer = make([weight, bias], lr=1e-3)

    def step(w: nn.Parameter, b: nn.Parameter, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        (w @ x + b).square().sum().backward()
        opt.step()

    for _ in range(20):
        step(weight, bias, optimizer)
    w, b = copy.deepcopy(weight), copy.deepcopy(bias)
    second = make([w, b], lr=1e-3)
    before = copy.deepcopy(optimizer.state_dict())
    second.load_state_dict(before)
    assert optimizer.state_dict()["param_groups"] == second.state_dict()["param_groups"]
    for _ in range(20):
        step(weight, bias, optimizer)
        step(w, b, second)
        assert torch.equal(weight, w)
        assert torch.equal(bias, b)
    assert_equal(optimizer.state_dict(), second.state_dict())
    for group in before["param_groups"]:
        del group["maximize"]  # of a version before the option
    second.load_state_dict(before)
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
