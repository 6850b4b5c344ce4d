"""One run of the laboratory, described completely by values that can be written to JSON."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DataConfig:
    """Which images and labels. ``source`` is a name ("digits", "fashion-mnist") or a path; see data.py.

    With ``stream`` the images of a folder are decoded when they are needed. With a ``holdout`` this part of the training
    images is kept for validation and takes the place of the test images.
    """

    source: str = "digits"
    directory: str | None = None
    image_size: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    label_noise: float = 0.0
    holdout: float = 0.0
    stream: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's outcome. None means: the default of the data set, model or optimizer.

    ``options`` holds keyword arguments for the optimizer as (name, value) pairs, already chosen for this method.
    ``epochs``, ``warmup`` and ``rho_warmup`` count epochs; ``threads`` = 0 leaves torch's own choice. ``batch_size``
    counts the images of one step, over all processes and the ``accumulate`` micro-batches of each. ``adversarial`` is the
    l-infinity radius, in pixel values of 0..1, within which every training image is perturbed against the model first.
    ``weights`` is a file that the model begins with, ``pixels`` the mean and the standard deviation of each channel that
    images are normalised with, in place of those of the training images. Without ``train`` the model is only tested.
    ``study`` names the experiment whose design measures more than losses and accuracies, ``settings`` are its options.
    """

    method: str
    seed: int = 0
    data: DataConfig = DataConfig()
    model: str | None = None
    width: float = 1.0
    patch: int | None = None
    epochs: int = 50
    batch_size: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    backend: str | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    rho_warmup: float = 0.0
    clip: float | None = None
    augment: str | None = None
    randaugment: tuple[int, float] = (2, 9.0)
    mixup: float = 0.0
    adversarial: float = 0.0
    amp: str | None = None
    accumulate: int = 1
    m_sharpness: bool = False
    fsdp: bool = False
    device: str = "auto"
    threads: int = 0
    weights: str | None = None
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    train: bool = True
    study: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"options": dict(self.options), "settings": dict(self.settings)}


def make_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one use of randomness; streams of one seed are independent of each other.

    Without the name, the first epoch's order would repeat the very permutation that chose the noisy labels.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{stream}/{seed}".encode()))
