"""SAMPa on the batches and at the points of the authors' program, next to the formula re-stated in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from tests.optim.cases import QUICK

STEPS = 14
GROUPS = (
    {"rho": 0.3, "lambda_": 0.2, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"rho": 0.1, "lambda_": 0.6, "lr": 0.05, "momentum": 0.5, "weight_decay": 0.0},
)

on_backends = pytest.mark.parametrize("backend", QUICK)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=random, dtype=torch.float64), torch.randint(3, (16,), generator=random)


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": [*layer.parameters()], **h} for layer, h in zip((model[0], model[2]), GROUPS, strict=True)]


def restated(previous_batch: bool, sgd_step: bool) -> list[Tensor]:
    """s at w + rho y / ||y||, r at w - lr y or w - lr (y + wd w + momentum buf); d = (1 - lambda) s + lambda r; y <- r;
    buf <- momentum buf + d + wd w, at first d + wd w; w <- w - lr buf."""
    model = network()
    w = [p.detach().clone() for p in model.parameters()]
    h = [group for group in GROUPS for _ in range(2)]

    def gradient(at: list[Tensor], step: int) -> list[Tensor]:
        for p, x in zip(model.parameters(), at, strict=True):
            p.data, p.grad = x.clone(), None
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        return [p.grad for p in model.parameters()]

    y = [torch.zeros_like(x) for x in w]
    buf: list[Any] = [None] * len(w)
    for step in range(STEPS):
        norm = torch.cat([x.flatten() for x in y]).norm()
        up = [hp["rho"] * x / (norm if norm > 0 else 1) for x, hp in zip(y, h, strict=True)]
        ahead = [
            hp["lr"] * (yp + (hp["weight_decay"] * wp + hp["momentum"] * bp if sgd_step and step else 0))
            for yp, wp, bp, hp in zip(y, w, buf, h, strict=True)
        ]
        s = gradient([a + b for a, b in zip(w, up, strict=True)], max(step - previous_batch, 0))
        r = gradient([a - b for a, b in zip(w, ahead, strict=True)], step)
        d = [(1 - hp["lambda_"]) * a + hp["lambda_"] * b for a, b, hp in zip(s, r, h, strict=True)]
        d = [x + hp["weight_decay"] * wp for x, wp, hp in zip(d, w, h, strict=True)]
        buf = [x if b is None else hp["momentum"] * b + x for x, b, hp in zip(d, buf, h, strict=True)]
        w = [wp - hp["lr"] * b for wp, b, hp in zip(w, buf, h, strict=True)]
        y = r
    return w


class Run:
    """A closure that keeps the batch of the step before, as a user's does."""

    def __init__(self, model: nn.Module, optimizer: Any, sign: float = 1.0) -> None:
        self.model, self.optimizer, self.sign = model, optimizer, sign
        self.asked: list[bool] = []

    def train(self, steps: int = STEPS, begin: int = 0) -> list[Tensor]:
        last = None
        for step in range(begin, begin + steps):

            def closure(previous: bool = False, step: int = step, last: Any = last) -> Tensor:
                self.asked.append(previous)
                self.optimizer.zero_grad()
                x, y = last if previous and last is not None else batch(step)
                loss = self.sign * F.cross_entropy(self.model(x), y)
                loss.backward()
                return loss

            self.optimizer.step(closure)
            last = batch(step)
        return [p.detach().clone() for p in self.model.parameters()]


