"""Items 4 and 5: a wrapped class keeps its own names, in its groups, its state and its arguments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch

import looksam
from tests.field.support import HYPER, ONLY_OURS, Pair, Side, WrappedSGD, network, on_backends, on_styles

NAMES = (
    "rho",
    "k",
    "alpha",
    "phase",
    "gamma",
    "beta",
    "theta",
    "norm_scope",
    "layer_filter",
    "adaptive_filter",
    "draws",
    "mu",
    "var",
    "t",
)
"""Of ours, in groups."""
STATE = ("q", "q_norm_sq", "m", "y", "master_param", "b", "g", "s", "step")
"""Of ours, in the state, and of the columns of our tables."""


class Colliding(torch.optim.Optimizer):
    """SGD that reads and writes every name of ours, in its groups and in its state, with other meanings; its arguments have
    our names, too."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        rho: float = 0.5,
        k: int = 0,
        alpha: float = -1.0,
        max_grad_norm: float = 0.0,
        **more: Any,
    ) -> None:
        defaults = {name: f"its own {name}" for name in NAMES}
        super().__init__(
            params, {**defaults, "lr": lr, "rho": rho, "k": k, "alpha": alpha, "max_grad_norm": max_grad_norm}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            assert group["phase"] == "its own phase"
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # as many classes ask
                    state.update({name: torch.full((2,), 7.0) for name in STATE})
                    state["q"] = torch.zeros_like(p)
                assert state.keys() == set(STATE)
                state["q"] = group["rho"] * state["q"] + p.grad
                state["step"] = state["step"] + 1
                p.add_(state["q"], alpha=-group["lr"] / (1 + 0.1 * group["k"]))
                if group["max_grad_norm"] > 0:
                    p.clamp_(-group["max_grad_norm"], group["max_grad_norm"])


@on_backends
@on_styles
@pytest.mark.parametrize("variant", HYPER)
def test_item_04_a_class_that_uses_every_name_of_ours(backend: str, style: str, variant: str) -> None:
    pair = Pair(variant, (Colliding, {"lr": 0.1}), backend, style)
    pair.steps(5)
    for a, b in zip(pair.mine.params, pair.theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    mine, alone = pair.mine.optimizer.base_optimizer, pair.theirs.inner
    assert {**mine.param_groups[0], "params": 0} == {**alone.param_groups[0], "params": 0}
    for a, b in zip(pair.mine.params, pair.theirs.params, strict=True):
        assert mine.state[a].keys() == alone.state[b].keys()
        for name in STATE:
            torch.testing.assert_close(mine.state[a][name], alone.state[b][name], rtol=1e-9, atol=1e-9)
    for name, value in HYPER[variant].items():
        assert pair.mine.groups[0][name] == value


@on_backends
@pytest.mark.parametrize("variant", HYPER)
def test_item_04_checkpoints_and_copies_of_such_a_class(backend: str, variant: str) -> None:
    def make(model: torch.nn.Module) -> Any:
        cls = looksam.VARIANTS[variant]
        return cls(model.parameters(), Colliding, backend=backend, **HYPER[variant], **ONLY_OURS.get(variant, {}))

    model = network()
    side = Side(model, make(model))
    for _ in range(3):
        side.step("closure")
    others = []
    model = network()
    model.load_state_dict(side.model.state_dict())
    loaded = make(model)
    loaded.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))
    others.append(Side(model, loaded))
    others.append(Side(*copy.deepcopy((side.model, side.optimizer))))
    others.append(Side(*pickle.loads(pickle.dumps((side.model, side.optimizer)))))
    for each in (side, *others):
        for _ in range(3):
            each.step("closure")
    for other in others:
        for a, b in zip(side.params, other.params, strict=True):
            assert torch.equal(a, b)


