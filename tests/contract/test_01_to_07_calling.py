"""Sentences 1 to 7: how a step is called."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from looksam.bases import FUSED
from tests.contract.support import (
    BASES,
    IN_TWO_CALLS,
    PERIODIC,
    WRAPPED,
    Closure,
    assert_same,
    build,
    network,
    on_backends,
    on_pairs,
    on_pairs_in_two_calls,
    on_sharp_pairs,
    on_sharp_variants,
    on_sharp_variants_in_two_calls,
    on_variants,
    passes,
    states,
    train,
    weights,
)


@on_backends
@on_variants
@pytest.mark.parametrize("k", [1, 3])
def test_contract_01_closure_calls_and_first_loss(backend: str, variant: str, k: int) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, k=k, backend=backend)
    closure = Closure(model, optimizer)
    returned = []
    for step in range(7):
        before = len(closure.losses)
        returned.append(optimizer.step(closure).item())
        assert len(closure.losses) - before == passes(variant, step, k)
        assert returned[-1] == closure.losses[before]
    if variant in PERIODIC:
        assert len(closure.losses) == 7 + (passes(variant, 0) - 1) * math.ceil(7 / k)
    assert returned[-1] < returned[0]


@on_backends
@on_pairs_in_two_calls
def test_contract_02_two_call_style_equals_the_closure_style(backend: str, variant: str, base: str) -> None:
    one, two = network(), network()
    optimizer = build(two.parameters(), variant, base, backend=backend)
    backward = Closure(two, optimizer)
    needed = []
    for _ in range(5):
        needed.append(optimizer.needs_second_pass)
        backward()
        assert optimizer.first_step(zero_grad=True) is needed[-1]
        if needed[-1]:
            assert optimizer.needs_second_pass
            backward()
            optimizer.second_step(zero_grad=True)
        assert all(p.grad is None for p in two.parameters())
    assert needed == [passes(variant, step) == 2 for step in range(5)]
    train(one, build(one.parameters(), variant, base, backend=backend), 5)
    assert_same(weights(one), weights(two))


@on_backends
def test_contract_02_davda54_loop_runs_unchanged(backend: str) -> None:
    """The loop of davda54/sam always does both passes; on a reuse or plain step the second is spare."""
    model = network()
    optimizer = build(model.parameters(), "looksam", k=2, backend=backend)
    other = network()
    train(other, build(other.parameters(), "looksam", k=2, backend=backend), 4)
    backward = Closure(model, optimizer)
    for _ in range(4):
        backward()
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True)
    assert_same(weights(other), weights(model))


@on_backends
def test_contract_02_gradients_kept_by_first_step_add_up(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = build([p], "sam", lr=1.0, momentum=0.0, weight_decay=0.0, rho=0.0, backend=backend)
    p.grad = torch.ones(3)
    optimizer.first_step()
    p.grad += 1
    optimizer.second_step()
    assert torch.equal(p.detach(), torch.full((3,), -1.0))


def test_contract_02_misuse_is_an_error() -> None:
    model = network()
    optimizer = build(model.parameters(), "sam", k=1)
    closure = Closure(model, optimizer)
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()
    closure()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="between first_step and second_step"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="between first_step and second_step"):
        optimizer.state_dict()


@pytest.mark.parametrize(("variant", "passes"), [("crsam", 3), ("sampa", 2)])
def test_contract_02_what_cannot_be_split_says_so(variant: str, passes: int) -> None:
    model = network()
    optimizer = build(model.parameters(), variant)
    Closure(model, optimizer)()
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"cannot be split.*its {passes} passes.*call step\(closure\)"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"the gradient (twice|3 times): call step\(closure\)") as caught:
        optimizer.step()
    assert "first_step" not in str(caught.value)
    assert_same(before, weights(model))
    train(model, optimizer, 2)


@on_backends
def test_contract_02_a_second_step_needs_a_first_step_of_its_own(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = build([p], "sam", "sgd", k=2, backend=backend)
    for sharp in (True, False, True, False):
        p.grad = torch.ones(2)
        assert optimizer.first_step() == sharp
        p.grad = torch.ones(2)
        optimizer.second_step()
        with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step\(\)"):
            optimizer.second_step()


@on_backends
@on_sharp_variants_in_two_calls
def test_contract_02_abandon_goes_back(backend: str, variant: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, backend=backend)
    closure, before = Closure(model, optimizer), weights(model)
    closure()
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(before[0], weights(model)[0])
    optimizer.abandon()
    assert_same(before, weights(model))
    optimizer.step(closure)


@on_backends
def test_contract_03_closure_runs_with_grad_enabled(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), backend=backend)
    seen = []
    with torch.no_grad():
        optimizer.step(Closure(model, optimizer, before=lambda call: seen.append(torch.is_grad_enabled())))
        assert not torch.is_grad_enabled()
    assert seen == [True, True]


@on_backends
@on_pairs
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_contract_04_raising_closure_changes_nothing(
    backend: str, variant: str, base: str, failing: int, late: bool
) -> None:
    """Of the third call: of a reuse or plain step, of the third pass or of the next step. Ctrl-C is no Exception, running out of
    memory is one."""
    error = KeyboardInterrupt if late else MemoryError
    model, other = network(), network()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    step = failing // passes(variant, 0)
    train(model, optimizer, step)
    before, state, phase = weights(model), states(optimizer), optimizer.param_groups[0]["phase"]

    def fail(call: int) -> None:
        if call + passes(variant, 0) * step == failing:
            raise error

    with pytest.raises(error):
        optimizer.step(Closure(model, optimizer, **{"after" if late else "before": fail}))
    assert_same(before, weights(model))
    assert_same(state, states(optimizer))
    assert optimizer.param_groups[0]["phase"] == phase
    train(model, optimizer, 3 - step)
    train(other, build(other.parameters(), variant, base, backend=backend), 3)
    assert_same(weights(other), weights(model))


@on_backends
@on_pairs
def test_contract_05_pointers_stay(backend: str, variant: str, base: str) -> None:
    model = network()
    pointers = [p.data_ptr() for p in model.parameters()]
    train(model, build(model.parameters(), variant, base, backend=backend), 4)
    assert pointers == [p.data_ptr() for p in model.parameters()]


@on_backends
@on_sharp_variants
def test_contract_05_restore_is_a_bitwise_copy(backend: str, variant: str) -> None:
    """200 rounds of perturbing and restoring without an update: subtracting e would have drifted."""
    model = network()
    optimizer = build(model.parameters(), variant, k=1, lr=0.0, weight_decay=0.0, momentum=0.0, backend=backend)
    before = weights(model)
    train(model, optimizer, 200)
    assert_same(before, weights(model))


@on_backends
def test_contract_05_parameters_that_move_are_followed(backend: str) -> None:
    """``vector_to_parameters`` gives every parameter other storage."""
    model, other = network(), network()
    optimizer = build(model.parameters(), backend=backend)
    train(model, optimizer, 1)
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    train(model, optimizer, 2)
    train(other, build(other.parameters(), backend=backend), 3)
    assert_same(weights(other), weights(model))


@on_backends
@pytest.mark.parametrize("variant", [name for name in IN_TWO_CALLS if name in PERIODIC])
def test_contract_06_step_without_closure(backend: str, variant: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, backend=backend)
    Closure(model, optimizer)()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"step\(closure\).*first_step\(\)"):
        optimizer.step()
    assert_same(before, weights(model))
    optimizer.step(closure := Closure(model, optimizer))
    before = weights(model)
    closure()
    assert optimizer.step() is None  # a reuse or plain one
    assert not torch.equal(before[0], weights(model)[0])


@on_backends
@on_sharp_pairs
@pytest.mark.parametrize("gradients", ["zero", "none"])
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_contract_06_zero_gradients_create_the_state(
    backend: str, variant: str, base: str, gradients: str, lr: float
) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    before = weights(model)
    if gradients == "zero":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step(closure=None)
    assert_same(before, weights(model))
    assert optimizer.param_groups[0]["phase"] == 0
    for group, value in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = value
    if gradients == "zero":
        created = {name for state in optimizer.state.values() for name in state}
        other = network()
        second = build(other.parameters(), variant, base, backend=backend)
        train(other, second, 1)
        assert created == {name for state in second.state.values() for name in state}
    if base not in WRAPPED:  # their own step counts the call
        train(model, optimizer, 3)
        other = network()
        train(other, build(other.parameters(), variant, base, backend=backend), 3)
        assert_same(weights(other), weights(model))


@on_backends
def test_contract_07_closure_that_takes_ddp_sync(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), m_sharpness=True, backend=backend)
    seen: list[Any] = []

    def closure(ddp_sync: bool = True) -> torch.Tensor:
        seen.append(ddp_sync)
        optimizer.zero_grad()
        loss = F.mse_loss(model(torch.ones(2, 5)), torch.zeros(2, 3))
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert seen == [False, True, True]
    optimizer.param_groups[0]["phase"] = 0
    with pytest.raises(RuntimeError, match="ddp_sync"):
        optimizer.step(Closure(model, optimizer))  # nothing would keep its gradients apart


def test_every_base_of_the_matrix_is_what_it_says() -> None:
    assert {base for base, _ in BASES.values() if isinstance(base, str)} == set(FUSED)
