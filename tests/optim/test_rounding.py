"""``rounding="stochastic"``: bfloat16 weights without a float32 master copy that train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looksam
from tests.contract.support import (
    VARIANTS,
    Closure,
    assert_goes_on_from_a_checkpoint,
    assert_same,
    build,
    network,
    train,
    weights,
    works,
)
from tests.optim.cases import BACKENDS, QUICK

pytestmark = pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
on_variants = pytest.mark.parametrize("variant", VARIANTS)
STOCHASTIC = {"rounding": "stochastic", "rounding_seed": 3}


def pure(seed: int = 0) -> nn.Sequential:
    return network(seed, torch.bfloat16)


def base_of(variant: str) -> str:
    return "adamw" if works(variant, "adamw") else "sgd"


@on_variants
def test_every_variant_learns_without_a_master_copy(variant: str) -> None:
    model = pure()
    optimizer = build(model.parameters(), variant, base_of(variant), **STOCHASTIC)
    losses = train(model, optimizer, 8)
    assert losses[-1] < losses[0]
    for p in model.parameters():
        assert "master_param" not in optimizer.state[p]


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("variant", ["looksam", "sam", "msam", "crsam"])
def test_backends_round_alike(backend: str, variant: str) -> None:
    """The sums differ by their own rounding, which decides about few elements: most have the same bits after a step."""
    ends = []
    for name in (backend, "reference"):
        model = pure()
        train(model, build(model.parameters(), variant, "sgd", backend=name, **STOCHASTIC), 1)
        ends.append(torch.cat([w.flatten() for w in weights(model)]))
    assert (ends[0] != ends[1]).double().mean() < 0.03


class Flat(nn.Module):
    """A loss whose gradient is 1 in every element."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))


def descend(rounding: str, steps: int, lr: float, n: int = 4096, **options: Any) -> Tensor:
    model = Flat(n)
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=lr, rho=1e-6, rounding=rounding, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.w.float().sum()
        loss.backward()
        return loss.detach()

    for _ in range(steps):
        optimizer.step(closure)
    return model.w.detach().double()


@pytest.mark.parametrize("backend", QUICK)
def test_updates_that_nearest_loses_count_in_the_mean(backend: str) -> None:
    """40 steps of 2^-14 below 1, where bfloat16 has 2^-8 between numbers: nearest stays at 1. A step that moves a 64th
    of the elements by 2^-8 has the variance 2^-22."""
    n, steps, lr = 4096, 40, 2.0**-14
    assert torch.equal(descend("nearest", steps, lr, backend=backend), torch.ones(n, dtype=torch.float64))
    mean = descend("stochastic", steps, lr, backend=backend).mean().item()
    sigma = 2.0**-11 * (steps / n) ** 0.5
    assert abs(mean - (1 - steps * lr)) < 4.5 * sigma < steps * lr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_perturbation_that_nearest_loses_moves_some_weights_and_goes_back_exactly(backend: str) -> None:
    """rho / sqrt(n) = 2^-12 above 1, a 32nd of the distance between two numbers there."""
    n = 4096
    share = []
    for rounding in ("nearest", "stochastic"):
        model = Flat(n)
        optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.0, rho=2.0**-6, rounding=rounding, backend=backend)
        model.w.float().sum().backward()
        optimizer.first_step(zero_grad=True)
        share.append((model.w > 1).double().mean().item())
        assert set(model.w.detach().float().tolist()) <= {1.0, 1 + 2.0**-7}
        model.w.float().sum().backward()
        optimizer.second_step()
        assert torch.equal(model.w.detach(), torch.ones(n, dtype=torch.bfloat16))
    assert share[0] == 0
    assert abs(share[1] - 2.0**-5) < 4.5 * (2.0**-5 / n) ** 0.5


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("variant", ["looksam", "esam", "msam", "s2sam"])
def test_a_run_continues_from_a_checkpoint_bit_for_bit(backend: str, variant: str) -> None:
    model = pure()
    optimizer = build(model.parameters(), variant, "sgd", backend=backend, **STOCHASTIC)
    train(model, optimizer, 3)
    other = pure(1)
    second = build(other.parameters(), variant, "sgd", backend=backend)  # the checkpoint says how it goes on
    assert_goes_on_from_a_checkpoint((model, optimizer), (other, second), train, 3)


