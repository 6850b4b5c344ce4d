"""What a run uses when the user says nothing, and whether what the user says is possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import TrainConfig
from .processes import ALONE, World


@dataclass(frozen=True)
class Defaults:
    """What a data set is trained with when the user says nothing."""

    model: str
    batch_size: int
    augment: str


DEFAULTS = {"digits": Defaults("cnn", 50, "none"), "fashion-mnist": Defaults("cnn", 128, "basic")}
IMAGE_DEFAULTS = Defaults("resnet18", 128, "basic")


def defaults_of(config: TrainConfig) -> Defaults:
    return DEFAULTS.get(config.data.source, IMAGE_DEFAULTS)


def resolve_batch_size(config: TrainConfig, images: int, world: World = ALONE) -> int:
    """The images of a step. Raises ValueError if there are not so many, or they cannot be shared out evenly."""
    size = config.batch_size or defaults_of(config).batch_size
    if size > images:
        raise ValueError(f"--batch-size {size} exceeds the {images} training images")
    parts = world.size * config.accumulate
    if size % parts:
        raise ValueError(
            f"--batch-size {size} cannot be shared out over {world.size} process(es) x {config.accumulate} "
            f"micro-batch(es) (--accumulate); choose a multiple of {parts}"
        )
    return size


def resolve_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA where torch sees it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
