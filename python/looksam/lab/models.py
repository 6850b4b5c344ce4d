"""Image classifiers in plain torch.nn. Each maps float [B, channels, size, size] to logits [B, classes]."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def cnn(channels: int, size: int, classes: int, width: float = 1.0) -> nn.Module:
    """Three convolutions with batch normalisation; about 15 k weights at width 1."""
    c = max(1, round(16 * width))
    return nn.Sequential(
        conv_bn(channels, c), nn.ReLU(),
        conv_bn(c, 2 * c), nn.ReLU(), nn.MaxPool2d(2),
        conv_bn(2 * c, 2 * c), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, classes),
    )  # fmt: skip


class Residual(nn.Module):
    """The basic block of He et al. 2016: two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), nn.ReLU(), conv_bn(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(channels: int, size: int, classes: int, width: float = 1.0) -> nn.Module:
    """ResNet-18 with the stem for small images: a 3x3 convolution of stride 1 and no pooling."""
    widths = [max(1, round(c * width)) for c in (64, 128, 256, 512)]
    layers: list[nn.Module] = [conv_bn(channels, widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, outputs in enumerate(widths):
        layers += [Residual(inputs, outputs, 1 if stage == 0 else 2), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Bottleneck(nn.Module):
    """The block of ResNet-50, with the stride in its 3x3 convolution."""

    def __init__(self, inputs: int, middle: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * middle
        self.body = nn.Sequential(
            conv_bn(inputs, middle, 1), nn.ReLU(), conv_bn(middle, middle, 3, stride), nn.ReLU(),
            conv_bn(middle, outputs, 1),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(channels: int, size: int, classes: int, width: float = 1.0) -> nn.Module:
    """ResNet-50 of He et al. 2016. Images below 65 pixels get the stem of :func:`resnet18`, others the usual one: a 7x7
    convolution and a pooling, both of stride 2."""
    widths = [max(1, round(c * width)) for c in (64, 128, 256, 512)]
    layers: list[nn.Module] = [conv_bn(channels, widths[0]), nn.ReLU()]
    if size > 64:
        layers = [conv_bn(channels, widths[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = widths[0]
    for stage, (middle, depth) in enumerate(zip(widths, (3, 4, 6, 3), strict=True)):
        for block in range(depth):
            layers.append(Bottleneck(inputs, middle, 2 if stage and not block else 1))
            inputs = 4 * middle
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class PreActivated(nn.Module):
    """The block of Zagoruyko and Komodakis 2016: normalisation and ReLU before each of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.shortcut = None if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return self.body(out) + (x if self.shortcut is None else self.shortcut(out))


def wrn28_10(channels: int, size: int, classes: int, width: float = 1.0) -> nn.Module:
    """Wide ResNet-28-10 without dropout."""
    stem, *widths = (max(1, round(c * width)) for c in (16, 160, 320, 640))
    layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, 1, 1, bias=False)]
    inputs = stem
    for stage, outputs in enumerate(widths):
        for block in range(4):
            layers.append(PreActivated(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class ViT(nn.Module):
    """Vision transformer of Dosovitskiy et al. 2021: class token, learned positions, pre-norm blocks, no dropout."""

    def __init__(self, channels: int, size: int, classes: int, *, patch: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, dim))
        block = partial(nn.TransformerEncoderLayer, dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], dim=1) + self.position
        return self.head(self.blocks(tokens)[:, 0])


BLOCKS = (Residual, Bottleneck, PreActivated, nn.TransformerEncoderLayer)
"""The repeated parts of the large models: what FSDP gathers at a time."""

CONVOLUTIONAL = {"cnn": cnn, "resnet18": resnet18, "resnet50": resnet50, "wrn28-10": wrn28_10}
TRANSFORMERS = {
    "vit-tiny": partial(ViT, dim=192, heads=3, depth=12),
    "vit-small": partial(ViT, dim=384, heads=6, depth=12),
    "vit-base": partial(ViT, dim=768, heads=12, depth=12),
}
MODELS = (*CONVOLUTIONAL, *TRANSFORMERS)


def build_model(
    name: str, channels: int, size: int, classes: int, width: float = 1.0, patch: int | None = None
) -> nn.Module:
    """Build model ``name`` for square images; ``width`` scales the convolutional ones, ``patch`` is the ViTs'.

    The default patch is 2 for images below 16 pixels, 4 below 65, else 16. ValueError if it does not divide the size.
    """
    if name in CONVOLUTIONAL:
        return CONVOLUTIONAL[name](channels, size, classes, width)
    patch = patch or (2 if size < 16 else 4 if size < 65 else 16)
    if size % patch:
        raise ValueError(f"--patch {patch} does not divide the image size {size}; choose a divisor")
    return TRANSFORMERS[name](channels, size, classes, patch=patch)
