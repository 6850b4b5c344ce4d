"""A transformer trained with LookSAM over Muon and AdamW.

    $ python examples/muon_transformer.py

Nothing is downloaded. A sequence is eight random symbols, twice; the model
predicts the next symbol, which it can know in the second half.

Muon is made for the matrices inside the network. Embeddings, the output layer,
norms and biases go to AdamW. Both are in one optimizer, so that the perturbation
and LookSAM's projection have one norm over all parameters: two optimizers would
perturb one after the other, each with its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Muon, Optimizer

from looksam import LookSAM

SYMBOLS, HALF = 16, 8


class MuonAndAdamW(Optimizer):
    """Muon for the groups with ``"muon": True``, AdamW for the others.

    Args:
        params: groups, each with the options of its own optimizer.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        matrix = [nn.Parameter(torch.zeros(1, 1))]
        defaults = {**Muon(matrix).defaults, **AdamW(matrix).defaults}
        super().__init__(params, {**defaults, "muon": False, **options})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None
    ) -> None:
        for cls in (Muon, AdamW):
            groups = [g for g in self.param_groups if g["muon"] == (cls is Muon)]
            if groups:
                part: Optimizer = cls([p for g in groups for p in g["params"]])
                part.param_groups, part.state = groups, self.state
                part.step()


class Transformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.places = nn.Embedding(2 * HALF, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.next = nn.Linear(width, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        places = torch.arange(x.shape[1])
        hidden = self.layers(
            self.symbols(x) + self.places(places), mask, is_causal=True
        )
        return self.next(hidden)


def groups_of(model: Transformer) -> list[dict[str, Any]]:
    """The matrices inside the layers, and all the others."""
    inside = {p for p in model.layers.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if p not in inside]
    return [
        {"params": [*inside], "muon": True, "lr": 0.02, "weight_decay": 0.01},
        {"params": others, "lr": 3e-3, "weight_decay": 0.0},
    ]


def batch(count: int, generator: torch.Generator) -> Tensor:
    half = torch.randint(SYMBOLS, (count, HALF), generator=generator)
    return torch.cat([half, half], dim=1)


def loss_and_accuracy(model: Transformer, x: Tensor) -> tuple[Tensor, float]:
    """Of the symbols that can be known."""
    scores = model(x[:, :-1])[:, HALF - 1 :]
    target = x[:, HALF:]
    accuracy = (scores.argmax(2) == target).float().mean().item()
    return F.cross_entropy(scores.flatten(0, 1), target.flatten()), accuracy


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument(
        "--k", type=int, default=5, help="a sharp step in every k-th"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Transformer()
    opt = LookSAM(
        groups_of(model), MuonAndAdamW, rho=options.rho, k=options.k, model=model
    )
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, options.steps)
    for step in range(1, options.steps + 1):
        x = batch(64, generator)

        def closure(x: Tensor = x) -> Tensor:
            opt.zero_grad()
            loss, _ = loss_and_accuracy(model, x)
            loss.backward()
            return loss

        loss = opt.step(closure)
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        _, accuracy = loss_and_accuracy(model, batch(500, generator))
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
