"""Whatever fails in the middle of a step, and wherever: weights, state and phase as before, and the next step works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from looksam import bases
from looksam_kernels import ops
from tests.contract.support import (
    DECIDING,
    PERIODIC,
    WRAPPED,
    Closure,
    assert_same,
    build,
    network,
    on_backends,
    on_pairs,
    on_products,
    passes,
    states,
    train,
    weights,
)


class Injected(BaseException):
    """Not an Exception, as Ctrl-C is none."""


@contextmanager
def fault(at: int, when: str, seen: list[str]) -> Iterator[None]:
    """Raises before or after the at-th call of anything that a step does to tensors; ``seen`` are the calls that came."""
    names = ("measure", "measure_and_perturb", "measure_and_step", "perturb", "step")
    places: list[tuple[Any, str]] = [*((ops, name) for name in names), (bases.Wrapped, "step")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            mine = len(seen) - 1 == at
            if mine and when == "before":
                raise Injected
            result = original(*args, **kwargs)
            if mine:
                raise Injected
            return result

        return call

    try:
        for owner, name, original in originals:
            setattr(owner, name, watched(name if owner is ops else "wrapped", original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@on_backends
@on_products
@pytest.mark.parametrize("step", [0, 1, 2], ids=["first", "cheap", "sharp"])
def test_fault_at_every_point_of_a_step(backend: str, variant: str, base: str, step: int) -> None:
    model, other = network(), network()
    straight = build(other.parameters(), variant, base, backend=backend)
    train(other, straight, step)
    calls: list[str] = []
    with fault(-1, "", calls):
        train(other, straight, 1)
    assert calls[-1] in (("wrapped",) if base in WRAPPED else ("step", "measure_and_step"))
    assert calls.count("measure_and_perturb") == (2 if variant == "sampa" else passes(variant, step) - 1)
    optimizer = build(model.parameters(), variant, base, backend=backend)
    train(model, optimizer, step)
    before, state, phase = weights(model), states(optimizer), optimizer.param_groups[0]["phase"]
    for at in range(len(calls)):
        is_done = at == len(calls) - 1 or calls[at] == "measure_and_step"  # afterwards
        for when in ("before",) if is_done else ("before", "after"):
            with pytest.raises(Injected), fault(at, when, []):
                optimizer.step(Closure(model, optimizer))
            assert_same(before, weights(model), f"{when} {calls[at]}: ")
            assert_same(state, states(optimizer), f"{when} {calls[at]}: ")
            assert optimizer.param_groups[0]["phase"] == phase
    train(model, optimizer, 2)
    train(other, straight, 1)
    assert_same(weights(other), weights(model))


@on_backends
@on_pairs
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_non_finite_gradient_in_every_pass(backend: str, variant: str, base: str, value: float) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    good = network()
    straight = build(good.parameters(), variant, base, backend=backend)
    train(good, straight, 2)
    train(model, optimizer, 2)
    before, state = weights(model), states(optimizer)
    for step, bad_call in [(s, call) for s in range(2) for call in range(passes(variant, s))]:
        tensor, phase = (0, 3, 1)[bad_call], step if variant in PERIODIC else 0

        def poison(call: int, bad_call: int = bad_call, tensor: int = tensor) -> None:
            if call == bad_call:
                list(model.parameters())[tensor].grad.view(-1)[-1] = value

        optimizer.param_groups[0]["phase"] = phase
        optimizer.step(closure := Closure(model, optimizer, after=poison))
        assert len(closure.losses) == (1 if variant in DECIDING and bad_call == 0 else passes(variant, step))
        assert_same(before, weights(model))
        assert_same(state, states(optimizer))
        assert optimizer.param_groups[0]["phase"] == ((phase + 1) % 2 if variant in PERIODIC else 0)
    for name in optimizer.counted:  # moved by the steps that were left out, as the host does not know of them
        optimizer.param_groups[0][name] = straight.param_groups[0][name]
    train(model, optimizer, 2)
    train(good, straight, 2)
    assert_same(weights(good), weights(model))