def test_other_seeds_and_other_steps_round_otherwise() -> None:
    ends = [descend("stochastic", 1, 2.0**-10, rounding_seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    two = descend("stochastic", 2, 2.0**-10)
    twice_the_same = 1 - 2 * (1 - ends[0])
    assert not torch.equal(two, twice_the_same)


def test_from_master_copies_and_back() -> None:
    """Groups may be changed, and checkpoints come from the other kind of run."""
    model = pure()
    optimizer = build(model.parameters(), "looksam", "adamw")
    train(model, optimizer, 3)
    assert all("master_param" in optimizer.state[p] for p in model.parameters())
    before = weights(model)
    for group in optimizer.param_groups:
        group["rounding"] = "stochastic"
        group["lr"] = 0.0
    train(model, optimizer, 2)
    assert not any("master_param" in optimizer.state[p] for p in model.parameters())
    assert_same(before, weights(model))
    for group in optimizer.param_groups:
        group["rounding"] = None
    train(model, optimizer, 1)
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["master_param"], p.detach().float())


def test_float32_parameters_and_master_copies_are_rounded_to_nearest() -> None:
    ends = []
    for options in ({}, STOCHASTIC):
        model = network()
        train(model, build(model.parameters(), "looksam", "adamw", **options), 3)
        ends.append(weights(model))
    assert_same(*ends)


@pytest.mark.parametrize("variant", ["msam", "s2sam"])
def test_weights_that_rest_perturbed(variant: str) -> None:
    """eval() shows the plain weights, rounded to nearest; train() goes back to the same bits."""
    model = pure()
    optimizer = build(model.parameters(), variant, "sgd", **STOCHASTIC)
    train(model, optimizer, 4)
    before = weights(model)
    column = "momentum_buffer" if variant == "msam" else "y"
    plain = []
    for p in model.parameters():
        state = optimizer.state[p]
        e = state[column].float() * state[f"{column}_scale"].float()
        plain.append((p.detach().float() - e).bfloat16())
    with optimizer.plain_weights():
        assert_same(weights(model), plain)
    assert_same(weights(model), before)


@pytest.mark.parametrize("cls", [looksam.LAMB, looksam.LARS, looksam.Lion])
def test_the_standalone_optimizers_take_it_too(cls: Any) -> None:
    model = pure()
    optimizer = cls(model.parameters(), lr=1e-2, **STOCHASTIC)
    Closure(model, optimizer)()
    optimizer.step()
    assert optimizer.param_groups[0]["rounding_seed"] == 3
    assert not any("master_param" in state for state in optimizer.state.values())


def test_what_cannot_be_is_refused() -> None:
    half = [nn.Parameter(torch.ones(2, dtype=torch.float16))]
    short = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="rounding is for bfloat16 parameters, and one is of float16: convert it"):
        looksam.SAM(half, "sgd", lr=0.1, **STOCHASTIC)
    with pytest.raises(ValueError, match="rounding='nearest' is for fused bases, and Rprop writes the weights itself"):
        looksam.SAM(short, torch.optim.Rprop, lr=0.1, rounding="nearest")
    with pytest.raises(ValueError, match="rounding must be one of 'nearest', 'stochastic', or None, not 'up'"):
        looksam.SAM(short, "sgd", lr=0.1, rounding="up")
    with pytest.raises(ValueError, match="rounding_seed must be a whole number of at least 0"):
        looksam.SAM(short, "sgd", lr=0.1, rounding="stochastic", rounding_seed=-1)
    with pytest.raises(ValueError, match="rounding must be the same in all groups"):
        looksam.SAM([{"params": short}, {"params": half, "rounding": "stochastic"}], "sgd", lr=0.1)
    model = pure()
    optimizer = build(model.parameters(), "sam", "sgd", **STOCHASTIC)
    model.half()
    model(torch.ones(1, 5, dtype=torch.float16)).sum().backward()
    with pytest.raises(ValueError, match="one is of float16"):
        optimizer.first_step()


def test_a_group_that_gets_it_later_over_a_wrapped_base_is_refused() -> None:
    model = pure()
    optimizer = build(model.parameters(), "sam", "wrapped rmsprop")
    train(model, optimizer, 1)
    optimizer.param_groups[0]["rounding"] = "nearest"
    before = weights(model)
    with pytest.raises(ValueError, match="rounding='nearest' is for fused bases"):
        train(model, optimizer, 1)
    assert_same(before, weights(model))


def test_older_checkpoints_lack_it() -> None:
    model = pure()
    optimizer = build(model.parameters(), "looksam", **STOCHASTIC)
    saved: dict[str, Any] = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["rounding"], group["rounding_seed"]
    second = build(model.parameters(), "looksam", **STOCHASTIC)
    second.load_state_dict(saved)
    assert second.param_groups[0]["rounding"] == "stochastic"
    assert second.param_groups[0]["rounding_seed"] == 3
