"""Sentence 32: HF Trainer through a small subclass, timm through its registry."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import looksam
from tests.interop.plain import FORWARDS, ROWS, STEPS, Examples, Network, assert_same_weights, by_hand, optimizer_for


def test_contract_32_trainer_equals_the_loop(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

    class SharpnessAwareTrainer(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss = super().training_step(model, inputs, num_items_in_batch)
            optimizer = self.optimizer.optimizer  # inside Accelerate's wrapper
            if optimizer.needs_second_pass:
                optimizer.first_step(zero_grad=True)
                super().training_step(model, inputs, num_items_in_batch)
            return loss

    network = Network()
    optimizer = optimizer_for(network)
    trainer = SharpnessAwareTrainer(
        model=network,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Examples(as_dict=True),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    assert network.forwards == FORWARDS
    assert_same_weights(network, by_hand())


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``timm.optim`` without the models beside it."""
    package, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    package.__path__ = list(importlib.util.find_spec("timm").submodule_search_locations)
    models.group_parameters = None
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    for name in [name for name in sys.modules if name.startswith("timm.optim")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.skipif(not importable("timm"), reason="timm is not installed")
def test_contract_32_timm_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    if not importable("torchvision"):  # timm.optim itself does not need it, but the package's __init__ does
        alone(monkeypatch)
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(
        OptimInfo(name="looksam", opt_class=looksam.LookSAM, description="LookSAM", has_betas=False, has_eps=False)
    )

    def make(model: torch.nn.Module) -> looksam.LookSAM:
        optimizer = create_optimizer_v2(
            model, "looksam", lr=1e-2, weight_decay=0.01, base_optimizer="adamw", k=2, rho=0.1
        )
        assert isinstance(optimizer, looksam.LookSAM)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
        return optimizer

    by_hand(make)
