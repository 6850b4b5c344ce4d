"""Losses of single samples: the closure that only computes them, and the samples to go on with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SampleClosure = Callable[..., Any]
"""``closure(kept)``: the losses, one a sample, of the samples that the index tensor ``kept`` names; ``None`` is all."""

CLOSURE = (
    "closure(kept) computes and returns the losses of single samples, a 1-D tensor (in a loss function of torch: "
    "reduction='none'), of the samples that the index tensor kept names, or of all where kept is None; the optimizer "
    "calls backward itself"
)


def only_losses(closure: SampleClosure) -> SampleClosure:
    """The losses of all samples, without a graph."""

    @functools.wraps(closure)
    def run(**options: Any) -> Tensor:
        with torch.no_grad():
            return _checked(closure(None, **options), None)

    return run


def with_backward(closure: SampleClosure, kept: Tensor | None, params: Sequence[Tensor]) -> SampleClosure:
    """The losses of the kept samples, and the gradient of their mean in ``params``, where there was none before."""

    @functools.wraps(closure)
    def run(**options: Any) -> Tensor:
        for p in params:
            p.grad = None
        losses = _checked(closure(kept, **options), kept)
        if any(p.grad is not None for p in params):
            raise RuntimeError(f"the closure called backward: take that out; {CLOSURE}")
        losses.mean().backward()
        return losses.detach()

    return run


def check_closure(closure: SampleClosure) -> None:
    """
    Raises:
        TypeError: the closure cannot be called with the kept samples.
    """
    try:
        inspect.signature(closure).bind(None)
    except TypeError as error:
        raise TypeError(f"the closure takes no kept samples ({error}): {CLOSURE}") from None


def sharpest(before: Tensor, after: Tensor, gamma: float) -> Tensor:
    """The gamma B samples (rounded, at least one) whose losses grew most, in the order of the batch; ties go to the first."""
    if before.shape != after.shape:
        raise ValueError(
            f"the closure returned {len(before)} losses at w and {len(after)} at w + e for the same samples"
        )
    count = max(1, round(gamma * len(before)))
    return (after - before).argsort(descending=True, stable=True)[:count].sort().values


def _checked(losses: Any, kept: Tensor | None) -> Tensor:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise TypeError(f"the closure returned {found}: {CLOSURE}")
    if kept is not None and len(losses) != len(kept):
        raise ValueError(f"the closure returned {len(losses)} losses for {len(kept)} kept samples: {CLOSURE}")
    return losses
