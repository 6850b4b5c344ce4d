"""Adversarial images: small perturbations of the pixels that raise the loss of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]
"""From images with values 0..1, float [B, C, H, W], to logits [B, classes]."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode: batches leave no trace in running statistics."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def gradient(logits: Logits, x: Tensor, targets: Tensor) -> Tensor:
    """Of the summed loss by the images: each image's gradient is its own. ``targets``: classes [B] or probabilities."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(logits(x), targets, reduction="sum"), x)[0]


def fgsm(logits: Logits, x: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """x + epsilon sign(g), within 0..1. Goodfellow et al. 2015."""
    return (x + epsilon * gradient(logits, x, targets).sign()).clamp(0, 1)


def pgd(
    logits: Logits,
    x: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int,
    norm: str = "inf",
    step_size: float | None = None,
) -> Tensor:
    """``steps`` ascent steps from x, each projected onto the ball of radius epsilon around x and onto 0..1. Madry et al. 2018.

    ``norm`` "inf": steps along sign(g); "2": along g/||g||, one norm for each image. ``step_size``: 2.5 epsilon / steps.
    """
    size = 2.5 * epsilon / steps if step_size is None else step_size
    moved = x
    for _ in range(steps):
        g = gradient(logits, moved, targets)
        if norm == "inf":
            delta = (moved + size * g.sign() - x).clamp(-epsilon, epsilon)
        else:
            delta = moved + size * g / _norms(g).clamp_min(1e-12) - x
            delta = delta * (epsilon / _norms(delta).clamp_min(1e-12)).clamp_max(1)
        moved = (x + delta).clamp(0, 1)
    return moved.detach()


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]
