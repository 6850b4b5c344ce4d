"""What bfloat16 weights without float32 master copies cost in accuracy, and save in memory.

``python -m benchmarks.rounding``: SAM and LookSAM-5 over AdamW, whose weights are float32, bfloat16 with master copies, and
bfloat16 alone, rounded stochastically or to nearest. Accuracy: a perceptron of 26 k weights on 1,000 handwritten digits of which
40 % have a wrong label, tested on clean ones; memory: bytes for each parameter of ResNet-18's tensors, counted at the
allocator. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from benchmarks import memory
from benchmarks.shapes import LISTS
from looksam.lab.config import DataConfig
from looksam.lab.data import load_dataset


class Weights(NamedTuple):
    name: str
    dtype: torch.dtype
    rounding: str | None


KINDS = (
    Weights("float32", torch.float32, None),
    Weights("bfloat16, float32 master copies", torch.bfloat16, None),
    Weights("bfloat16, stochastic", torch.bfloat16, "stochastic"),
    Weights("bfloat16, to nearest", torch.bfloat16, "nearest"),
)
METHODS: dict[str, dict[str, Any]] = {"sam": {}, "looksam": {"k": 5}}
RHO = {"sam": 0.2, "looksam": 0.1}
"""The best of 0.05, 0.1, 0.2, 0.4 and 0.8 with float32 weights on seeds 100 to 103 (``--choose-rho``)."""
BATCH = 100


def accuracy(method: str, weights: Weights, rho: float, lr: float, epochs: int, seed: int) -> float:
    """In percent, after the last epoch; the learning rate falls as a cosine."""
    data = load_dataset(DataConfig(train_size=1000, label_noise=0.4), seed)
    train_x, test_x = (x[:].float().flatten(1) / 255 for x in (data.train_x, data.test_x))
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(train_x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    )
    model.to(weights.dtype)
    options = {"rounding": weights.rounding, "rounding_seed": seed, "lr": lr, "weight_decay": 0.01, **METHODS[method]}
    optimizer = looksam.VARIANTS[method](model.parameters(), "adamw", rho=rho, **options)
    steps = epochs * (len(train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2)

    def logits(x: Tensor) -> Tensor:
        return model(x.to(weights.dtype)).float()

    for _ in range(epochs):
        for chosen in torch.randperm(len(train_x)).split(BATCH):

            def closure(chosen: Tensor = chosen) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(logits(train_x[chosen]), data.train_y[chosen])
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()
    with torch.no_grad():
        return 100 * float((logits(test_x).argmax(1) == data.test_y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--choose-rho", action="store_true", help="measure radii with float32 weights, on other seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.choose_rho:
        for method in METHODS:
            for rho in (0.05, 0.1, 0.2, 0.4, 0.8):
                found = [accuracy(method, KINDS[0], rho, args.lr, args.epochs, seed) for seed in range(100, 104)]
                print(f"{method:8} rho {rho:4} {statistics.mean(found):5.1f} %")
        return
    shapes = LISTS["resnet-18"]()
    for method, options in METHODS.items():
        for kind in KINDS:
            build = memory.variant(method, rounding=kind.rounding, **options)
            used = memory.usage(build, shapes, kind.dtype)
            found = [accuracy(method, kind, RHO[method], args.lr, args.epochs, seed) for seed in range(args.seeds)]
            error = statistics.stdev(found) / math.sqrt(len(found))
            print(
                f"| {method} | {kind.name} | {used.kept:.1f} | {used.peak:.1f} | {statistics.mean(found):.1f} ± {error:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