@on_backends
@pytest.mark.parametrize("variant", ["sam", "looksam"])
def test_item_04_arguments_of_our_names(backend: str, variant: str) -> None:
    """``base_<name>`` gives the class its own; in groups, too, and it can be changed through the base's groups."""
    model = network()
    cls = looksam.VARIANTS[variant]
    given = {**HYPER[variant], "base_rho": 0.25, "lr": 0.1, "max_grad_norm": 0.5}
    mine = Side(model, cls(model.parameters(), Colliding, backend=backend, **given))
    pair = Pair(variant, (Colliding, {"lr": 0.1}), backend)
    pair.mine = mine
    pair.theirs.inner.param_groups[0].update(rho=0.25, max_grad_norm=0.5)
    pair.steps(3)
    for a, b in zip(pair.mine.params, pair.theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for groups in (mine.optimizer.base_optimizer.param_groups, pair.theirs.inner.param_groups):
        groups[0]["rho"] = 0.75
    pair.steps(3)
    for a, b in zip(pair.mine.params, pair.theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert mine.optimizer.param_groups[0]["rho"] == HYPER[variant]["rho"]


@on_backends
@on_styles
def test_item_04_what_is_written_to_either_groups_reaches_the_other(backend: str, style: str) -> None:
    pair = Pair("looksam", "wrapped sgd", backend, style)
    pair.steps(1)
    pair.both(lambda side: side.groups[0].update(lr=0.02))
    assert pair.mine.optimizer.base_optimizer.param_groups[0]["lr"] == 0.02
    pair.steps(1)
    pair.mine.optimizer.base_optimizer.param_groups[0]["momentum"] = 0.3
    pair.theirs.groups[0]["momentum"] = 0.3
    assert pair.mine.groups[0]["momentum"] == 0.3
    pair.steps(2)
    pair.assert_equal()


@on_backends
@on_styles
def test_item_04_state_is_reset_through_the_base(backend: str, style: str) -> None:
    pair = Pair("sam", "wrapped adamw", backend, style)
    pair.steps(2)
    pair.mine.optimizer.base_optimizer.state.clear()
    pair.theirs.inner.state.clear()
    pair.steps(2)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("limit", [0, 0.0, -1.0, float("nan")])
@pytest.mark.parametrize("base", ["sgd", "lamb", WrappedSGD, torch.optim.NAdam])
@pytest.mark.parametrize("variant", ["sam", "looksam"])
def test_item_05_a_limit_that_stops_everything_is_refused(backend: str, limit: float, base: Any, variant: str) -> None:
    """Over fused and wrapped bases, for all groups and for one."""
    cls = looksam.VARIANTS[variant]
    with pytest.raises(ValueError, match="max_grad_norm"):
        cls(network().parameters(), base, lr=0.1, max_grad_norm=limit, backend=backend)
    with pytest.raises(ValueError, match="max_grad_norm"):
        cls([{"params": [*network().parameters()], "max_grad_norm": limit}], base, lr=0.1, backend=backend)


@on_backends
@on_styles
@pytest.mark.parametrize("limit", [0.01, 0.5])
@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "wrapped sgd", "wrapped adamw"])
def test_item_05_our_limit_clips_the_direction(backend: str, style: str, limit: float, base: str) -> None:
    pair = Pair("looksam", base, backend, style)
    pair.both(lambda side: side.set_hyper(max_grad_norm=limit))
    pair.steps(4)
    pair.assert_equal()


class Limited(torch.optim.SGD):
    """Has a ``max_grad_norm`` of its own, as Adan has: 0 is off."""

    def __init__(self, params: Iterable[Any], lr: float, max_grad_norm: float = 0.0) -> None:
        super().__init__(params, lr)
        self.limit = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.limit > 0:
            torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.limit)
        super().step()


class LimitedInGroups(Limited):
    """Keeps it in its groups."""

    def __init__(self, params: Iterable[Any], lr: float, max_grad_norm: float = 0.0) -> None:
        super().__init__(params, lr, max_grad_norm)
        for group in self.param_groups:
            group["max_grad_norm"] = max_grad_norm


@on_backends
@on_styles
@pytest.mark.parametrize("cls", [Limited, LimitedInGroups])
@pytest.mark.parametrize("limit", [None, 0.0, 0.05])
def test_item_05_a_class_with_a_limit_of_its_own(backend: str, style: str, cls: Any, limit: float | None) -> None:
    options = {"lr": 0.1} if limit is None else {"lr": 0.1, "max_grad_norm": limit}
    pair = Pair("looksam", (cls, options), backend, style)
    before = [p.detach().clone() for p in pair.mine.params]
    pair.steps(3)
    for a, b in zip(pair.mine.params, pair.theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(before, pair.mine.params, strict=True))


class WithOurArguments(torch.optim.SGD):
    """Its arguments have the names of ours that are no hyper-parameters."""

    def __init__(
        self, params: Iterable[Any], lr: float, backend: str = "own", model: Any = None, seed: int = 3
    ) -> None:
        super().__init__(params, lr)
        self.given: tuple[Any, ...] = (backend, model, seed)


@on_backends
def test_item_05_arguments_that_are_no_hyper_parameters(backend: str) -> None:
    model = network()
    optimizer = looksam.SAM(
        model.parameters(), WithOurArguments, lr=0.1, backend=backend, base_backend="theirs", base_model="a", seed=5
    )
    assert optimizer.backend == backend
    assert optimizer.base_optimizer.given == ("theirs", "a", 5)
    before = [p.detach().clone() for p in model.parameters()]
    Side(model, optimizer).step("closure")
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
