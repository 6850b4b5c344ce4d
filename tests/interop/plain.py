"""The hand-written loop that every trainer is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import looksam

STEPS = 5
ROWS = 4


class Examples(Dataset):
    """Batch i of a run without shuffling is always the same."""

    def __init__(self, as_dict: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(ROWS * STEPS, 5, generator=generator)
        self.y = torch.randint(3, (ROWS * STEPS,), generator=generator)
        self.as_dict = as_dict

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> object:
        return {"x": self.x[i], "labels": self.y[i]} if self.as_dict else (self.x[i], self.y[i])


class Network(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.forwards = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.forwards += 1
        y = self.layers(x)
        return y if labels is None else (F.cross_entropy(y, labels), y)


FORWARDS = 8
"""Of five steps with k = 2: steps 0, 2 and 4 look twice."""


def optimizer_for(model: nn.Module) -> looksam.LookSAM:
    return looksam.LookSAM(model.parameters(), "adamw", k=2, rho=0.1, lr=1e-2)


def by_hand(optimizer_of: object = optimizer_for) -> list[Tensor]:
    """The weights after five steps of ``step(closure)``."""
    model, examples = Network(), Examples()
    optimizer = optimizer_of(model)  # type: ignore[operator]
    for batch in range(STEPS):
        rows = slice(ROWS * batch, ROWS * (batch + 1))

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(examples.x[rows]), examples.y[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
    assert model.forwards == FORWARDS
    return [p.detach().clone() for p in model.parameters()]


def assert_same_weights(model: nn.Module, expected: list[Tensor]) -> None:
    for a, b in zip(expected, model.parameters(), strict=True):
        assert torch.equal(a, b.detach().cpu())
