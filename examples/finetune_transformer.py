"""Fine-tuning a transformer with LookSAM over AdamW.

    $ python examples/finetune_transformer.py

Nothing is downloaded: a small grammar makes sentences such as "the film was slow
but warm", and the script pre-trains the model itself, on predicting the next word.
The task is to tell whether a sentence ends with praise.

It shows what fine-tuning usually needs: no weight decay on biases and norms,
warm-up, clipping, bfloat16 autocast, and equal dropout masks in both passes of
a sharp step.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor, nn

from looksam import LookSAM

GOOD = ["good", "great", "lovely", "clever", "warm", "bright", "moving", "honest"]
BAD = ["bad", "awful", "dull", "weak", "cold", "slow", "empty", "false"]
NOUNS = ["film", "book", "song", "play", "story", "scene", "cast", "ending"]
ADVERBS = ["very", "quite", "rather", "really", "so"]
WORDS = ["<pad>", "the", "was", "and", "but", *GOOD, *BAD, *NOUNS, *ADVERBS]
INDEX = {word: i for i, word in enumerate(WORDS)}
LENGTH = 7


def sentences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Word indices [count, LENGTH], and 1 for each positive sentence."""
    draw = random.Random(seed)
    words, labels = [], []
    for _ in range(count):
        positive, contrast = draw.random() < 0.5, draw.random() < 0.5
        first = draw.choice(GOOD if positive != contrast else BAD)
        last = draw.choice(GOOD if positive else BAD)
        text = ["the", draw.choice(NOUNS), "was"]
        text += [draw.choice(ADVERBS)] if draw.random() < 0.5 else []
        text += [first, "but" if contrast else "and", last]
        words.append([INDEX[w] for w in text] + [0] * (LENGTH - len(text)))
        labels.append(int(positive))
    return torch.tensor(words), torch.tensor(labels)


class Transformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.next_word = nn.Linear(width, len(WORDS))
        self.sentiment = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """A vector for each word, computed from it and the words before it."""
        mask = nn.Transformer.generate_square_subsequent_mask(
            LENGTH, device=x.device
        )
        return self.encoder(self.words(x) + self.places, mask=mask, is_causal=True)


def pretrain(model: Transformer, steps: int) -> None:
    """Next-word prediction with plain AdamW."""
    x, _ = sentences(2000, seed=1)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (64,))]
        scores = model.next_word(model(batch)[:, :-1])
        loss = nn.functional.cross_entropy(
            scores.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"pre-training: last loss {loss:.3f}")


def classify(model: Transformer, x: Tensor) -> Tensor:
    """Scores of both classes, from the vector of the last word."""
    last = (x != 0).sum(1) - 1
    return model.sentiment(model(x)[torch.arange(len(x)), last])


def finetune(model: Transformer, steps: int, rho: float) -> None:
    x, y = sentences(64, seed=2)
    trained = [
        (name, p)
        for name, p in model.named_parameters()
        if not name.startswith("next_word")
    ]
    opt = LookSAM(
        [
            {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for _, p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        "adamw",
        rho=rho,
        k=5,
        lr=5e-4,
        max_grad_norm=1.0,
        model=model,
        same_rng=True,
    )
    warmup = steps // 10
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda i: min((i + 1) / (warmup + 1), (steps - i) / (steps - warmup))
    )
    for step in range(steps):
        chosen = torch.randint(len(x), (32,))

        def closure(chosen=chosen):
            opt.zero_grad()
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                scores = classify(model, x[chosen])
            loss = nn.functional.cross_entropy(scores.float(), y[chosen])
            loss.backward()
            return loss

        loss = opt.step(closure)
        scheduler.step()
        if (step + 1) % 50 == 0:
            print(f"fine-tuning, step {step + 1}: loss {loss:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rho", type=float, default=0.05)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Transformer()
    pretrain(model, args.pretraining_steps)
    finetune(model, args.steps, args.rho)
    model.eval()
    x, y = sentences(500, seed=3)
    with torch.no_grad():
        right = (classify(model, x).argmax(1) == y).float().mean()
    print(f"test accuracy {right:.3f}")


if __name__ == "__main__":
    main()
