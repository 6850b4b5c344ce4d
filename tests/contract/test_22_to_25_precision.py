"""Sentences 22 to 25: loss scaling, the autocast cache, low-precision parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from looksam.bases import FUSED
from tests.contract.support import (
    DECIDING,
    IN_TWO_CALLS,
    PAIRS,
    PERIODIC,
    REUSING,
    VARIANTS,
    Closure,
    assert_same,
    backward,
    build,
    network,
    on_backends,
    on_pairs,
    on_sharp_variants,
    passes,
    states,
    train,
    weights,
    works,
)

SCALE = 2.0**10


def scaler() -> torch.amp.GradScaler:
    """One whose scale is there: torch makes it in the first ``scale()``, before which its ``step`` refuses."""
    made = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
    made.scale(torch.zeros(()))
    return made


def poison(model: nn.Module, bad_call: int) -> Callable[[int], None]:
    """Makes one gradient infinite after that backward."""

    def after(call: int) -> None:
        if call == bad_call:
            next(model.parameters()).grad.view(-1)[0] = torch.inf

    return after


@on_backends
@on_pairs
def test_contract_22_scaled_steps_equal_unscaled_ones(backend: str, variant: str, base: str) -> None:
    """The scale is a power of two, so nothing is rounded differently but the sums' last bits."""
    model, other, amp = network(), network(), scaler()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    closure = Closure(model, optimizer, scale=amp.scale)
    for _ in range(5):
        before = len(closure.losses)
        loss = amp.step(optimizer, closure)
        assert loss.item() == closure.losses[before]
        amp.update()
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    train(other, build(other.parameters(), variant, base, backend=backend), 5)
    for a, b in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert amp.get_scale() == SCALE


@on_backends
@on_pairs
@pytest.mark.parametrize(("steps_before", "bad_call"), [(0, 0), (0, 1), (2, 0), (2, 1), (1, 0)])
def test_contract_22_overflow_changes_nothing_and_halves_the_scale(
    backend: str, variant: str, base: str, steps_before: int, bad_call: int
) -> None:
    """Pass 1 only, pass 2 only, a reuse or plain step; on a fresh optimizer and on one with state."""
    model, amp = network(), scaler()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    for _ in range(steps_before):
        amp.step(optimizer, Closure(model, optimizer, scale=amp.scale))
        amp.update()
    before, state = weights(model), states(optimizer)
    bad_call = min(bad_call, passes(variant, steps_before) - 1)
    amp.step(optimizer, Closure(model, optimizer, scale=amp.scale, after=poison(model, bad_call)))
    amp.update()
    assert amp.get_scale() == SCALE / 2
    assert_same(before, weights(model))
    assert_same(state, states(optimizer))
    assert optimizer.param_groups[0]["phase"] == ((steps_before + 1) % 2 if variant in PERIODIC else 0)
    for _ in range(2):
        amp.step(optimizer, Closure(model, optimizer, scale=amp.scale))
        amp.update()
    assert amp.get_scale() == SCALE / 2, "gradients left over from the skipped step must not count"
    assert not torch.equal(before[0], weights(model)[0])


@on_backends
@pytest.mark.parametrize("variant", ["sam", *REUSING])
@pytest.mark.parametrize("bad_call", [0, 1])
def test_contract_22_without_a_scaler_a_non_finite_step_is_skipped_too(
    backend: str, variant: str, bad_call: int
) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, "adamw", backend=backend)
    train(model, optimizer, 2)
    before, state = weights(model), states(optimizer)
    optimizer.step(Closure(model, optimizer, after=poison(model, bad_call)))
    assert_same(before, weights(model))
    assert_same(state, states(optimizer))


