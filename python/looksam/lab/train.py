"""Training of one model with one optimizer, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augmentation, mixup
from .config import TrainConfig, make_generator
from .data import Dataset, load_dataset
from .methods import build_optimizer, parse_method
from .models import build_model
from .schedule import lr_factor


@dataclass(frozen=True)
class Defaults:
    """What a data set is trained with when the user says nothing."""

    model: str
    batch_size: int
    augment: str


DEFAULTS = {"digits": Defaults("cnn", 50, "none"), "fashion-mnist": Defaults("cnn", 128, "basic")}
IMAGE_DEFAULTS = Defaults("resnet18", 128, "basic")


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
    evaluation; ``passes`` are forward+backward passes; losses are None where they were not finite."""

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
class Result:
    """The records of one run, and the trainer as the last epoch left it."""

    trainer: Trainer
    records: list[EpochRecord] = field(default_factory=list)


class Trainer:
    """Model, optimizer, schedule and randomness of one run; ``state_dict`` is all that a continuation needs."""

    def __init__(self, config: TrainConfig, data: Dataset) -> None:
        defaults = DEFAULTS.get(config.data.source, IMAGE_DEFAULTS)
        self.config = config
        self.device = resolve_device(config.device)
        self.batch_size = config.batch_size or defaults.batch_size
        self.steps_per_epoch = len(data.train_y) // self.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"--batch-size {self.batch_size} exceeds the {len(data.train_y)} training images")
        self.classes = len(data.classes)
        self.train_x, self.train_y, self.test_x, self.test_y = (
            tensor.to(self.device) for tensor in (data.train_x, data.train_y, data.test_x, data.test_y)
        )
        self.mean, self.std = (tensor.to(self.device) for tensor in data.statistics())
        self.augmentation = Augmentation(config.augment or defaults.augment, data.flip, config.randaugment)

        torch.manual_seed(config.seed)
        channels, size = data.train_x.shape[1:3]
        model = build_model(config.model or defaults.model, channels, size, self.classes, config.width, config.patch)
        self.model = model.to(self.device)
        self.optimizer = build_optimizer(config, self.model.parameters())
        warmup = round(config.warmup * self.steps_per_epoch)
        total = config.epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(config.schedule, step, total, warmup)
        )
        self.generator = make_generator(config.seed, "batches")
        self.epoch = 0
        self.passes, self.pass_watch = 0, Stopwatch(self.device)
        self.clip = None if parse_method(config.method).clips else config.clip

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.epoch = state["epoch"]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images float [B, C, H, W] and class probabilities [B, classes] of training images."""
        indices = indices.to(self.device)
        x = self.augmentation(self.train_x[indices].float() / 255, self.generator)
        targets = F.one_hot(self.train_y[indices], self.classes).float()
        x = (x - self.mean) / self.std
        return mixup(x, targets, self.config.mixup, self.generator) if self.config.mixup else (x, targets)

    def forward_backward(self, x: Tensor, targets: Tensor) -> Any:
        """The closure that the optimizer calls once per pass; returns the loss, a 0-dim tensor."""
        with self.pass_watch.running():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), targets)
            loss.backward()
        self.passes += 1
        if self.clip is not None:  # timed as the optimizer's work, as it is for the variants
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return loss

    def train_epoch(self) -> EpochRecord:
        """One pass over the shuffled training images in full batches (the remainder is left out), then a test."""
        self.passes, self.pass_watch = 0, Stopwatch(self.device)
        epoch_watch, step_watch = Stopwatch(self.device), Stopwatch(self.device)
        lr = self.optimizer.param_groups[0]["lr"]
        losses = torch.zeros((), device=self.device)
        self.model.train()
        with epoch_watch.running():
            order = torch.randperm(len(self.train_y), generator=self.generator)
            for step in range(self.steps_per_epoch):
                batch = self.batch(order[step * self.batch_size : (step + 1) * self.batch_size])
                with step_watch.running():
                    loss: Any = self.optimizer.step(partial(self.forward_backward, *batch))
                self.scheduler.step()
                losses += loss.detach()
        self.epoch += 1
        train_loss = float(losses) / self.steps_per_epoch
        test_loss, test_accuracy = self.evaluate()
        return EpochRecord(
            self.config.method,
            self.config.seed,
            self.epoch,
            train_loss if math.isfinite(train_loss) else None,
            test_loss if math.isfinite(test_loss) else None,
            test_accuracy,
            lr,
            self.steps_per_epoch,
            self.passes,
            epoch_watch.seconds,
            step_watch.seconds - self.pass_watch.seconds,
            str(getattr(self.optimizer, "backend", "torch")),
            not (math.isfinite(train_loss) and math.isfinite(test_loss)),
        )

    @torch.no_grad()
    def evaluate(self, batch_size: int = 1000) -> tuple[float, float]:
        """Mean cross-entropy and accuracy (a fraction) on the clean test images, the model in evaluation mode."""
        self.model.eval()
        loss = correct = 0.0
        for x, y in zip(self.test_x.split(batch_size), self.test_y.split(batch_size), strict=True):
            logits = self.model((x.float() / 255 - self.mean) / self.std)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(1) == y).sum())
        return loss / len(self.test_y), correct / len(self.test_y)


def resolve_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA where torch sees it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def train_run(config: TrainConfig, on_epoch: Callable[[EpochRecord], None] = lambda record: None) -> Result:
    """Train as ``config`` says and hand each epoch's record to ``on_epoch``. Ends early only if the loss diverges."""
    if config.threads:
        torch.set_num_threads(config.threads)
    result = Result(Trainer(config, load_dataset(config.data, config.seed)))
    while result.trainer.epoch < config.epochs:
        record = result.trainer.train_epoch()
        result.records.append(record)
        on_epoch(record)
        if record.diverged:
            break
    return result
