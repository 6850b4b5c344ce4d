"""What the tests of training share: one small run, and what must be equal between two of them."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from looksam.lab.config import DataConfig, TrainConfig

SMALL = TrainConfig("sgd", epochs=2, data=DataConfig(train_size=200), batch_size=20, threads=1)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def comparable(record):
    """A record without its times."""
    return replace(record, seconds=0.0, optimizer_seconds=0.0)


def build_perceptron(channels, size, classes, width=1.0):
    """Every part of a batch is computed for itself, as with no batch normalisation; and fast in every precision."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 32), nn.ReLU(), nn.Linear(32, classes))


def write_pets(folder, size, train, test):
    """Two classes of so many training and test images, size x size, with distinct colours; the first of each is grey."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in ("cat", "dog"):
            place = folder / "pets" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels if index else pixels[..., 0]).save(place / f"{index}.png")
    return folder / "pets"