@on_backends
@pytest.mark.parametrize("variant", [name for name in IN_TWO_CALLS if name not in DECIDING])
@pytest.mark.parametrize("bad_call", [None, 0, 1])
def test_contract_22_two_call_style(backend: str, variant: str, bad_call: int | None) -> None:
    """``scaler.step(optimizer)`` in place of ``second_step``, and on reuse or plain steps in place of ``first_step``."""
    model, other, amp = network(), network(), scaler()
    optimizer = build(model.parameters(), variant, backend=backend)
    bad_call = bad_call and min(bad_call, passes(variant, 0) - 1)
    backward = Closure(model, optimizer, scale=amp.scale, after=poison(model, -1 if bad_call is None else bad_call))
    before = weights(model)
    for _ in range(3):
        backward()
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            backward()
        amp.step(optimizer)
        amp.update()
        if bad_call is not None:
            assert_same(before, weights(model))
            assert amp.get_scale() == SCALE / 2
            return
    train(other, build(other.parameters(), variant, backend=backend), 3)
    for a, b in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class ScalarsRead(TorchDispatchMode):
    """Counts, on the CPU, what would be a synchronisation on a GPU: ``item()``, ``bool()``, ``nonzero()`` of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("variant", "base"), [(v, b) for v, b in PAIRS if b in FUSED])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_22_no_scalar_is_read(variant: str, base: str, scaled: bool, dtype: torch.dtype) -> None:
    """By the driver and the reference; what a backend does inside is not seen here."""
    model, amp = network(dtype=dtype), scaler()
    optimizer = build(model.parameters(), variant, base, backend="reference")
    x = torch.ones(2, 5, dtype=dtype)

    def closure(kept: None = None) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).float().square().sum()
        return backward(optimizer, loss, amp.scale if scaled else lambda loss: loss)

    with ScalarsRead() as read:
        for _ in range(4):
            _ = amp.step(optimizer, closure) if scaled else optimizer.step(closure)
            if scaled:
                amp.update()
    assert read.count == (4 if variant in DECIDING else 0)


@on_backends
def test_contract_22_a_raising_closure_does_not_square_the_scale(backend: str) -> None:
    model, amp = network(), scaler()
    optimizer = build(model.parameters(), "sam", k=1, backend=backend)

    def fail(call: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        amp.step(optimizer, Closure(model, optimizer, scale=amp.scale, after=fail))
    assert not hasattr(optimizer, "grad_scale")
    amp.step(optimizer, Closure(model, optimizer, scale=amp.scale))
    other = network()
    train(other, build(other.parameters(), "sam", k=1, backend=backend), 1)
    for a, b in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_contract_22_keyword_closure_is_refused_by_torch() -> None:
    model, amp = network(), scaler()
    optimizer = build(model.parameters())
    with pytest.raises(RuntimeError, match="Closure use"):
        amp.step(optimizer, closure=Closure(model, optimizer, scale=amp.scale))


@on_backends
def test_contract_22_disabled_scaler(backend: str) -> None:
    model, amp = network(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = build(model.parameters(), backend=backend)
    other = network()
    for _ in range(3):
        amp.step(optimizer, Closure(model, optimizer, scale=amp.scale))
        amp.update()
    train(other, build(other.parameters(), backend=backend), 3)
    assert_same(weights(other), weights(model))


@on_backends
@pytest.mark.parametrize("base", ["sgd", "adamw", "lars", "rmsprop", "wrapped rmsprop"])
def test_contract_23_unscale_and_clip_before_a_cheap_step(backend: str, base: str) -> None:
    def run(amp: Any) -> list[torch.Tensor]:
        model = network()
        optimizer = build(model.parameters(), "looksam", base, backend=backend)
        closure = Closure(model, optimizer, scale=amp.scale if amp else lambda loss: loss)
        if amp:
            amp.step(optimizer, closure)
            amp.update()
        else:
            optimizer.step(closure)
        closure()
        if amp:
            amp.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert norm > 0.01
        if amp:
            amp.step(optimizer)
            amp.update()
        else:
            optimizer.step()
        return weights(model)

    for a, b in zip(run(None), run(scaler()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_contract_23_unscale_before_a_closure_is_an_error() -> None:
    model, amp = network(), scaler()
    optimizer = build(model.parameters())
    closure, before = Closure(model, optimizer, scale=amp.scale), weights(model)
    closure()
    amp.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        amp.step(optimizer, closure)
    assert_same(before, weights(model))
    assert not hasattr(optimizer, "found_inf")


@on_backends
@on_sharp_variants
def test_contract_24_autocast_cache(backend: str, variant: str) -> None:
    """Inside one autocast region: the second gradient must be of the perturbed weights, the next step of the new ones."""
    torch.manual_seed(0)
    # Two uses of one weight make the cast worth caching; large rho, so that bfloat16 sees the perturbation.
    layer = nn.Linear(5, 5, bias=False)
    optimizer = build(layer.parameters(), variant, lr=0.5, momentum=0.0, rho=1.0, k=1, backend=backend)
    x, seen, inside = torch.randn(4, 5), [], []

    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def closure(kept: None = None) -> torch.Tensor:
        optimizer.zero_grad()
        inside.append(torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        return backward(optimizer, layer(layer(x)).float().square().mean())

    if variant == "sampa":
        optimizer.step(closure)  # both passes at w, as there is nothing to perturb along yet
        seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True):
        losses = [optimizer.step(closure).item() for _ in range(2)]
    assert all(inside[-4:])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert losses[0] != losses[1]


@on_backends
@pytest.mark.parametrize(
    ("variant", "base"), [(v, b) for v in VARIANTS for b in ("sgd", "adamw", "lamb") if works(v, b)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contract_25_masters_gather_small_updates(backend: str, variant: str, base: str, dtype: torch.dtype) -> None:
    """Updates far below the parameters' resolution add up in the master instead of being rounded away."""
    p = nn.Parameter(torch.full((64,), 1.0, dtype=dtype))
    no_reuse = {"alpha": 0.0} if variant in REUSING else {}  # a constant gradient leaves no q but rounding errors
    optimizer = build([p], variant, base, lr=1e-4, weight_decay=0.0, backend=backend, **no_reuse)
    before = p.detach().clone()

    def closure(kept: None = None) -> torch.Tensor:
        optimizer.zero_grad()
        return backward(optimizer, p.float().sum())

    for _ in range(10):
        optimizer.step(closure)
    if optimizer.perturbed_at_rest:
        optimizer.eval()
    master = optimizer.state[p]["master_param"]
    assert master.dtype == torch.float32
    assert (master < 1 - 5e-5).all()
    assert torch.equal(p.detach(), master.to(dtype))
    if optimizer.perturbed_at_rest:
        optimizer.train()
    for _ in range(100):
        optimizer.step(closure)
    if optimizer.perturbed_at_rest:
        optimizer.eval()
    assert (p.detach() < before).all()


