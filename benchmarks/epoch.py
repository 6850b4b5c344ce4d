"""Time of an epoch by optimizer, passes included.

``python -m benchmarks.epoch``: small models on images of the size of scikit-learn's digits, ten batches of 32 an epoch; every
contender has a model of its own, and the epochs take turns. Writes ``benchmarks/results/epoch-<machine>-<date>.json``, from
which ``python -m benchmarks.pages`` makes the documentation's table and figure. The images are noise: their content costs
nothing. A quiet machine is needed, and about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

import looksam
from benchmarks import machine, peers
from benchmarks.peers import YARDSTICK, Missing
from looksam.lab.models import build_model

RESULTS = Path(__file__).parent / "results"
SIZE, CLASSES, BATCH, BATCHES = 8, 10, 32, 10
"""A multiple of k batches: every epoch has as many sharp steps."""
K = 5
BASE: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT-Tiny": lambda: build_model("vit-tiny", 1, SIZE, CLASSES),
    "ResNet-18, half as wide": lambda: build_model("resnet18", 1, SIZE, CLASSES, width=0.5),
}
Backward = Callable[[], Tensor]
"""Zeroes the gradients, runs forward and backward, and returns the loss."""


class Contender(NamedTuple):
    name: str
    side: str
    make: Callable[[nn.Module, Backward], Callable[[], Any]]
    """A model and its backward -> one step."""


def _ours(name: str, cls: Any, base: str, **options: Any) -> Contender:
    def make(model: nn.Module, backward: Backward) -> Callable[[], Any]:
        optimizer = cls(model.parameters(), base, **BASE, **options)
        return lambda: optimizer.step(backward)

    return Contender(name, "ours", make)


def _after_backward(name: str, of: Callable[[list[Any]], Any], closes: bool) -> Contender:
    """Of those that want the first gradient in place; ``closes``: and a closure for the second."""

    def make(model: nn.Module, backward: Backward) -> Callable[[], Any]:
        optimizer = of(list(model.parameters()))

        def again() -> Tensor:
            with torch.enable_grad():
                return backward()

        def step() -> None:
            backward()
            optimizer.step(again) if closes else optimizer.step()

        return step

    return Contender(name, "peer", make)


def _po(name: str) -> Any:
    return getattr(peers._installed("pytorch_optimizer"), name)


CONTENDERS = (
    _after_backward(YARDSTICK, lambda params: AdamW(params, **BASE, fused=True), closes=False),
    _ours("LookSAM, k = 5", looksam.LookSAM, "adamw", k=K),
    _ours("Look-LayerSAM over LAMB, k = 5", looksam.LookLayerSAM, "lamb", k=K),
    _ours("SAM", looksam.SAM, "adamw"),
    _after_backward(
        "SAM as a loop over tensors", lambda params: peers.LoopSAM(params, AdamW(params, **BASE)), closes=True
    ),
    _after_backward("pytorch_optimizer SAM", lambda params: _po("SAM")(params, AdamW, **BASE, fused=True), closes=True),
    _after_backward(
        "pytorch_optimizer LookSAM, k = 5",
        lambda params: _po("LookSAM")(params, AdamW, k=K, foreach=True, **BASE, fused=True),
        closes=True,
    ),
)
"""pytorch_optimizer's over torch's fused AdamW. Its LookSAM runs the closure in every step, as documented."""


def backward_of(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], place: list[int]) -> Backward:
    """The loss of the batch at ``place``."""

    def backward() -> Tensor:
        model.zero_grad()
        x, y = batches[place[0]]
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return backward


def measure(
    model: Callable[[], nn.Module], contenders: Sequence[Contender], rounds: int
) -> dict[str, list[float] | str]:
    """Seconds of every epoch of each, in turns, after one epoch that creates the state; or why a peer is missing."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(BATCH, 1, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(BATCHES)
    ]
    epochs: dict[str, Callable[[], None]] = {}
    found: dict[str, list[float] | str] = {}
    for contender in contenders:
        torch.manual_seed(0)
        made, place = model(), [0]
        try:
            step = contender.make(made, backward_of(made, batches, place))
        except Missing as reason:
            found[contender.name] = str(reason)
            continue

        def epoch(step: Callable[[], Any] = step, place: list[int] = place) -> None:
            for place[0] in range(BATCHES):
                step()

        epoch()
        epochs[contender.name] = epoch
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(rounds):
        for name, epoch in epochs.items():
            begin = time.perf_counter()
            epoch()
            times[name].append(time.perf_counter() - begin)
    return found | times


def result(rounds: int, threads: int, models: Sequence[str]) -> dict[str, Any]:
    """The content of a result file. ``ratio``: the median of the ratios to the yardstick's epoch in the same round."""
    torch.set_num_threads(threads)
    records: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for name in models:
        others = machine.Others()
        found = measure(MODELS[name], CONTENDERS, rounds)
        busy = others.percent()
        params = sum(map(math.prod, (p.shape for p in MODELS[name]().parameters())))
        yardstick = found[YARDSTICK]
        for contender in CONTENDERS:
            times = found[contender.name]
            if isinstance(times, str) or isinstance(yardstick, str):
                missing.append({"model": name, "optimizer": contender.name, "reason": str(times)})
                continue
            ratios = [a / b for a, b in zip(times, yardstick, strict=True)]
            records.append(
                {
                    "model": name,
                    "params": params,
                    "optimizer": contender.name,
                    "side": contender.side,
                    "median_s": statistics.median(times),
                    "seconds": times,
                    "ratio": statistics.median(ratios),
                    "others_percent": busy,
                }
            )
    return {
        "date": date.today().isoformat(),
        "machine": machine.describe("cpu"),
        "versions": machine.versions(),
        "revision": machine.revision(),
        "options": {"device": "cpu", "threads": threads, "rounds": rounds},
        "epochs": records,
        "missing": missing,
    }


def markdown(content: dict[str, Any]) -> str:
    """Seconds, and multiples of the yardstick's epoch."""
    models = list(dict.fromkeys(r["model"] for r in content["epochs"]))
    lines = ["| optimizer | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for name in dict.fromkeys(r["optimizer"] for r in content["epochs"]):
        of_models = {r["model"]: r for r in content["epochs"] if r["optimizer"] == name}
        own = any(r["side"] == "ours" for r in of_models.values())
        cells = [f"{r['median_s']:.2f} s, {r['ratio']:.2f} ×" if (r := of_models.get(m)) else "" for m in models]
        lines.append(f"| {'looksam ' if own else ''}{name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file (%(default)s)")
    args = parser.parse_args(argv)
    content = result(args.rounds, args.threads, list(MODELS))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"epoch-{content['machine']['slug']}-{content['date']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(content), end="")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
