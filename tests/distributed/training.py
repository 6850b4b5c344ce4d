"""The same small problem for one process and for two: each rank has half of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from tests.contract import support
from tests.contract.support import network


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype), torch.randn(
        16, 3, generator=generator, dtype=torch.float64
    ).to(dtype)


def build(params: Any, variant: str, base: str, **kwargs: Any) -> looksam.SharpnessAware:
    """k = 2 and a clipped direction, so that every sum of a step takes part."""
    return support.build(params, variant, base, **{"max_grad_norm": 0.5, **kwargs})


def train(model: nn.Module, optimizer: Any, steps: int, part: slice = slice(None), **hooks: Any) -> None:
    x, y = (t[part] for t in batch(next(model.parameters()).dtype))
    calls = 0

    def closure(kept: Tensor | None = None) -> Tensor:
        nonlocal calls
        optimizer.zero_grad()
        if optimizer.per_sample:
            return (model(x) - y if kept is None else model(x[kept]) - y[kept]).square().mean(1)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        hooks.get("after", lambda call: None)(calls)
        calls += 1
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def half(rank: int) -> slice:
    return slice(8 * rank, 8 * rank + 8)


def arrays(tensors: Any) -> list[np.ndarray]:
    return [t.detach().numpy().copy() for t in tensors]


def alone(variant: str, base: str, steps: int, dtype: torch.dtype, **kwargs: Any) -> list[np.ndarray]:
    """The weights of one process with the whole batch."""
    model = network(dtype=dtype)
    train(model, build(model.parameters(), variant, base, **kwargs), steps)
    return arrays(model.parameters())
