"""State, groups, weights and gradients are what they are at the moment of a step, whoever put them there."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looksam
from looksam_kernels import snapshot
from tests.contract.support import (
    Closure,
    assert_same,
    build,
    network,
    on_backends,
    on_sharp_variants,
    states,
    train,
    weights,
)

on_some_bases = pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "wrapped rmsprop", "wrapped adagrad"])


def fresh_pair(backend: str, variant: str, base: str) -> tuple[Any, Any, Any, Any]:
    """A model and its optimizer after two steps, and the same model with a new optimizer."""
    model = network()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    return model, optimizer, other, build(other.parameters(), variant, base, backend=backend)


def clear(optimizer: Any) -> None:
    optimizer.state.clear()


def clear_each(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.clear()


def new_state(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def plain_state(optimizer: Any) -> None:
    optimizer.state = {}


@on_backends
@on_some_bases
@pytest.mark.parametrize("variant", ["sam", "looksam", "vasso"])
@pytest.mark.parametrize("forget", [clear, clear_each, new_state, plain_state])
def test_contract_40_state_is_the_truth(backend: str, variant: str, base: str, forget: Callable[[Any], None]) -> None:
    """Forgotten state: as a new optimizer goes on. Clones: as if nothing had happened, and the clones are written."""
    model, optimizer, other, new = fresh_pair(backend, variant, base)
    forget(optimizer)
    for _ in range(3):
        train(model, optimizer, 1)
        train(other, new, 1)
        assert_same(weights(other), weights(model))
        assert_same(states(new), states(optimizer))
        for state in optimizer.state.values():
            state.update({name: x.clone() for name, x in state.items() if isinstance(x, Tensor)})
    assert len(optimizer.state_dict()["state"]) == 4


@on_backends
def test_contract_40_state_between_the_passes(backend: str) -> None:
    """In low precision the master, which the cleared state held, is what the weights go back to."""
    model = network(dtype=torch.bfloat16)
    optimizer = build(model.parameters(), "sam", "sgd", backend=backend, lr=0.0)
    before = weights(model)
    Closure(model, optimizer)()
    optimizer.first_step(zero_grad=True)
    Closure(model, optimizer)()
    optimizer.state.clear()
    optimizer.second_step()
    assert_same(before, weights(model))
    for p, state in optimizer.state.items():
        assert torch.equal(state["master_param"], p.float())


@on_backends
@on_some_bases
@pytest.mark.parametrize("between", [False, True], ids=["between steps", "between the passes"])
def test_contract_40_groups_are_the_truth(backend: str, base: str, between: bool) -> None:
    """A parameter that leaves stands still where it was; one that comes moves."""
    model = network()
    *rest, gone = model.parameters()
    new = nn.Parameter(torch.zeros(3))
    optimizer = build([*rest, gone], "sam", base, backend=backend)
    train(model, optimizer, 2)
    before = gone.detach().clone()

    def edit() -> None:
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": [*rest, new]}]

    optimizer.param_groups[0]["phase"] = 0
    if not between:
        edit()
    Closure(model, optimizer)()
    new.grad = torch.ones(3)
    assert optimizer.first_step(zero_grad=True)
    Closure(model, optimizer)()
    new.grad = torch.ones(3)
    if between:
        edit()
    optimizer.second_step()
    assert torch.equal(gone, before)
    assert new.detach().abs().min() > 0
    assert new in optimizer.state


class EveryName(torch.optim.Optimizer):
    """SGD that keeps, under names of ours, what only it understands."""

    def __init__(self, params: Any, lr: float, rho: str = "mine", k: int = 0, phase: str = "mine") -> None:
        super().__init__(
            params, {"lr": lr, "rho": rho, "k": k, "phase": phase, "draws": 3, "layer_filter": 5, "adaptive": 1}
        )

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group.keys() == {"params", *self.defaults}
            assert (group["rho"], group["phase"], group["draws"], group["layer_filter"]) == ("mine", "mine", 3, 5)
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                assert state.keys() in (set(), {"q", "y", "m"})
                state.setdefault("q", "mine")
                state["y"] = state["m"] = group["k"]
                p.add_(p.grad, alpha=-group["lr"])


@on_backends
@on_sharp_variants
def test_contract_41_no_name_collides(backend: str, variant: str) -> None:
    """As over SGD; with a scheduler; and through a checkpoint."""
    model, plain = network(dtype=torch.float64), network(dtype=torch.float64)
    mine = build(model.parameters(), variant, "sgd", backend=backend, momentum=0, weight_decay=0)
    options = {name: value for name, value in mine.param_groups[0].items() if name in mine.defaults}
    ours = {
        name: options[name]
        for name in ("rho", "k", "previous_batch", "total_steps", "lambda1", "lambda2")
        if name in options
    }
    ours |= {"gamma": 1.0} if variant == "esam" else {}
    other = looksam.VARIANTS[variant](plain.parameters(), EveryName, lr=0.1, backend=backend, **ours)
    for _ in range(2):
        train(model, mine, 2)
        train(plain, other, 2)
        for a, b in zip(weights(model), weights(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        saved = copy.deepcopy(other.state_dict())
        other = looksam.VARIANTS[variant](plain.parameters(), EveryName, lr=0.1, backend=backend, **ours)
        other.load_state_dict(saved)
    assert other.base_optimizer.param_groups[0]["k"] == 4


class Counting(torch.optim.Optimizer):
    """SGD whose steps grow by what it counts on itself and under a key of its own, and which saves the former."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.count = 0
        self.state["calls"] = 0  # type: ignore[index, assignment]

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.state["calls"] += 1  # type: ignore[index, operator]
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"] * (self.count + self.state["calls"]))  # type: ignore[index]

    def state_dict(self) -> Any:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]


