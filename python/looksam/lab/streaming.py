"""Images that stay in their files and are decoded by torch's DataLoader when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .environment import cpu_count

WORKERS = max(1, min(8, cpu_count() - 1))
"""Processes that decode ahead of a run's steps."""


class StreamedImages:
    """In the place of a uint8 tensor [N, 3, size, size]: the same indexing and splitting, but a part is decoded only by
    :meth:`decoded`, :meth:`split` and :func:`batches`."""

    def __init__(self, files: Sequence[Path], size: int, decode: Callable[[Path, int], Tensor]) -> None:
        self.files, self.size, self.decode = list(files), size, decode

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.files), 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor | slice) -> StreamedImages:
        chosen = self.files[indices] if isinstance(indices, slice) else [self.files[i] for i in indices.tolist()]
        return StreamedImages(chosen, self.size, self.decode)

    def to(self, device: torch.device) -> StreamedImages:
        """Stays where it is: what is decoded goes to the device."""
        return self

    def decoded(self) -> Tensor:
        """uint8 [N, 3, size, size] on the CPU."""
        return torch.stack([self.decode(file, self.size) for file in self.files])

    def split(self, size: int) -> Iterator[Tensor]:
        """Parts of ``size`` images, decoded, as ``Tensor.split``."""
        return batches(self, list(torch.arange(len(self)).split(size)))


class Files(torch.utils.data.Dataset[Tensor]):
    """What a DataLoader loads: a whole batch an item, as the order is not its own."""

    def __init__(self, images: StreamedImages, parts: Sequence[Tensor]) -> None:
        self.images, self.parts = images, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Tensor:
        return self.images[self.parts[number]].decoded()


Images = Tensor | StreamedImages


def batches(images: Images, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of each of ``parts``, index tensors on the CPU; uint8, where the images are, or on the CPU if streamed."""
    if isinstance(images, Tensor):
        return (images[part.to(images.device)] for part in parts)
    loader = DataLoader(
        Files(images, parts),
        batch_size=None,
        num_workers=min(WORKERS, len(parts)) if len(parts) > 1 else 0,
        generator=torch.Generator(),  # or it draws from the run's own, once more after each resumption
    )
    return iter(loader)


def in_memory(images: Images) -> Tensor:
    return images if isinstance(images, Tensor) else images.decoded()
