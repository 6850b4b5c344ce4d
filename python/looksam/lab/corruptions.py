"""The 15 corruptions of CIFAR-10-C at their five severities. Hendrycks and Dietterich 2019, parameters of their
``make_cifar_c.py``.

Each maps float images [B, C, H, W] in 0..1 and a severity 1..5 to images of the same kind; randomness comes from a CPU
generator. Lengths in pixels are those of images of 32 pixels and grow with the image. Two differ from the original:
*frost* blends with a fractal where that has photographs of ice, and *motion blur* and *snow* follow the formula of
ImageMagick's filter without calling it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

if TYPE_CHECKING:
    from PIL import Image

SEVERITIES = (1, 2, 3, 4, 5)
LUMA = (0.299, 0.587, 0.114)


def corrupt(name: str, x: Tensor, severity: int, generator: Generator) -> Tensor:
    """``x`` with the corruption ``name``, in steps of 1/255 as an image file has them. On the CPU."""
    images = CORRUPTIONS[name](x.cpu(), severity, generator)
    return (images.clamp(0, 1) * 255).floor() / 255


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def gaussian_noise(x: Tensor, severity: int, generator: Generator) -> Tensor:
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return x + scale * _normal(x.shape, generator)


def shot_noise(x: Tensor, severity: int, generator: Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Salt and pepper, on each channel by itself."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit = torch.rand(x.shape, generator=generator) < amount
    return torch.where(hit, (torch.rand(x.shape, generator=generator) < 0.5).float(), x)


def _gaussian(x: Tensor, sigma: float, truncate: float = 4.0, mode: str = "replicate") -> Tensor:
    """Of [B, C, H, W], both ways; of sigma 0 nothing."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    radius = min(radius, min(x.shape[2:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    for k, padding in ((kernel, (radius, radius, 0, 0)), (kernel.transpose(2, 3), (0, 0, radius, radius))):
        x = F.conv2d(F.pad(x, padding, mode=mode), k, groups=x.shape[1])
    return x


def _unit(x: Tensor) -> float:
    """A pixel of a 32-pixel image, in pixels of these."""
    return x.shape[3] / 32


