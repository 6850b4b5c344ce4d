"""Image classification: a small convolutional network, LookSAM over SGD.

    $ python examples/image_classification.py --rho 0.05 --k 5

The images are scikit-learn's handwritten digits; nothing is downloaded. The
optimizer gets a closure: it runs the closure twice on sharp steps and once on
reuse steps.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from looksam import LookSAM


def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)
    return TensorDataset(x, torch.tensor(labels))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    return right / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--k", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = random_split(digits(), [1297, 500])
    loader = DataLoader(train, batch_size=64, shuffle=True)
    test_loader = DataLoader(test, batch_size=500)
    model = network()
    loss_fn = nn.CrossEntropyLoss()
    # model=: batch norm's running statistics are updated in the first pass only.
    opt = LookSAM(
        model.parameters(),
        "sgd",
        rho=args.rho,
        k=args.k,
        lr=args.lr,
        momentum=0.9,
        weight_decay=5e-4,
        model=model,
    )
    steps = args.epochs * len(loader)
    # Warm-up matters: the perturbation can hurt until the loss is small.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=args.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    passes = 0

    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:

            def closure(x=x, y=y):
                nonlocal passes
                passes += 1
                opt.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss

            loss = opt.step(closure)
            scheduler.step()
        print(f"epoch {epoch + 1}: last loss {loss:.3f}", flush=True)

    print(f"{passes / steps:.2f} passes a step")
    print(f"test accuracy {accuracy(model, test_loader):.3f}")


if __name__ == "__main__":
    main()
