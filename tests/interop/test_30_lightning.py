"""Sentence 30: Lightning's automatic optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import looksam
from tests.interop.plain import FORWARDS, ROWS, STEPS, Examples, Network, assert_same_weights, by_hand, optimizer_for

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> looksam.LookSAM:
        return optimizer_for(self)


def fit(folder: Path, **kwargs: Any) -> Module:
    module = Module()
    trainer = lightning.Trainer(
        max_steps=kwargs.pop("max_steps", STEPS),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )
    trainer.fit(module, DataLoader(Examples(), batch_size=ROWS))
    return module


def test_contract_30_lightning_equals_the_loop(tmp_path: Path) -> None:
    module = fit(tmp_path)
    assert module.network.forwards == FORWARDS
    assert_same_weights(module.network, by_hand())


def test_contract_30_lightning_bf16(tmp_path: Path) -> None:
    """Lightning opens its autocast around every training step, so the casts are fresh; the second pass differs."""
    module = fit(tmp_path, precision="bf16-mixed")
    assert module.network.forwards == FORWARDS
    assert module.losses[0] != module.losses[1]
    for a, b in zip(by_hand(), module.network.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0.1, atol=2e-2)


def test_contract_30_lightning_accumulation_is_what_the_documentation_warns_of(tmp_path: Path) -> None:
    """With ``accumulate_grad_batches`` the closure is of the last micro-batch alone: s lacks the others. Should Lightning
    change this, the warning in docs/contract.md can go."""
    module = fit(tmp_path, accumulate_grad_batches=2, max_steps=1)
    assert module.network.forwards == 3
    other, examples = Network(), Examples()
    optimizer = optimizer_for(other)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in (slice(0, ROWS), slice(ROWS, 2 * ROWS)):
            loss = F.cross_entropy(other(examples.x[part]), examples.y[part]) / 2
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)
    assert not all(torch.equal(a, b) for a, b in zip(_q(optimizer), _q(module.trainer.optimizers[0]), strict=True))


def _q(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [state["q"] for state in optimizer.state.values()]
