"""Training of one model with one optimizer, measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attacks import evaluating, pgd
from .augment import Augmentation, mixup
from .checkpoint import Checkpoints
from .config import TrainConfig, make_generator
from .data import Dataset, load_dataset
from .defaults import defaults_of, resolve_batch_size, resolve_device
from .design import Watcher, design_of
from .measure import Epoch, EpochRecord
from .methods import build_optimizer, parse_method
from .models import build_model
from .precision import Precision
from .processes import ALONE, World, full_state, load_full_state, local_gradients
from .schedule import lr_factor, warmup_factor
from .streaming import batches
from .weights import load_weights

ATTACK_STEPS = 3
"""Of an adversarial training's steps; each is a pass."""
Piece = tuple[Tensor, Tensor]
"""Images float [B, C, H, W] and class probabilities [B, classes]."""


class Trainer:
    """Model, optimizer, schedule and randomness of one run; ``state_dict`` is all that a continuation needs.

    Under torchrun every process has a trainer with the same seed and draws the same batches, of which it computes its
    own part: but for rounding, and for batch normalisation over the part, a run does not depend on their number.
    """

    def __init__(self, config: TrainConfig, data: Dataset, world: World = ALONE) -> None:
        defaults = defaults_of(config)
        self.config = config
        self.world = world
        self.device = resolve_device(config.device)
        self.batch_size = resolve_batch_size(config, len(data.train_y), world)
        self.steps_per_epoch = len(data.train_y) // self.batch_size
        self.classes = len(data.classes)
        self.train_x, self.test_x = (images.to(self.device) for images in (data.train_x, data.test_x))
        self.train_y, self.test_y = (labels.to(self.device) for labels in (data.train_y, data.test_y))
        pixels = data.statistics() if config.pixels is None else [torch.tensor(p).view(-1, 1, 1) for p in config.pixels]
        self.mean, self.std = (tensor.to(self.device) for tensor in pixels)
        self.augmentation = Augmentation(config.augment or defaults.augment, data.flip, config.randaugment)
        self.precision = Precision(config.amp, self.device)

        torch.manual_seed(config.seed)
        channels, size = data.train_x.shape[1:3]
        model = build_model(config.model or defaults.model, channels, size, self.classes, config.width, config.patch)
        if config.weights is not None:
            load_weights(model, config.weights)
        self.model = model.to(self.device)
        self.net = world.wrap(self.model, config.fsdp)  # what is trained: self.model, whose gradients get averaged
        warmup = round(config.warmup * self.steps_per_epoch)
        total = config.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(config, self.net, total)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(config.schedule, step, total, warmup)
        )
        self.radii = [group.get("rho") for group in self.optimizer.param_groups]
        self.rho_warmup = round(config.rho_warmup * self.steps_per_epoch)
        self.generator = make_generator(config.seed, "batches")
        self.clip = None if parse_method(config.method).clips else config.clip
        self.plain_weights = getattr(self.optimizer, "plain_weights", nullcontext)
        """A context without the perturbation in which the weights of some optimizers rest."""
        self.watcher: Watcher | None = None
        self.records: list[EpochRecord] = []  # of the epochs that are over
        self.measurements: list[dict[str, Any]] = []  # of the run's study
        self.measured = False  # nothing will be added to them
        self.epoch: Epoch | None = None  # the one under way
        self.last: list[Piece] | None = None  # the batch of the step before, for an optimizer that asks for it

    @property
    def finished(self) -> bool:
        """All epochs are over, or the loss diverged."""
        return len(self.records) == self.config.epochs or any(record.diverged for record in self.records)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; of a finished run the weights and records only, nothing follows from the rest.

        Under torchrun all processes must call it, and it is the first one's that counts.
        """
        if self.config.fsdp:
            model, optimizer = full_state(self.model, self.optimizer)
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        state: dict[str, Any] = {
            "model": model, "records": [asdict(record) for record in self.records],
            "measurements": self.measurements, "measured": self.measured,
        }  # fmt: skip
        if self.finished:
            return state
        if self.watcher is not None:
            state["watcher"] = self.watcher.state_dict()
        if self.epoch is not None:
            state["epoch"] = self.epoch.state_dict() | {"loss": self.world.mean(self.epoch.loss)}
        if self.device.type == "cuda":
            state["cuda_generator"] = torch.cuda.get_rng_state()
        if (
            self.last is not None and self.world.size == 1
        ):  # with more processes each has its own, and begins without one
            state["last"] = [[x.cpu() for x in piece] for piece in self.last]
        return state | {
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records = [EpochRecord(**record) for record in state["records"]]
        self.measurements, self.measured = state["measurements"], state["measured"]
        if self.config.fsdp:
            load_full_state(self.model, state["model"])
        else:
            self.model.load_state_dict(state["model"])
        if self.finished:
            return
        if self.config.fsdp:
            load_full_state(self.model, state["optimizer"], self.optimizer)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"])
        if self.watcher is not None:
            self.watcher.load_state_dict(state["watcher"])
        self.epoch = Epoch.from_state_dict(state["epoch"], self.device) if "epoch" in state else None
        if "last" in state:
            self.last = [(x.to(self.device), targets.to(self.device)) for x, targets in state["last"]]

    def batch(self, indices: Tensor, images: Tensor | None = None) -> list[Piece]:
        """The training images of a step (``images``, uint8, where they are loaded already), augmented and normalised: this
        process's micro-batches of it.

        The whole batch is augmented in every process, so that its images do not depend on the number of processes.
        """
        if images is None:
            (images,) = batches(self.train_x, [indices])
        indices = indices.to(self.device)
        x = self.augmentation(images.to(self.device).float() / 255, self.generator)
        targets = F.one_hot(self.train_y[indices], self.classes).float()
        x = (x - self.mean) / self.std
        if self.config.mixup:
            x, targets = mixup(x, targets, self.config.mixup, self.generator)
        count = self.config.accumulate
        pieces = list(zip(x.chunk(count * self.world.size), targets.chunk(count * self.world.size), strict=True))
        pieces = pieces[self.world.rank * count : (self.world.rank + 1) * count]
        return [self._attacked(*piece) for piece in pieces] if self.config.adversarial else pieces

    def _attacked(self, x: Tensor, targets: Tensor) -> Piece:
        """Madry et al. 2018: the images that training sees are the worst near them, for the model as it is."""
        with evaluating(self.model):
            pixels = (x * self.std + self.mean).clamp(0, 1)
            x = pgd(self.logits, pixels, targets, self.config.adversarial, steps=ATTACK_STEPS)
        return (x - self.mean) / self.std, targets

    def logits(self, pixels: Tensor) -> Tensor:
        """Of images with values 0..1, as float32."""
        with self.precision.autocast():
            return self.model((pixels - self.mean) / self.std).float()

    def forward_backward(self, epoch: Epoch, pieces: list[Piece], previous: bool = False) -> Tensor:
        """The closure that the optimizer calls once per pass; returns the loss, a 0-dim tensor. ``previous``: on the batch of
        the step before, where there is one.

        The gradient is that of the mean over the pieces. Under DDP only the last one's backward averages over the
        processes, if the optimizer lets it.
        """
        if previous and self.last is not None:
            pieces = self.last
        with epoch.pass_watch.running():
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            for number, (x, targets) in enumerate(pieces, start=1):
                with nullcontext() if number == len(pieces) else local_gradients(self.net):
                    with self.precision.autocast():
                        logits = self.net(x)
                    loss = F.cross_entropy(logits.to(targets.dtype), targets) / len(pieces)
                    self.precision.backward(loss)
                total += loss.detach()
        epoch.passes += 1
        if self.watcher is not None:
            self.watcher.after_pass(self)
        return total

    def sample_losses(self, epoch: Epoch, pieces: list[Piece], kept: Tensor | None = None) -> Tensor:
        """The closure for an optimizer that calls backward itself: the losses of this process's samples, or of those kept,
        with the loss scale. All micro-batches at once; the time of the backward is therefore the optimizer's."""
        with epoch.pass_watch.running():
            x, targets = (torch.cat(part) for part in zip(*pieces, strict=True))
            if kept is not None:
                x, targets = x[kept], targets[kept]
            with self.precision.autocast():
                logits = self.net(x)
            losses = F.cross_entropy(logits.to(targets.dtype), targets, reduction="none")
        epoch.passes += torch.is_grad_enabled()
        return self.precision.scaler.scale(losses)

    def train_epoch(self, after_step: Callable[[int], None] = lambda step: None) -> EpochRecord:
        """Train to the end of the epoch, in full batches (the remainder is left out), and test.

        ``after_step`` is called with the number of steps done, when ``state_dict`` may be taken: not after the last
        one, where the epoch's end is near.
        """
        epoch = self.epoch
        if epoch is None:
            order = torch.randperm(len(self.train_y), generator=self.generator)
            epoch = self.epoch = Epoch.begin(order, self.optimizer.param_groups[0]["lr"], self.device)
        self.net.train()
        parts = epoch.order[: self.steps_per_epoch * self.batch_size].split(self.batch_size)
        loaded = batches(self.train_x, parts[epoch.step :])
        while epoch.step < self.steps_per_epoch:
            with epoch.watch.running():
                self._set_radius(len(self.records) * self.steps_per_epoch + epoch.step)
                pieces = self.batch(parts[epoch.step], next(loaded))
                epoch.passes += ATTACK_STEPS if self.config.adversarial else 0
                with epoch.step_watch.running():
                    per_sample = getattr(self.optimizer, "per_sample", False)
                    closure = partial(self.sample_losses if per_sample else self.forward_backward, epoch, pieces)
                    epoch.loss += self.precision.step(self.optimizer, closure, self.clip)
                if self.optimizer.param_groups[0].get("previous_batch"):
                    self.last = pieces
                if self.watcher is not None:
                    self.watcher.after_step(self)
                self._advance_schedule()
            epoch.step += 1
            if epoch.step < self.steps_per_epoch:
                after_step(epoch.step)
        with self.plain_weights():
            record = self._record(epoch)
            self.records.append(record)
            if self.watcher is not None:
                self.measurements += self.watcher.after_epoch(self)
        self.epoch = None
        if self.finished and getattr(self.optimizer, "perturbed_at_rest", False):
            self.optimizer.eval()  # type: ignore[attr-defined]  # what is saved and measured now is the model
        return record

    def _set_radius(self, step: int) -> None:
        """The radii of the groups for step ``step`` of the run, from 0: a share of their peak while they warm up."""
        for group, peak in zip(self.optimizer.param_groups, self.radii, strict=True):
            if self.rho_warmup and peak is not None:
                group["rho"] = peak * warmup_factor(step, self.rho_warmup)

    def _advance_schedule(self) -> None:
        with warnings.catch_warnings():  # of a first step that did not happen: the scaler skips it where it overflows
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def test_epoch(self) -> EpochRecord:
        """In place of an epoch, for a model that is not trained: test it."""
        loss, accuracy = self.evaluate()
        method, seed = self.config.method, self.config.seed
        finite = math.isfinite(loss)
        record = EpochRecord(
            method, seed, 1, None, loss if finite else None, accuracy, 0.0, 0, 0, 0.0, 0.0, "none", not finite
        )
        self.records.append(record)
        return record

    def _record(self, epoch: Epoch) -> EpochRecord:
        train_loss = float(self.world.mean(epoch.loss)) / self.steps_per_epoch
        test_loss, test_accuracy = self.evaluate()
        return EpochRecord(
            self.config.method,
            self.config.seed,
            len(self.records) + 1,
            train_loss if math.isfinite(train_loss) else None,
            test_loss if math.isfinite(test_loss) else None,
            test_accuracy,
            epoch.lr,
            self.steps_per_epoch,
            epoch.passes,
            epoch.watch.seconds,
            epoch.step_watch.seconds - epoch.pass_watch.seconds,
            str(getattr(self.optimizer, "backend", "torch")),
            not (math.isfinite(train_loss) and math.isfinite(test_loss)),
        )

    @torch.no_grad()
    def evaluate(self, batch_size: int = 1000) -> tuple[float, float]:
        """Mean cross-entropy and accuracy (a fraction) on the clean test images, the model in evaluation mode.

        Every process computes all of it, with the first one's running statistics: they get the same numbers.
        """
        self.world.share_buffers(self.model)
        self.model.eval()
        loss = correct = 0.0
        for x, y in zip(self.test_x.split(batch_size), self.test_y.split(batch_size), strict=True):
            logits = self.logits(x.to(self.device).float() / 255)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(1) == y).sum())
        return loss / len(self.test_y), correct / len(self.test_y)


