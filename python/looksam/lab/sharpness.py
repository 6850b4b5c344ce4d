"""How flat a trained model lies: loss surfaces, the worst loss in a ball, the largest eigenvalues of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attacks import evaluating

Weights = list[Tensor]
Loss = Callable[[Weights], Tensor]
"""The loss, a 0-dim tensor, as a function of the weights."""


@contextmanager
def loss_of(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> Iterator[tuple[Loss, Weights]]:
    """The mean cross-entropy of ``model`` over images x and classes y as a function of its weights, and the weights.

    The model is in evaluation mode inside: its running statistics stay those of the trained weights. Twice differentiable.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def loss(weights: Weights) -> Tensor:
        parameters = dict(zip(names, weights, strict=True))
        total = x.new_zeros(())
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = functional_call(model, parameters, (xs,))
            total = total + F.cross_entropy(logits, ys, reduction="sum")
        return total / len(y)

    with evaluating(model), sdpa_kernel(SDPBackend.MATH):  # the faster kernels of attention have no second derivative
        yield loss, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def moved(weights: Weights, *steps: tuple[float, Weights]) -> Weights:
    """weights + sum of factor x direction."""
    return [w + sum(factor * d[i] for factor, d in steps) for i, w in enumerate(weights)]


def dot(a: Weights, b: Weights) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Weights) -> Tensor:
    return dot(a, a).sqrt()


def filter_normalised(weights: Weights, generator: Generator) -> Weights:
    """A random direction in which each filter is as long as the filter of the weights; 0 for biases and normalisation
    layers. Li et al. 2018."""
    direction = []
    for w in weights:
        noise = torch.randn(w.shape, generator=generator).to(w)
        if w.dim() < 2:
            direction.append(torch.zeros_like(w))
            continue
        lengths, ours = (t.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1)) for t in (w, noise))
        direction.append(noise * lengths / ours.clamp_min(1e-12))
    return direction


@torch.no_grad()
def line(loss: Loss, weights: Weights, direction: Weights, positions: Sequence[float]) -> list[float]:
    return [float(loss(moved(weights, (a, direction)))) for a in positions]


@torch.no_grad()
def plane(
    loss: Loss, weights: Weights, directions: tuple[Weights, Weights], positions: Sequence[float]
) -> list[list[float]]:
    """Rows: positions along the second direction; columns: along the first."""
    first, second = directions
    return [[float(loss(moved(weights, (a, first), (b, second)))) for a in positions] for b in positions]


def gradient_at(loss: Loss, weights: Weights) -> Weights:
    weights = [w.detach().requires_grad_() for w in weights]
    return list(torch.autograd.grad(loss(weights), weights))


def worst_in_ball(loss: Loss, weights: Weights, rho: float, steps: int = 10) -> float:
    """The largest loss found by ``steps`` ascent steps of length 2.5 rho / steps, each projected onto the ball of radius rho;
    with one step of length rho it is SAM's. Never below the loss at the centre."""
    offset = [torch.zeros_like(w) for w in weights]
    best = float(loss(weights).detach())
    for _ in range(steps):
        g = gradient_at(loss, moved(weights, (1.0, offset)))
        length = norm(g)
        step = rho if steps == 1 else 2.5 * rho / steps
        offset = [o + step * d / length.clamp_min(1e-12) for o, d in zip(offset, g, strict=True)]
        shrink = (rho / norm(offset).clamp_min(1e-12)).clamp_max(1)
        offset = [o * shrink for o in offset]
        with torch.no_grad():
            best = max(best, float(loss(moved(weights, (1.0, offset)))))
    return best


@torch.no_grad()
def mean_on_sphere(loss: Loss, weights: Weights, rho: float, generator: Generator, samples: int = 10) -> float:
    """The mean loss at the distance rho in random directions."""
    losses = []
    for _ in range(samples):
        noise = [torch.randn(w.shape, generator=generator).to(w) for w in weights]
        losses.append(float(loss(moved(weights, (rho / float(norm(noise)), noise)))))
    return sum(losses) / len(losses)


def hessian_product(loss: Loss, weights: Weights) -> Callable[[Weights], Weights]:
    """v -> H v, with H the Hessian at the weights."""
    weights = [w.detach().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(weights), weights, create_graph=True)

    def product(v: Weights) -> Weights:
        return list(torch.autograd.grad(dot(list(gradient), v), weights, retain_graph=True))

    return product


def top_eigenvalues(
    product: Callable[[Weights], Weights], like: Weights, count: int, iterations: int, generator: Generator
) -> list[float]:
    """The ``count`` largest eigenvalues, the largest first, of the symmetric operator ``product``: Lanczos with full
    reorthogonalisation. Fewer if the space is smaller."""
    v = [torch.randn(w.shape, generator=generator).to(w) for w in like]
    length = norm(v)
    basis = [[x / length for x in v]]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(iterations, sum(w.numel() for w in like))):
        w = product(basis[-1])
        diagonal.append(float(dot(w, basis[-1])))
        for _twice in range(2):  # once leaves what rounding left
            for b in basis:
                w = moved(w, (-float(dot(w, b)), b))
        length = norm(w)
        if float(length) < 1e-6 * max(map(abs, diagonal)):
            break
        beside.append(float(length))
        basis.append([x / length for x in w])
    size = len(diagonal)
    matrix = np.diag(diagonal) + np.diag(beside[: size - 1], 1) + np.diag(beside[: size - 1], -1)
    return sorted(np.linalg.eigvalsh(matrix).tolist(), reverse=True)[:count]
