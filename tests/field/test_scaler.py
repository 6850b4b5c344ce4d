"""Loss scales in the two-call style, where first_step runs before the scaler says what the scale is; steps left out."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import looksam
from tests.contract.support import (
    DECIDING,
    IN_TWO_CALLS,
    PAIRS,
    VARIANTS,
    Closure,
    WrappedRMSprop,
    assert_same,
    build,
    data,
    network,
    on_backends,
    states,
    weights,
)


def scaled_steps(model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if optimizer.needs_second_pass and optimizer.first_step(zero_grad=True):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@on_backends
@pytest.mark.parametrize(("variant", "base"), [(v, b) for v, b in PAIRS if v in IN_TWO_CALLS and v not in DECIDING])
def test_field_14_resuming_under_a_scaler_is_bitwise(backend: str, variant: str, base: str) -> None:
    """The scale grows every other step. (AE-SAM's choice depends on a scale that it may not know: it asks for a closure.)"""
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=3e3, growth_interval=2)
    optimizer = build(model.parameters(), variant, base, backend=backend, perturb_eps=1e-3)
    for _ in range(4):
        scaled_steps(model, optimizer, scaler, 1)
        buffer = io.BytesIO()
        torch.save([x.state_dict() for x in (model, optimizer, scaler)], buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        other, other_scaler = network(1), torch.amp.GradScaler("cpu")
        second = build(other.parameters(), variant, base, backend=backend, perturb_eps=1e-3)
        for x, state in zip((other, second, other_scaler), saved, strict=True):
            x.load_state_dict(state)
        straight = copy.deepcopy({"model": model, "optimizer": optimizer, "scaler": scaler})
        scaled_steps(straight["model"], straight["optimizer"], straight["scaler"], 3)
        scaled_steps(other, second, other_scaler, 3)
        assert_same(weights(straight["model"]), weights(other))
        assert_same(states(straight["optimizer"]), states(second))


@on_backends
@pytest.mark.parametrize("variant", ["vasso", "friendlysam"])
def test_field_14_the_scale_makes_no_difference_after_resuming(backend: str, variant: str) -> None:
    """Against steps without a scaler: powers of two only move exponents."""
    plain, model = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    unscaled = build(plain.parameters(), variant, backend=backend)
    optimizer = build(model.parameters(), variant, backend=backend)
    scaled_steps(model, optimizer, scaler, 2)
    second = build(model.parameters(), variant, backend=backend)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scaled_steps(model, second, scaler, 2)
    scaled_steps(plain, unscaled, torch.amp.GradScaler("cpu", enabled=False), 4)
    for a, b in zip(weights(plain), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@on_backends
@pytest.mark.parametrize("base", ["sgd", WrappedRMSprop])
def test_field_16_15_skipped_steps_are_counted(backend: str, base: Any) -> None:
    model = network()
    optimizer = looksam.LookSAM(model.parameters(), base, lr=0.1, k=2, backend=backend)
    bad = {1, 2, 5}
    step = 0

    def after(call: int) -> None:
        if step in bad:
            model[0].weight.grad[0, 0] = torch.nan

    closure = Closure(model, optimizer, after=after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):  # noqa: B007
            optimizer.step(closure)
    assert isinstance(optimizer.skipped_steps, torch.Tensor)
    assert optimizer.skipped_steps == 3


def test_field_16_15_one_warning_after_ten_in_a_row() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = looksam.SAM([p], "sgd", lr=0.1)

    def steps(count: int, value: float) -> list[str]:
        def closure() -> float:
            p.grad = torch.full((3,), value)
            return 0.0

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                optimizer.step(closure)
        return [str(w.message) for w in caught]

    assert steps(9, torch.nan) == []
    assert steps(1, 1.0) == []
    assert steps(9, torch.inf) == []
    assert ["10 steps in a row" in text and "skipped_steps" in text for text in steps(1, torch.nan)] == [True]
    assert steps(20, torch.nan) == [], "said once"
    assert optimizer.skipped_steps == 39


def test_field_16_15_every_variant_has_the_count() -> None:
    assert all(cls.skipped_steps.__doc__ for cls in VARIANTS.values())
