"""What is measured while a model trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Stopwatch:
    """Adds up the seconds spent inside ``with stopwatch.running()``, waiting for the GPU at both ends."""

    device: torch.device
    seconds: float = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds += self.now() - start


@dataclass(frozen=True)
class EpochRecord:
    """What is written down after each epoch. ``epoch`` counts from 1; times are seconds of training, without
    evaluation and checkpoints; ``passes`` are forward+backward passes; losses are None where they were not finite."""

    method: str
    seed: int
    epoch: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float
    lr: float
    steps: int
    passes: int
    seconds: float
    optimizer_seconds: float
    backend: str
    diverged: bool


@dataclass
class Epoch:
    """The epoch under way: the order of its images, where it is, and what was measured so far.

    ``loss`` is the sum over the steps, of this process's part of the batches.
    """

    order: Tensor
    lr: float
    loss: Tensor
    watch: Stopwatch  # of all but evaluation and checkpoints
    step_watch: Stopwatch
    pass_watch: Stopwatch
    step: int = 0
    passes: int = 0

    @classmethod
    def begin(cls, order: Tensor, lr: float, device: torch.device) -> Epoch:
        return cls(order, lr, torch.zeros((), device=device), Stopwatch(device), Stopwatch(device), Stopwatch(device))

    def state_dict(self) -> dict[str, Any]:
        watches = {name: getattr(self, name).seconds for name in WATCHES}
        return {name: getattr(self, name) for name in ("order", "lr", "loss", "step", "passes")} | watches

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Epoch:
        watches = {name: Stopwatch(device, state[name]) for name in WATCHES}
        return cls(**{**state, **watches, "loss": state["loss"].to(device)})


WATCHES = ("watch", "step_watch", "pass_watch")
