"""``strength`` and ``normalization``: the ends of their ranges are other methods, bit for bit or to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from tests.contract.support import network, train
from tests.optim.cases import QUICK

on_backends = pytest.mark.parametrize("backend", QUICK)


def weights(cls: Any, steps: int = 6, after: Any = None, **options: Any) -> list[Tensor]:
    model = network(dtype=torch.float64)
    optimizer = cls(model.parameters(), "sgd", lr=0.1, momentum=0.9, **options)
    for _ in range(steps):
        train(model, optimizer, 1)
        if after is not None:
            after(optimizer)
    return [p.detach().clone() for p in model.parameters()]


@on_backends
def test_strength_0_is_the_base_and_1_is_sam(backend: str) -> None:
    sam = weights(looksam.SAM, backend=backend)
    for a, b in zip(sam, weights(looksam.SAM, backend=backend, strength=torch.tensor(1.0)), strict=True):
        assert torch.equal(a, b)
    plain = weights(looksam.SAM, rho=0.0, backend=backend)
    for a, b in zip(plain, weights(looksam.SAM, strength=0.0, backend=backend), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@on_backends
def test_coupled_wsam_is_sam_with_a_strength(backend: str) -> None:
    """a = gamma / (1 - gamma)."""
    wsam = weights(looksam.WSAM, gamma=0.6, decouple=False, rho=0.3, backend=backend)
    for a, b in zip(wsam, weights(looksam.SAM, rho=0.3, strength=0.6 / 0.4, backend=backend), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@on_backends
def test_strength_k_moves_as_far_in_k_steps_as_sam_in_each(backend: str) -> None:
    """On a linear gradient without momentum, to first order in lr: k (s - g) once, s - g k times."""
    moved = {}
    for name, options in {"sam": {}, "sam-k": {"k": 4}, "strength k": {"k": 4, "strength": 4.0}}.items():
        p = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
        curvature = torch.tensor([1.0, 5.0], dtype=torch.float64)
        optimizer = looksam.SAM([p], "sgd", lr=1e-6, rho=0.5, backend=backend, **options)

        def closure(p: Any = p, optimizer: Any = optimizer, curvature: Tensor = curvature) -> Tensor:
            optimizer.zero_grad()
            loss = (curvature * p**2).sum() / 2
            loss.backward()
            return loss

        for _ in range(8):
            optimizer.step(closure)
        moved[name] = p.detach() - torch.tensor([3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(moved["strength k"], moved["sam"], rtol=1e-4, atol=0)
    g = torch.tensor([3.0, 5.0], dtype=torch.float64)  # without the strength: three of four steps are along g
    s = g + torch.tensor([1.0, 5.0], dtype=torch.float64) * 0.5 * g / g.norm()
    torch.testing.assert_close(moved["sam-k"], -8e-6 * (0.75 * g + 0.25 * s), rtol=1e-4, atol=0)


@on_backends
def test_without_the_norm_the_perturbation_is_rho_times_the_gradient(backend: str) -> None:
    """Also under a loss scale, which is not in it."""
    for scale in (1.0, 1024.0):
        p, seen = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)), []
        optimizer = looksam.SAM([p], "sgd", lr=0.0, rho=0.1, normalization=0.0, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        scaler.scale(torch.ones(()))  # makes its scale, which step asks for

        def closure(p: Any = p, seen: Any = seen, optimizer: Any = optimizer, scaler: Any = scaler) -> Tensor:
            optimizer.zero_grad()
            seen.append(p.detach().clone())
            loss = (p**2).sum()
            scaler.scale(loss).backward()
            return loss

        scaler.step(optimizer, closure)
        torch.testing.assert_close(seen[1], seen[0] + 0.1 * 2 * seen[0], rtol=1e-12, atol=0)


@on_backends
@pytest.mark.parametrize("cls", [looksam.SAM, looksam.LookSAM])
def test_a_group_may_change_them_between_steps(backend: str, cls: Any) -> None:
    def after(optimizer: Any) -> None:
        optimizer.param_groups[0].update(strength=0.5, normalization=0.25)

    changed = weights(cls, 4, after, k=1, rho=0.3, backend=backend)
    model = network(dtype=torch.float64)
    optimizer = cls(model.parameters(), "sgd", lr=0.1, momentum=0.9, k=1, rho=0.3, backend=backend)
    train(model, optimizer, 1)
    second = cls(model.parameters(), "sgd", lr=0.1, momentum=0.9, k=1, rho=0.3, backend=backend)
    second.load_state_dict(optimizer.state_dict())
    second.param_groups[0].update(strength=0.5, normalization=0.25)
    train(model, second, 3)
    assert all(map(torch.equal, changed, model.parameters()))


@on_backends
def test_two_calls_equal_a_closure(backend: str) -> None:
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    results = []
    for two_calls in (False, True):
        model = network(dtype=torch.float64)
        optimizer = looksam.LookSAM(model.parameters(), "sgd", lr=0.1, k=2, strength=1.5, backend=backend)

        def gradients(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            if two_calls:
                gradients()
                if optimizer.first_step(zero_grad=True):
                    gradients()
                    optimizer.second_step()
            else:
                optimizer.step(gradients)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))
