"""Ways to shard that leave an optimizer without whole norms: refused, with what to use instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import looksam
from tests.contract.support import network
from tests.distributed.ranks import WORLD, Ranks


def _error(make: Any) -> str:
    try:
        make()
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def _flat(rank: int, use_orig_params: bool, late: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = network()
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.1) if late else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    def use() -> None:
        mine = optimizer or looksam.SAM(wrapped.parameters(), "sgd", lr=0.1)
        wrapped(torch.ones(2, 5)).sum().backward()
        mine.first_step()

    return _error(use)


def _redundant(rank: int, variant: str) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return _error(
        lambda: ZeroRedundancyOptimizer(
            network().parameters(), optimizer_class=looksam.VARIANTS[variant], base_optimizer="sgd", lr=0.1
        )
    )


@pytest.mark.parametrize(("use_orig_params", "late"), [(True, False), (False, False), (True, True)])
def test_field_08_fsdp1_is_refused(ranks: Ranks, use_orig_params: bool, late: bool) -> None:
    for message in ranks.run(_flat, use_orig_params, late):
        assert "FullyShardedDataParallel" in message
        assert "fully_shard" in message


@pytest.mark.parametrize("variant", ["sam", "looksam", "asam"])
def test_field_08_zero_redundancy_optimizer_is_refused(ranks: Ranks, variant: str) -> None:
    messages = ranks.run(_redundant, variant)
    assert len(messages) == WORLD
    for message in messages:
        assert "ZeroRedundancyOptimizer" in message
        assert "fully_shard" in message


def test_field_08_others_are_not_taken_for_one(ranks: Ranks) -> None:
    ranks.run(_beside)


def _beside(rank: int) -> None:
    """A plain optimizer beside a sharded one, and its class inside another's constructor."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ZeroRedundancyOptimizer(network().parameters(), optimizer_class=torch.optim.SGD, lr=0.1)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.optimizer = looksam.SAM(self.net.parameters(), "sgd", lr=0.1)

    Holder()