def defocus_blur(x: Tensor, severity: int, generator: Generator) -> Tensor:
    radius, blur = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    radius = radius * _unit(x)
    reach = max(1, math.ceil(radius)) + 1  # room for the blur of the disk's edge
    offsets = torch.arange(-reach, reach + 1).float()
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()
    disk = F.conv2d((disk / disk.sum())[None, None], _kernel3(blur), padding=1)
    return F.conv2d(F.pad(x, [reach] * 4, mode="reflect"), disk.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def _kernel3(sigma: float) -> Tensor:
    row = torch.exp(-0.5 * (torch.arange(-1, 2) / sigma) ** 2)
    row = row / row.sum()
    return (row[:, None] * row)[None, None]


def glass_blur(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Each pixel becomes a copy of a neighbour, in order from the lower right corner, between two blurs.

    A copy, though the original is written as an exchange: NumPy's ``x[a], x[b] = x[b], x[a]`` on pixels, which are views,
    writes x[b] to both.
    """
    sigma, iterations = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    x = _gaussian(x, sigma).clone()
    batch, _, height, width = x.shape
    images = torch.arange(batch)
    for _ in range(iterations):
        shift = torch.randint(-1, 1, (height, width, 2, batch), generator=generator)
        for h in range(height - 1, 1, -1):
            for w in range(width - 1, 1, -1):
                there = h + shift[h, w, 0], w + shift[h, w, 1]
                x[:, :, h, w] = x[images, :, there[0], there[1]]
    return _gaussian(x, sigma)


def _smear(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Motion blur: half a Gaussian along a direction for each image, the edge repeated."""
    batch, _, height, width = x.shape
    length = 2 * max(1, round(radius * _unit(x))) + 1
    sigma = max(sigma * _unit(x), 1e-3)
    weights = torch.exp(-0.5 * (torch.arange(length) / sigma) ** 2)
    weights = weights / weights.sum()
    angle = torch.deg2rad(degrees)
    out = torch.zeros_like(x)
    image = torch.arange(batch)[:, None, None]
    for i, weight in enumerate(weights.tolist()):
        rows = torch.arange(height)[None, :, None] + (i * angle.sin()).round().long()[:, None, None]
        columns = torch.arange(width)[None, None, :] + (i * angle.cos()).round().long()[:, None, None]
        moved = x.permute(0, 2, 3, 1)[image, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
        out += weight * moved.permute(0, 3, 1, 2)
    return out


def motion_blur(x: Tensor, severity: int, generator: Generator) -> Tensor:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return _smear(x, radius, sigma, _uniform((len(x),), -45, 45, generator))


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle, bilinear from its first to its last pixel, so that some pixels are those of x: as SciPy's ``zoom``."""
    size = x.shape[3]
    part = math.ceil(size / factor)
    start, large = (size - part) // 2, round(part * factor)
    middle = x[:, :, start : start + part, start : start + part]
    zoomed = F.interpolate(middle, large, mode="bilinear", align_corners=True)
    start = (large - size) // 2
    return zoomed[:, :, start : start + size, start : start + size]


def zoom_blur(x: Tensor, severity: int, generator: Generator) -> Tensor:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01).tolist()
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _grey(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def snow(x: Tensor, severity: int, generator: Generator) -> Tensor:
    loc, scale, zoom, threshold, radius, sigma, share = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    layer = _zoomed(loc + scale * _normal((len(x), 1, *x.shape[2:]), generator), zoom)
    layer = torch.where(layer < threshold, 0, layer).clamp(0, 1)
    layer = _smear(layer, radius, sigma, _uniform((len(x),), -135, -45, generator))
    x = share * x + (1 - share) * torch.maximum(x, 1.5 * _grey(x) + 0.5)
    return x + layer + layer.flip(2, 3)


def _fractal(batch: int, size: int, decay: float, generator: Generator) -> Tensor:
    """Plasma by diamonds and squares, [batch, 1, size, size] in 0..1."""
    side = 1 << max(1, (size - 1).bit_length())
    plasma = torch.zeros(batch, side, side)
    step, wibble = side, 100.0

    def mean_of(total: Tensor) -> Tensor:
        return total / 4 + wibble * _uniform(total.shape, -wibble, wibble, generator)

    while step >= 2:
        half = step // 2
        corners = plasma[:, ::step, ::step]
        squares = corners + corners.roll(-1, 1)
        plasma[:, half::step, half::step] = mean_of(squares + squares.roll(-1, 2))
        centres, corners = plasma[:, half::step, half::step], plasma[:, ::step, ::step]
        plasma[:, ::step, half::step] = mean_of(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        plasma[:, half::step, ::step] = mean_of(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay
    plasma = plasma - plasma.amin((1, 2), keepdim=True)
    return (plasma / plasma.amax((1, 2), keepdim=True))[:, None, :size, :size]


def fog(x: Tensor, severity: int, generator: Generator) -> Tensor:
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    highest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * _fractal(len(x), x.shape[3], decay, generator)) * highest / (highest + amount)


def frost(x: Tensor, severity: int, generator: Generator) -> Tensor:
    ours, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    return ours * x + ice * _fractal(len(x), x.shape[3], 2.0, generator)


def brightness(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """The value of HSV grows, hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]).clamp_max(1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-9), brighter)


def contrast(x: Tensor, severity: int, generator: Generator) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return (x - means) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + means


def elastic_transform(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """An affine map that moves three points, then a smooth random displacement of every pixel."""
    size = x.shape[3]
    amount, sigma, jitter = (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
    )[severity - 1]  # fmt: skip
    middle, reach = size // 2, size // 3
    before = torch.tensor(
        [[middle + reach, middle + reach], [middle + reach, middle - reach], [middle - reach, middle - reach]]
    ).float()
    after = before + _uniform((len(x), 3, 2), -jitter * size, jitter * size, generator)
    # From a pixel of the result to the one of the image: the matrix that maps ``after`` to ``before``.
    homogeneous = torch.cat([after, torch.ones(len(x), 3, 1)], dim=2)
    matrix = torch.linalg.solve(homogeneous, before.expand(len(x), 3, 2))
    rows, columns = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    noise = _uniform((len(x), 2, size, size), -1, 1, generator)
    shift = _gaussian(noise, sigma * size, truncate=3, mode="reflect") * amount * size
    places = torch.stack([columns + shift[:, 0], rows + shift[:, 1], torch.ones(len(x), size, size)], dim=3)
    source = places.view(len(x), -1, 3) @ matrix
    grid = ((2 * source + 1) / size - 1).view(len(x), size, size, 2)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def pixelate(x: Tensor, severity: int, generator: Generator) -> Tensor:
    from PIL import Image

    size = x.shape[3]
    small = max(1, int(size * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]))
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda image: image.resize((small, small), box).resize((size, size), box))


def jpeg_compression(x: Tensor, severity: int, generator: Generator) -> Tensor:
    from PIL import Image

    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compressed(image: Image.Image) -> Image.Image:
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(x, compressed)


def _by_pillow(x: Tensor, alter: Callable[[Image.Image], Image.Image]) -> Tensor:
    """``alter`` applied to each image."""
    from PIL import Image

    found = []
    for pixels in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        image = alter(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
        found.append(np.array(image, dtype=np.float32).reshape(pixels.shape) / 255)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    f.__name__: f
    for f in (
        *(gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow),
        *(frost, fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression),
    )
}
