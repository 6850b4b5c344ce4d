"""SAMPa on two ranks: each runs one pass a step, and both take the step of one process, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import looksam
from tests.contract.support import BACKENDS, BASES
from tests.distributed.ranks import Ranks
from tests.distributed.training import arrays

STEPS = 4


class Net(nn.Module):
    """A channels_last kernel, a tensor that only even steps use, one that none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.head, self.extra, self.unused = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).tanh().mean((2, 3))
        return self.head(features) + (self.extra(features) if self.step % 2 == 0 else 0)


def train(model: Net, optimizer: Any, amp: Any = None, spoil: int = -1) -> tuple[list[float], int]:
    """The losses, and how often the closure was called."""
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    losses, calls = [], 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(model.conv.weight.dtype)).float(), torch.arange(6) % 2)
        (loss if amp is None else amp.scale(loss)).backward()
        if calls - 1 == spoil:
            model.head.weight.grad[0, 0] = torch.inf
        return loss.detach()

    for _ in range(STEPS):
        if amp is None:
            losses.append(optimizer.step(closure).item())
        else:
            losses.append(amp.step(optimizer, closure).item())
            amp.update()
        model.step += 1
    return losses, calls


def build(model: nn.Module, base: str, **kwargs: Any) -> looksam.SAMPa:
    name, hyper = BASES[base]
    options = {"previous_batch": False, "max_grad_norm": 0.5, **hyper, **kwargs}
    return looksam.SAMPa(model.parameters(), name, rho=0.3, **options)


def kept(model: nn.Module, optimizer: Any) -> list[np.ndarray]:
    state = optimizer.state_dict()["state"]
    return arrays(x.float() for x in [*model.parameters(), *(t for s in state.values() for t in s.values())])


def run(rank: int, base: str, dtype: torch.dtype, paired: bool, kwargs: dict[str, Any]) -> Any:
    model = Net().to(dtype)
    group = distributed.group.WORLD if paired else None
    optimizer = build(model, base, process_group=group, **kwargs)
    losses, calls = train(model, optimizer)
    return kept(model, optimizer), losses, calls


def assert_equal(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_take_the_steps_of_one(ranks: Ranks, backend: str, base: str, dtype: torch.dtype) -> None:
    (one, losses, calls), _ = ranks.run(run, base, dtype, False, {"backend": backend})
    (first, losses0, calls0), (second, losses1, calls1) = ranks.run(run, base, dtype, True, {"backend": backend})
    assert (calls, calls0, calls1) == (2 * STEPS, STEPS, STEPS)
    assert_equal(one, first)
    assert_equal(one, second)
    assert losses0 == losses, "rank 0's is the pass whose loss one process returns"
    assert losses1 != losses
    assert losses1[0] == losses[0], "the first step has no y"


def on_batches(rank: int, paired: bool, kwargs: dict[str, Any]) -> Any:
    """Each step has a batch of its own; the closure keeps the one before."""
    model, group, last, asked = Net(), distributed.group.WORLD if paired else None, None, []
    optimizer = looksam.SAMPa(
        model.parameters(), "sgd", rho=0.3, lr=0.1, momentum=0.9, weight_decay=0.05, process_group=group, **kwargs
    )
    for step in range(STEPS):
        x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))

        def closure(previous: bool = False, x: Tensor = x, last: Any = last) -> Tensor:
            asked.append(previous)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(last if previous and last is not None else x), torch.arange(6) % 2)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        model.step, last = model.step + 2, x
    return kept(model, optimizer), asked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{}, {"sgd_step": True}], ids=str)
def test_two_ranks_take_their_gradients_on_two_batches(ranks: Ranks, backend: str, kwargs: dict[str, Any]) -> None:
    kwargs = {**kwargs, "backend": backend}
    (one, asked), _ = ranks.run(on_batches, False, kwargs)
    (first, asked0), (second, asked1) = ranks.run(on_batches, True, kwargs)
    assert (asked, asked0, asked1) == ([True, False] * STEPS, [True] * STEPS, [False] * STEPS)
    assert_equal(one, first)
    assert_equal(one, second)
    same, _ = ranks.run(on_batches, False, {**kwargs, "previous_batch": False})[0]
    assert any(not np.array_equal(a, b) for a, b in zip(one, same, strict=True))


def overflow(rank: int, spoiled: int, step: int) -> Any:
    model = Net()
    optimizer = build(model, "adamw", process_group=distributed.group.WORLD)
    amp = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    amp.scale(torch.ones(()))
    train(model, optimizer, amp, step if rank == spoiled else -1)
    return kept(model, optimizer), amp.get_scale(), [int(s["step"]) for s in optimizer.state.values()]


@pytest.mark.parametrize("spoiled", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_both(ranks: Ranks, spoiled: int) -> None:
    (first, scale0, counts0), (second, scale1, counts1) = ranks.run(overflow, spoiled, 1)
    assert_equal(first, second)
    assert scale0 == scale1 == 32.0
    assert counts0 == counts1
    assert max(counts0) == STEPS - 1


def resume(rank: int) -> Any:
    model = Net()
    optimizer = build(model, "sgd", process_group=distributed.group.WORLD)
    train(model, optimizer)
    other = Net()
    second = build(other, "sgd", process_group=distributed.group.WORLD)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(other, second)
    return kept(model, optimizer), kept(other, second)


def test_a_checkpoint_goes_on(ranks: Ranks) -> None:
    for straight, resumed in ranks.run(resume):
        assert_equal(straight, resumed)


def misuse(rank: int) -> list[str]:
    said = []

    def attempt(action: Any) -> None:
        try:
            action()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    alone = [distributed.new_group([r]) for r in range(2)][rank]
    attempt(lambda: looksam.SAMPa(params, "sgd", lr=0.1, process_group=alone))
    optimizer = looksam.SAMPa(params, "sgd", lr=0.1, process_group=distributed.group.WORLD, previous_batch=False)

    def closure(used: list[Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.sum() for p in used), start=torch.zeros(()))
        loss.backward()
        return loss

    attempt(lambda: optimizer.step(lambda: closure([params[rank]])))
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    optimizer.step(lambda: closure(params))
    before = [p.detach().clone() for p in params]
    attempt(lambda: optimizer.step(lambda: closure([params[rank]])))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    attempt(lambda: copy.deepcopy(optimizer))
    attempt(lambda: looksam.SAMPa(params, "sgd", lr=0.1, process_group=distributed.group.WORLD, m_sharpness=True))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)]))
    attempt(lambda: looksam.SAMPa([sharded], "sgd", lr=0.1, process_group=distributed.group.WORLD))
    return said


def test_errors(ranks: Ranks) -> None:
    for said in ranks.run(misuse):
        assert said == [
            "ValueError: process_group must have two ranks, not 1",
            *2 * ["RuntimeError: only one of the two ranks has a gradient of the parameters number [0, 1]"],
            "RuntimeError: an optimizer with a process_group cannot be copied or pickled: use state_dict()",
            "ValueError: SAMPa takes process_group or m_sharpness, not both",
            "TypeError: SAMPa with a process_group takes no sharded parameters",
        ]
