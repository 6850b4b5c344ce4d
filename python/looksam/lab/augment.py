"""Batched augmentation. Images are float [B, C, H, W] in 0..1; all randomness comes from one CPU generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

AUGMENTATIONS = ("none", "basic", "randaugment")


def random_crop(x: Tensor, padding: int, generator: Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels in both directions, filling with zeros."""
    batch, channels, height, width = x.shape
    offset = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator).to(x.device)
    rows = offset[0, :, None] + torch.arange(height, device=x.device)
    columns = offset[1, :, None] + torch.arange(width, device=x.device)
    image = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return F.pad(x, [padding] * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(x: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    flip = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def mixup(x: Tensor, targets: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2018: blend the batch with a permutation of itself, one weight ~ Beta(alpha, alpha) a batch.

    ``targets`` are class probabilities [B, classes].
    """
    # torch's Beta takes no generator; numpy's is seeded from ours, so that a resumed run draws the same weights.
    seed = int(torch.randint(2**62, (), generator=generator))
    weight = np.random.default_rng(seed).beta(alpha, alpha)
    other = torch.randperm(len(x), generator=generator).to(x.device)
    return weight * x + (1 - weight) * x[other], weight * targets + (1 - weight) * targets[other]


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (degenerate + factor[:, None, None, None] * (x - degenerate)).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _affine(x: Tensor, rows: list[list[Tensor]]) -> Tensor:
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _rotate(x: Tensor, m: Tensor) -> Tensor:
    angle, zero = m * math.radians(30), torch.zeros_like(m)
    return _affine(x, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


def _shift(x: Tensor, shear: Tensor, move: Tensor) -> Tensor:
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    return _affine(x, [[one, shear, move], [zero, one, zero]])


def _vertically(transform: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, m: transform(x.transpose(2, 3), m).transpose(2, 3)


def _shear(x: Tensor, m: Tensor) -> Tensor:
    return _shift(x, 0.3 * m, torch.zeros_like(m))


def _translate(x: Tensor, m: Tensor) -> Tensor:
    return _shift(x, torch.zeros_like(m), 0.6 * m)  # the image spans -1..1: 0.6 is 30 % of its width


def _autocontrast(x: Tensor, m: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def _equalize(x: Tensor, m: Tensor) -> Tensor:
    """Each grey level goes to the share of darker pixels, so that levels are spread evenly."""
    level = (x * 255).round().long().flatten(2)
    counts = torch.zeros(*level.shape[:2], 256, device=x.device)
    counts.scatter_add_(2, level, torch.ones_like(level, dtype=counts.dtype))
    darker = counts.cumsum(2) - counts
    span = (level.shape[2] - counts.gather(2, level.amax(2, keepdim=True))).clamp_min(1)
    return (darker.gather(2, level) / span).view_as(x).to(x.dtype)


def _posterize(x: Tensor, m: Tensor) -> Tensor:
    levels = 2.0 ** (8 - (4 * m.abs()).round())[:, None, None, None]
    return (x * 255 / 256 * levels).floor() / levels * 256 / 255


def _solarize(x: Tensor, m: Tensor) -> Tensor:
    return torch.where(x > (1 - m.abs())[:, None, None, None], 1 - x, x)


def _sharpness(x: Tensor, m: Tensor) -> Tensor:
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div(13).expand(x.shape[1], 1, 3, 3)
    smooth = F.conv2d(F.pad(x, [1] * 4, mode="replicate"), kernel, groups=x.shape[1])
    return _blend(smooth, x, 1 + 0.9 * m)


# Each takes images and a signed strength in -1..1 per image; 0 leaves the geometric and the colour ones unchanged.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda x, m: x,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": lambda x, m: _blend(_grey(x), x, 1 + 0.9 * m),
    "contrast": lambda x, m: _blend(_grey(x).mean((2, 3), keepdim=True), x, 1 + 0.9 * m),
    "brightness": lambda x, m: _blend(torch.zeros_like(x), x, 1 + 0.9 * m),
    "sharpness": _sharpness,
    "shear_x": _shear,
    "shear_y": _vertically(_shear),
    "translate_x": _translate,
    "translate_y": _vertically(_translate),
}


def randaugment(x: Tensor, count: int, magnitude: float, generator: Generator) -> Tensor:
    """Cubuk et al. 2020: ``count`` random operations for each image, of strength ``magnitude`` out of 30.

    Images that drew the same operation go through it as one batch.
    """
    operations = list(OPERATIONS.values())
    for _ in range(count):
        choice = torch.randint(len(operations), (len(x),), generator=generator)
        sign = torch.randint(0, 2, (len(x),), generator=generator) * 2 - 1
        out = torch.empty_like(x)
        for index in choice.unique().tolist():
            mine = (choice == index).nonzero()[:, 0].to(x.device)
            out[mine] = operations[index](x[mine], sign.to(x)[mine] * magnitude / 30)
        x = out
    return x


@dataclass(frozen=True)
class Augmentation:
    """``kind`` is one of AUGMENTATIONS. "basic" crops (padding 1/8 of the size) and, if ``flip``, mirrors;
    "randaugment" does that first and then RandAugment(N, M)."""

    kind: str
    flip: bool
    randaugment: tuple[int, float] = (2, 9.0)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        if self.kind == "none":
            return x
        x = random_crop(x, max(1, x.shape[3] // 8), generator)
        if self.flip:
            x = random_flip(x, generator)
        return randaugment(x, *self.randaugment, generator) if self.kind == "randaugment" else x
