"""Parameter shapes of the models that every benchmark is measured on, written from their architectures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

Shape = tuple[int, ...]
CLASSES = 1000


def vit(width: int, depth: int = 12, patch: int = 16, image: int = 224) -> Iterator[Shape]:
    """ViT/16, Dosovitskiy et al. 2021: fused qkv, MLP of four times the width."""

    def linear(inputs: int, outputs: int) -> Iterator[Shape]:
        yield from ((outputs, inputs), (outputs,))

    norm = ((width,), (width,))
    yield from ((1, 1, width), (1, (image // patch) ** 2 + 1, width))  # class token, positions
    yield from ((width, 3, patch, patch), (width,))
    for _ in range(depth):
        yield from norm
        yield from linear(width, 3 * width)
        yield from linear(width, width)
        yield from norm
        yield from linear(width, 4 * width)
        yield from linear(4 * width, width)
    yield from norm
    yield from linear(width, CLASSES)


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Iterator[Shape]:
    """ResNet, He et al. 2016, with batch norm after each bias-free convolution and projections where the shape changes."""

    def conv(inputs: int, outputs: int, size: int) -> Iterator[Shape]:
        yield from ((outputs, inputs, size, size), (outputs,), (outputs,))

    yield from conv(3, 64, 7)
    channels = 64
    for stage, count in enumerate(blocks):
        inner = 64 * 2**stage
        outer = 4 * inner if bottleneck else inner
        for _ in range(count):
            if bottleneck:
                yield from conv(channels, inner, 1)
                yield from conv(inner, inner, 3)
                yield from conv(inner, outer, 1)
            else:
                yield from conv(channels, inner, 3)
                yield from conv(inner, outer, 3)
            if channels != outer:
                yield from conv(channels, outer, 1)
            channels = outer
    yield from ((CLASSES, channels), (CLASSES,))


def many(tensors: int = 4000, largest: int = 2000, seed: int = 0) -> Iterator[Shape]:
    """Far more and far smaller tensors than any sane model has."""
    sizes = random.Random(seed)
    for _ in range(tensors):
        yield (sizes.randint(1, largest),)


def tiny(tensors: int = 152) -> Iterator[Shape]:
    """As many tensors as a ViT has and next to no elements: what is measured on it is overhead."""
    for i in range(tensors):
        yield (1 + i % 16,)


def blocks(numel: int) -> Iterator[Shape]:
    """About so many elements in tensors of 2^18: what an element costs, from lists that fit into a cache to large ones."""
    yield from [(256, 1024)] * (numel // 2**18)


LISTS: dict[str, Callable[[], list[Shape]]] = {
    "vit-s": lambda: list(vit(384)),
    "vit-b": lambda: list(vit(768)),
    "resnet-18": lambda: list(resnet((2, 2, 2, 2), bottleneck=False)),
    "resnet-50": lambda: list(resnet((3, 4, 6, 3), bottleneck=True)),
    "many": lambda: list(many()),
    "tiny": lambda: list(tiny()),
    **{f"{millions}M": partial(lambda n: list(blocks(n)), millions * 10**6) for millions in (1, 10, 100)},
}
ON_DEMAND = ("1M", "10M", "100M")
"""Lists that are measured only where they are named."""