@on_backends
@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "in a hook"])
def test_contract_25_masters_follow_what_others_write(backend: str, how: str) -> None:
    model, target = network(dtype=torch.bfloat16), network(3, dtype=torch.bfloat16)
    optimizer = build(model.parameters(), "looksam", "sgd", lr=0.0, weight_decay=0.0, backend=backend)
    train(model, optimizer, 2)

    def overwrite(*_: Any) -> None:
        with torch.no_grad():
            for p, new in zip(model.parameters(), target.parameters(), strict=True):
                p.copy_(new)

    if how == "load_state_dict":
        model.load_state_dict(target.state_dict())
    elif how == "copy_":
        overwrite()
    else:
        handle = optimizer.register_step_post_hook(overwrite)
        train(model, optimizer, 1)
        handle.remove()
    train(model, optimizer, 2)
    assert_same(weights(target), weights(model))


@on_backends
@pytest.mark.parametrize("model_first", [True, False])
def test_contract_25_checkpoints_keep_the_exact_master(backend: str, model_first: bool) -> None:
    model = network(dtype=torch.bfloat16)
    optimizer = build(model.parameters(), "looksam", "adamw", backend=backend)
    train(model, optimizer, 3)
    other = network(5, dtype=torch.bfloat16)
    second = build(other.parameters(), "looksam", "adamw", backend=backend)
    train(other, second, 2)
    loads = [(other, model), (second, optimizer)]
    for target, source in loads if model_first else loads[::-1]:
        target.load_state_dict(copy.deepcopy(source.state_dict()))  # torch shares tensors otherwise
    train(model, optimizer, 3)
    train(other, second, 3)
    assert_same(weights(model), weights(other))
    assert_same(states(optimizer), states(second))


@on_backends
def test_contract_25_model_that_changes_its_dtype(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), "looksam", "adamw", backend=backend)
    train(model, optimizer, 2)
    model.to(torch.bfloat16)
    train(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["master_param"].dtype == torch.float32
    model.to(torch.float32)
    train(model, optimizer, 3)