@on_backends
@pytest.mark.parametrize("previous_batch", [True, False])
@pytest.mark.parametrize("sgd_step", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_sampa_is_the_formula(backend: str, previous_batch: bool, sgd_step: bool, maximize: bool) -> None:
    model = network()
    options = {"previous_batch": previous_batch, "sgd_step": sgd_step, "maximize": maximize, "backend": backend}
    run = Run(model, looksam.SAMPa(groups(model), "sgd", perturb_eps=0.0, **options), -1.0 if maximize else 1.0)
    found = run.train()
    for x, expected in zip(found, restated(previous_batch, sgd_step), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-13)
    assert run.asked == ([True, False] * STEPS if previous_batch else [False] * 2 * STEPS)
    for other in itertools.product((True, False), repeat=2):
        if other != (previous_batch, sgd_step):
            assert max((x - y).abs().max() for x, y in zip(found, restated(*other), strict=True)) > 1e-3


@on_backends
def test_the_weights_of_strided_and_half_precision_parameters_are_read_where_they_are(backend: str) -> None:
    """In ``sgd_step`` w is an input of the perturbation that moves w."""
    values = torch.linspace(-1, 1, 24)
    steps = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for strided in (False, True):
            x = values.to(dtype).clone().reshape(4, 6)
            p = nn.Parameter(x.t().contiguous().t() if strided else x)
            q = nn.Parameter(torch.zeros(12, 2, dtype=dtype)[:, 0] if strided else torch.zeros(12, dtype=dtype))
            optimizer = looksam.SAMPa(
                [p, q], "sgd", lr=0.1, momentum=0.5, weight_decay=1.0, rho=0.5, sgd_step=True, backend=backend
            )
            seen = []

            def closure(previous: bool, p: Any = p, q: Any = q, optimizer: Any = optimizer, seen: Any = seen) -> Tensor:
                optimizer.zero_grad()
                seen.append(p.detach().double().clone())
                loss = ((p - 0.5).double() ** 2).sum() + ((q - 0.25).double() ** 2).sum()
                loss.backward()
                return loss

            for _ in range(3):
                optimizer.step(closure)
            steps.append(torch.stack(seen))
    for other in steps[1:4]:
        torch.testing.assert_close(other, steps[0], rtol=1e-5, atol=1e-6)
    for other in steps[4:]:
        torch.testing.assert_close(other, steps[0], rtol=0.05, atol=0.02)


def mean_rise(previous_batch: bool, backend: str) -> float:
    """Of the loss, from w to the point of the first pass, on the batch of the first pass."""
    model = network()
    optimizer = looksam.SAMPa(
        model.parameters(), "sgd", lr=0.05, rho=0.1, previous_batch=previous_batch, backend=backend
    )
    total, last = 0.0, batch(0)
    for step in range(STEPS):
        on = {True: last, False: batch(step)}
        before = F.cross_entropy(model(on[previous_batch][0]), on[previous_batch][1]).item()

        def closure(previous: bool = False, on: Any = on) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(on[previous][0]), on[previous][1])
            loss.backward()
            return loss.detach()

        total += optimizer.step(closure).item() - before
        last = batch(step)
    return total / STEPS


@on_backends
def test_sampa_measures_sharpness_on_the_batch_that_y_is_of(backend: str) -> None:
    """There the loss rises along y; on another batch it rises less, by what the batches share."""
    assert mean_rise(True, backend) > 2 * abs(mean_rise(False, backend))


def test_a_closure_that_cannot_be_told_which_batch_says_what_to_do() -> None:
    model = network()
    optimizer = looksam.SAMPa(model.parameters(), "sgd", lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"cannot be told which batch.*previous.*previous_batch=False"):
        optimizer.step(lambda: torch.zeros(()))
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step(lambda **_: F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward())


def test_sgd_step_is_for_sgd() -> None:
    p = nn.Parameter(torch.ones(2))
    for base in ("adamw", "lars", torch.optim.Adamax):
        with pytest.raises(ValueError, match='sgd_step=True is for the base "sgd"'):
            looksam.SAMPa([p], base, lr=0.1, sgd_step=True)
    looksam.SAMPa([p], torch.optim.SGD, lr=0.1, sgd_step=True)


def test_a_resumed_run_and_a_copy_go_on_alike() -> None:
    model = network()
    optimizer = looksam.SAMPa(groups(model), "sgd", sgd_step=True)
    Run(model, optimizer).train(3)
    twin, copied = copy.deepcopy(model), copy.deepcopy((model, optimizer))
    resumed = looksam.SAMPa(groups(twin), "sgd", sgd_step=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = Run(model, optimizer).train(3, begin=3)
    for net, opt in ((twin, resumed), copied):
        assert all(map(torch.equal, expected, Run(net, opt).train(3, begin=3)))
