"""Sentence 31: Accelerate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.interop.plain import FORWARDS, ROWS, Examples, Network, assert_same_weights, by_hand, optimizer_for

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
import looksam  # noqa: E402


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate decides once a process whether it is one of several, from these variables, and remembers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("base", ["adamw", torch.optim.RMSprop])
def test_contract_31_accelerate_equals_the_loop(base: object) -> None:
    def make(model: torch.nn.Module) -> looksam.LookSAM:
        if base == "adamw":
            return optimizer_for(model)
        return looksam.LookSAM(model.parameters(), base, k=2, rho=0.1, lr=1e-2)  # type: ignore[arg-type]

    accelerator = accelerate.Accelerator(cpu=True)
    network = Network()
    raw = make(network)
    model, optimizer, batches = accelerator.prepare(network, raw, DataLoader(Examples(), batch_size=ROWS))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(raw.base_optimizer, lambda step: 1.0))
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert network.forwards == FORWARDS
    assert_same_weights(network, by_hand(make))
    assert raw.base_optimizer.param_groups is raw.param_groups
    assert optimizer.param_groups is raw.param_groups


def test_contract_31_load_state_dict_on_a_fresh_optimizer_keeps_groups_shared() -> None:
    for base in ("adamw", torch.optim.RMSprop):
        raw = looksam.LookSAM(Network().parameters(), base, lr=1e-2)
        raw.load_state_dict(raw.state_dict())
        assert raw.base_optimizer.param_groups is raw.param_groups
        assert raw.base_optimizer.state is raw.state
