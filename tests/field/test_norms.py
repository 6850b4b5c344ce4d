"""Running statistics move in the first pass only, whatever class keeps them. Each test holds them against a model that ran
forward once a step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from tests.contract.support import on_backends

STEPS = 4


class OwnForward(nn.BatchNorm1d):
    """As norms that fuse an activation are written: reads no flag."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1))


class PutsAnother(nn.Module):
    """No batch norm by its class, and every forward puts new tensors in the place of its buffers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("moving_var", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        self.moving_var = 0.9 * self.moving_var + 0.1 * x.detach().var(0)
        return self.weight * (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


def scripted(size: int) -> nn.Module:
    return torch.jit.script(nn.BatchNorm1d(size))


def timm_norm(size: int) -> nn.Module:
    timm = pytest.importorskip("timm.layers", reason="timm, or the torchvision that it needs, is not installed")
    return nn.Sequential(nn.Unflatten(1, (size, 1, 1)), timm.BatchNormAct2d(size), nn.Flatten())


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "own forward": OwnForward,
    "puts another": PutsAnother,
    "scripted": scripted,
    "timm": timm_norm,
}


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), norm, nn.Linear(4, 3))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 5), torch.randint(3, (16,))


@on_backends
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("style", ["closure", "two calls"])
def test_field_13_statistics_move_in_the_first_pass_only(backend: str, norm: str, style: str) -> None:
    model, once = net(NORMS[norm](4)), net(NORMS[norm](4))
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.1, rho=0.5, model=model, backend=backend)
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    where = [b.data_ptr() for b in model.buffers()]
    for step in range(STEPS):
        with torch.no_grad():
            for mine, p in zip(once.parameters(), model.parameters(), strict=True):
                mine.copy_(p)
        once(x)
        if style == "closure":
            optimizer.step(closure)
        else:
            closure()
            if step == 0 and norm == "puts another":
                where = [b.data_ptr() for b in model.buffers()]
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        for a, b in zip(buffers(once), buffers(model), strict=True):
            assert torch.equal(a, b)
    assert norm == "puts another" or where == [b.data_ptr() for b in model.buffers()]


def test_field_13_a_model_without_statistics() -> None:
    model = nn.Linear(5, 3)
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.1, model=model)
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure) > F.cross_entropy(model(x), y)


def test_field_13_the_flag_may_change_later() -> None:
    model = net(nn.BatchNorm1d(4, track_running_stats=True))
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.1, model=model)
    x, y = batch()
    flags = iter([True, False, True, True])

    def closure() -> Tensor:
        model[1].track_running_stats = next(flags)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not model[1].track_running_stats, "a flag that the closure sets is the user's"
    assert model[1].num_batches_tracked == 1
    optimizer.step(closure)
    assert model[1].num_batches_tracked == 2


def test_field_13_a_graph_from_the_second_pass_may_go_backward_later() -> None:
    """The buffers are restored past the version counter."""
    model = net(nn.BatchNorm1d(4))
    x, _ = batch()
    before = copy.deepcopy(buffers(model))
    with looksam.frozen_running_stats(model):
        loss = model(x).pow(2).sum()
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, buffers(model), strict=True))