@on_backends
@pytest.mark.parametrize("variant", ["sam", "looksam"])
def test_contract_41_what_a_class_keeps_elsewhere_is_saved(backend: str, variant: str) -> None:
    model = network()
    optimizer = looksam.VARIANTS[variant](model.parameters(), Counting, lr=0.01, k=2, backend=backend)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    resumed = looksam.VARIANTS[variant](other.parameters(), Counting, lr=0.01, k=2, backend=backend)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(other, resumed, 3)
    assert_same(weights(model), weights(other))


@on_backends
@pytest.mark.parametrize("base", ["sgd", "rmsprop", "lars"])
def test_contract_41_a_scheduler_writes_what_it_likes(backend: str, base: str) -> None:
    model, other = network(), network()
    optimizer = build(model.parameters(), "sam", base, backend=backend)
    untouched = build(other.parameters(), "sam", base, backend=backend)
    for name in ("momentum", "alpha", "rho", "weight_decay", "eps"):
        optimizer.param_groups[0][f"base_{name}"] = 0.77
    train(model, optimizer, 3)
    train(other, untouched, 3)
    assert_same(weights(other), weights(model))


@on_backends
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_contract_42_a_parameter_twice(backend: str) -> None:
    model = network()
    before = weights(model)
    optimizer = build([*model.parameters(), *model.parameters()], "sam", "sgd", backend=backend, lr=0.0)
    moved: list[Tensor] = []

    def look(call: int) -> None:
        if call == 1:
            moved.extend(p.detach() - b for p, b in zip(model.parameters(), before, strict=True))

    optimizer.step(Closure(model, optimizer, before=look))
    torch.testing.assert_close(torch.cat([x.flatten() for x in moved]).norm(), torch.tensor(0.1))
    assert_same(before, weights(model))


@on_backends
@pytest.mark.parametrize("row", range(4))
def test_contract_43_gradients_in_a_buffer(backend: str, row: int) -> None:
    """A buffer of one gradient, which each pass overwrites, for any of the parameters."""
    model, other = network(), network()
    optimizer = build(model.parameters(), "looksam", "sgd", backend=backend)
    plain = build(other.parameters(), "looksam", "sgd", backend=backend)
    p = list(model.parameters())[row]
    buffer = torch.zeros(p.numel())

    def into_the_buffer(call: int) -> None:
        buffer.copy_(p.grad.flatten())
        p.grad = buffer.view(p.shape)

    for _ in range(4):
        optimizer.step(Closure(model, optimizer, after=into_the_buffer))
    train(other, plain, 4)
    assert_same(weights(other), weights(model))


@on_backends
@pytest.mark.parametrize("base", ["adamw", "wrapped rmsprop"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, dtype=torch.uint8),
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, dtype=torch.complex64),
    ],
    ids=["uint8", "float8", "meta", "sparse", "complex"],
)
def test_contract_44_frozen_of_any_kind(backend: str, base: str, make: Callable[[], Tensor]) -> None:
    model, other = network(), network()
    frozen = nn.Parameter(make(), requires_grad=False)
    optimizer = build([frozen, *model.parameters()], "looksam", base, backend=backend)
    optimizer.add_param_group({"params": [nn.Parameter(make(), requires_grad=False)]})
    plain = build(other.parameters(), "looksam", base, backend=backend)
    train(model, optimizer, 3)
    train(other, plain, 3)
    assert_same(weights(other), weights(model))
    assert frozen not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("make", [snapshot.take, snapshot.PlainSnapshot], ids=["as chosen", "plain"])
def test_what_a_snapshot_sees(make: Callable[..., snapshot.Snapshot]) -> None:
    """Both say the same of every change, and nothing of none."""
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [p, q]}]
    state: dict[Any, dict[str, Any]] = {p: {"m": torch.zeros(2, 2), "other": 1}, q: {}}
    contents = torch.zeros(2)

    def after(change: Callable[[], Any]) -> int:
        taken = make(groups, state, [p, q], ["m"], [contents])
        assert taken.changes(groups, state, None) == 0
        contents.add_(1)
        assert taken.changes(groups, state, None) == snapshot.CONTENTS
        taken.written()
        assert taken.changes(groups, state, None) == 0
        change()
        return taken.changes(groups, state, None)

    assert after(lambda: p.add_(1) if not p.requires_grad else p.detach().add_(1)) == 0
    assert after(lambda: state[p]["m"].add_(1)) == 0
    assert after(lambda: state[p].update(other=2)) == 0
    assert after(lambda: state[p].update(m=torch.zeros(2, 2))) == snapshot.STATE
    assert after(lambda: state[q].update(m=torch.zeros(2, 2))) == snapshot.STATE
    assert after(lambda: state[q].clear()) == snapshot.STATE
    assert after(lambda: state.update({p: dict(state[p])})) == snapshot.STATE
    assert after(lambda: setattr(p, "data", p.data.clone())) == snapshot.PLACES
    assert after(lambda: setattr(p, "data", p.data.t())) == snapshot.PLACES
    assert after(lambda: groups[0]["params"].reverse()) == snapshot.PARAMS
    assert after(lambda: groups.append({"params": []})) == snapshot.PARAMS
    assert after(lambda: contents.zero_()) == snapshot.CONTENTS
    assert after(lambda: contents.data.zero_()) == 0  # torch's own way to write unseen