def train_run(
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_step: Callable[[float], None] = lambda part: None,
    checkpoints: Checkpoints | None = None,
    world: World = ALONE,
    on_measurement: Callable[[dict[str, Any]], None] = lambda values: None,
) -> Trainer:
    """Train as ``config`` says, and measure what its study asks for. Ends early only if the loss diverges.

    ``on_epoch`` gets each epoch's record, those before a resumption included, ``on_measurement`` likewise the study's
    values; ``on_step`` the part of the epoch that is over. A checkpoint is on disk before its record is handed out, so
    that every record can be had again.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config, load_dataset(config.data, config.seed), world)
    design = design_of(config.study) if config.study else None
    settings = dict(config.settings)
    if design is not None and design.watch is not None:
        trainer.watcher = design.watch(settings)
    told = 0

    def save() -> None:
        if checkpoints is not None:
            state = trainer.state_dict()
            if world.rank == 0:
                checkpoints.save(config, state)

    def tell() -> None:
        nonlocal told
        for values in trainer.measurements[told:]:
            on_measurement(values)
        told = len(trainer.measurements)

    def after_step(step: int) -> None:
        if checkpoints is not None and checkpoints.due(step):
            save()
        on_step(step / trainer.steps_per_epoch)

    state = world.from_first(partial(checkpoints.load, config)) if checkpoints is not None else None
    if state is not None:
        trainer.load_state_dict(state)
        for record in trainer.records:
            on_epoch(record)
        tell()
    while not trainer.finished:
        record = trainer.train_epoch(after_step) if config.train else trainer.test_epoch()
        save()
        on_epoch(record)
        tell()
    if design is not None and design.measure is not None and not trainer.measured and not trainer.records[-1].diverged:
        trainer.measurements += design.measure(trainer, settings)
        trainer.measured = True
        save()
        tell()
    return trainer
