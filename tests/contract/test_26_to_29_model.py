"""Sentences 26 to 29: running statistics, random numbers, averages of weights, accumulation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looksam
from tests.contract.support import (
    VARIANTS,
    Closure,
    assert_same,
    build,
    data,
    network,
    on_backends,
    on_variants_in_two_calls,
    train,
    weights,
)

NORMS = {
    "batch1d": (nn.BatchNorm1d, (8, 3)),
    "batch2d": (nn.BatchNorm2d, (4, 3, 2, 2)),
    "batch_cumulative": (lambda n: nn.BatchNorm1d(n, momentum=None), (8, 3)),
    "sync": (nn.SyncBatchNorm, (8, 3)),
    "instance": (lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True), (8, 3, 4)),
    "lazy": (lambda n: nn.LazyBatchNorm1d(), (8, 3)),
}


def stats(model: nn.Module) -> list[torch.Tensor]:
    return [b.detach().clone() for b in model.buffers()]


@on_backends
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("style", ["closure", "two calls"])
def test_contract_26_statistics_move_in_the_first_pass_only(backend: str, norm: str, style: str) -> None:
    make, shape = NORMS[norm]
    torch.manual_seed(0)
    model = nn.Sequential(make(3))
    x = torch.randn(shape)
    model.train(False)(x)  # a lazy one learns its size
    model.train()
    optimizer = build(model.parameters(), "sam", k=1, model=model, backend=backend)
    once = nn.Sequential(make(3))
    once.train(False)(x)
    once.train()
    outputs = []

    def backward() -> torch.Tensor:
        optimizer.zero_grad()
        if norm == "sync":  # without processes it is a batch norm
            y = F.batch_norm(x, model[0].running_mean, model[0].running_var, model[0].weight, model[0].bias, True, 0.1)
            model[0].num_batches_tracked += 1
        else:
            y = model(x)
        outputs.append(y.detach())
        loss = y.pow(4).sum()
        loss.backward()
        return loss

    if style == "closure":
        optimizer.step(backward)
    else:
        backward()
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step()
    if norm == "sync":
        F.batch_norm(x, once[0].running_mean, once[0].running_var, None, None, True, 0.1)
        once[0].num_batches_tracked += 1
    else:
        once(x)
    assert_same(stats(once), stats(model))
    if norm != "sync":
        assert not torch.equal(outputs[0], outputs[1]), "the second pass ran at w + e"


def test_contract_26_statistics_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = build(model.parameters(), "sam", k=1, model=model)
    first: list[torch.Tensor] = []

    def note(call: int) -> None:
        if call == 0:
            first[:] = stats(model)
        else:
            assert_differ(first, stats(model))
            raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(Closure(model, optimizer, after=note))
    assert_same(first, stats(model))
    Closure(model, optimizer)()
    first = stats(model)
    optimizer.first_step(zero_grad=True)
    Closure(model, optimizer)()
    assert_differ(first, stats(model))
    optimizer.abandon()
    assert_same(first, stats(model))


def assert_differ(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_contract_26_frozen_norms_and_evaluation_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    model[0].eval()
    with looksam.frozen_running_stats(model):
        assert model[0].track_running_stats
        assert model[0].running_mean is not None
    assert not model[1].track_running_stats


def test_contract_26_overflow_in_the_second_pass_does_not_reach_the_statistics() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))
    before = stats(model)
    with looksam.frozen_running_stats(model):
        model(torch.full((2, 3, 4), torch.inf))
    assert_same(before, stats(model))


@on_backends
@pytest.mark.parametrize("same_rng", [False, True])
def test_contract_27_same_rng(backend: str, same_rng: bool) -> None:
    torch.manual_seed(0)
    model = network()
    optimizer = build(model.parameters(), "looksam", k=2, same_rng=same_rng, backend=backend)
    masks: list[torch.Tensor] = []
    closure = Closure(model, optimizer, before=lambda call: masks.append(torch.rand(8)))
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(masks[0], masks[1]) is same_rng
    assert torch.equal(masks[3], masks[4]) is same_rng
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], masks[3])
    after = torch.rand(8)
    assert not any(torch.equal(after, mask) for mask in masks)


def test_contract_27_same_rng_needs_the_closure() -> None:
    model = network()
    optimizer = build(model.parameters(), "sam", k=1, same_rng=True)
    before = weights(model)
    Closure(model, optimizer)()
    with pytest.raises(RuntimeError, match="same_rng"):
        optimizer.first_step()
    assert_same(before, weights(model))


@on_backends
@on_variants_in_two_calls
def test_contract_28_average_in_a_hook_sees_restored_weights(backend: str, variant: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, backend=backend)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen: list[list[torch.Tensor]] = []

    def hook(*_: Any) -> None:
        average.update_parameters(model)
        seen.append(weights(model))

    optimizer.register_step_post_hook(hook)
    closure = Closure(model, optimizer)
    for step in range(4):
        closure()
        if optimizer.first_step(zero_grad=True):
            assert len(seen) == step
            closure()
            optimizer.second_step()
        assert_same(seen[-1], weights(model))
    expected = seen[0]
    for now in seen[1:]:
        expected = [0.5 * a + 0.5 * b for a, b in zip(expected, now, strict=True)]
    for a, b in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


@on_backends
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "esam"])  # whose closure calls no backward
def test_contract_29_accumulation_inside_the_closure(backend: str, variant: str) -> None:
    dtype = torch.float64
    x, y = data(dtype)
    whole, parts = network(dtype=dtype), network(dtype=dtype)
    optimizer = build(parts.parameters(), variant, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for micro_x, micro_y in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = F.cross_entropy(parts(micro_x), micro_y) / 4
            loss.backward()
            total += loss.detach()
        return total

    losses = [optimizer.step(closure).item() for _ in range(4)]
    expected = train(whole, build(whole.parameters(), variant, backend=backend), 4)
    assert losses == pytest.approx(expected, abs=1.5e-8)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1.5e-8)


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        train(model, build(model.parameters()), 3)
