"""Item 3: schedulers write what they like into the groups, and it acts as in torch's own classes."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import looksam
from tests.field.classes import importable
from tests.field.support import (
    BACKENDS,
    BASES,
    HYPER,
    STYLES,
    Pair,
    Side,
    assert_close,
    network,
    on_backends,
    on_styles,
)

BASES_HERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": BASES["sgd"],
    "adamw": BASES["adamw"],
    "rmsprop": BASES["rmsprop"],
    "lars": BASES["lars"],
    "lamb": BASES["lamb"],
    "lion": BASES["lion"],
    "wrapped sgd": BASES["wrapped sgd"],
    "wrapped adamw": BASES["wrapped adamw"],
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
}
"""Those whose groups OneCycleLR and CyclicLR write momentum or betas into, and a class of torch's that is wrapped."""


def chained(optimizer: Any) -> Any:
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer: Any) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.3, total_iters=2), schedulers.StepLR(optimizer, 2, 0.5)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 1e-3, 5e-2, step_size_up=3, cycle_momentum=any(m in o.param_groups[0] for m in ("momentum", "betas"))
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 5e-2, total_steps=12),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-3, anneal_epochs=4),
}


def test_item_03_every_scheduler_of_torch_is_here() -> None:
    theirs = {
        name
        for name, cls in vars(schedulers).items()
        if isinstance(cls, type) and issubclass(cls, schedulers.LRScheduler) and not name.startswith("_")
    } - {"LRScheduler"}
    assert theirs <= SCHEDULERS.keys()


def advance(scheduler: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of a deprecated argument
        scheduler.step(1.0) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()


def assert_groups(side: Side, other: Side, ours: str = "looksam") -> None:
    """Every name in the groups of the class alone has the same value in ours, but for those that the method has, too."""
    for mine, theirs in zip(side.groups, other.groups, strict=True):
        for name, value in theirs.items():
            if name in HYPER[ours]:
                continue
            if isinstance(value, float | int | torch.Tensor):
                assert_close(mine[name], value, name)
            elif name == "betas":
                assert tuple(mine[name]) == pytest.approx(tuple(value))


def two_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    params = [*model.parameters()]
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]


@pytest.mark.parametrize(("backend", "style"), [*zip(BACKENDS, STYLES, strict=False)])
@pytest.mark.parametrize("base", BASES_HERE)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_item_03_a_scheduler(backend: str, style: str, base: str, name: str) -> None:
    """On the optimizer in one call style, on its ``base_optimizer`` in the other."""
    pair = Pair("looksam", BASES_HERE[base], backend, style, groups=two_groups)
    target = pair.mine.optimizer if style == "closure" else pair.mine.optimizer.base_optimizer
    mine, theirs = SCHEDULERS[name](target), SCHEDULERS[name](pair.theirs.inner)
    for _ in range(5):
        pair.steps(1)
        advance(mine)
        advance(theirs)
        assert_groups(pair.mine, pair.theirs)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("base", BASES_HERE)
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_item_03_checkpoint_after_a_scheduler(backend: str, base: str, name: str) -> None:
    """Saved with what the scheduler had written, and gone on with it."""
    pair = Pair("looksam", BASES_HERE[base], backend, groups=two_groups)
    writers = [SCHEDULERS[name](side.inner) for side in pair]
    for _ in range(3):
        pair.steps(1)
        for scheduler in writers:
            advance(scheduler)
    again = Pair("looksam", BASES_HERE[base], backend, groups=two_groups)
    again.mine.model.load_state_dict(pair.mine.model.state_dict())
    again.mine.optimizer.load_state_dict(copy.deepcopy(pair.mine.optimizer.state_dict()))
    scheduler = SCHEDULERS[name](again.mine.optimizer)
    scheduler.load_state_dict(writers[0].state_dict())
    again.mine.optimizer.load_state_dict(copy.deepcopy(pair.mine.optimizer.state_dict()))
    for _ in range(3):
        pair.steps(1)
        again.mine.step("closure")
        for each in (*writers, scheduler):
            advance(each)
    pair.assert_equal()
    for a, b in zip(again.mine.params, pair.mine.params, strict=True):
        assert torch.equal(a, b)


@on_backends
@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop", "wrapped sgd", "wrapped adamw"])
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_item_03_checkpoint_of_the_plain_class_that_a_scheduler_had_touched(backend: str, base: str, name: str) -> None:
    """Its groups have ``base_momentum``, ``max_momentum``, ``initial_lr``, ...: foreign names, and no arguments of ours."""
    optimizer, options = BASES_HERE[base]
    cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}.get(base, optimizer)
    model = network()
    plain = cls(two_groups(model), **options)
    side = Side(model, plain)
    scheduler = SCHEDULERS[name](plain)
    for _ in range(3):
        side.backward()
        plain.step()
        scheduler.step()
    saved = plain.state_dict()

    pair = Pair("looksam", BASES_HERE[base], backend, groups=two_groups)
    for each in pair:
        each.model.load_state_dict(model.state_dict())
        each.inner.load_state_dict(copy.deepcopy(saved))
    momentum = 0.5
    for each in pair:
        for group in each.groups:
            if "momentum" in group:
                group["momentum"] = momentum
    pair.steps(4)
    assert_groups(pair.mine, pair.theirs)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("base", BASES_HERE)
@pytest.mark.parametrize("variant", ["sam", "looksam", "gsam", "layersam"])
def test_item_03_names_in_a_group_that_nobody_reads(backend: str, base: str, variant: str) -> None:
    """Whatever others write there (and torch's schedulers write ``base_...``, ``max_...``, ``initial_...``) changes nothing."""
    foreign = {
        f"{prefix}_{name}": 123.0
        for prefix in ("base", "max", "min", "initial", "swa")
        for name in ("lr", "momentum", "rho", "alpha", "k", "betas", "weight_decay", "eps", "gamma", "beta", "lambda_")
    } | {"name": "a", "lr_scale": 0.5, "step_size": 7, "total_steps": 9}
    pair = Pair(variant, BASES_HERE[base], backend)
    pair.steps(1)
    pair.both(lambda side: side.groups[0].update({k: v for k, v in foreign.items() if k not in side.groups[0]}))
    pair.steps(3)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("base", ["sgd", "adamw", "lars", "wrapped adamw"])
@pytest.mark.skipif(not importable("timm"), reason="timm is not installed")
def test_item_03_timms_scheduler(backend: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs write ``lr``, and read ``lr_scale`` and ``initial_lr``."""
    if not importable("torchvision"):  # timm.scheduler does not need it, but the package's __init__ does
        package = types.ModuleType("timm")
        package.__path__ = [*importlib.util.find_spec("timm").submodule_search_locations]  # type: ignore[union-attr]
        monkeypatch.setitem(sys.modules, "timm", package)
    from timm.scheduler.cosine_lr import CosineLRScheduler

    def scaled(model: torch.nn.Module) -> list[dict[str, Any]]:
        first, second = two_groups(model)
        return [{**first, "lr_scale": 0.5}, second]

    pair = Pair("looksam", BASES_HERE[base], backend, groups=scaled)
    writers = [CosineLRScheduler(side.inner, t_initial=6, lr_min=1e-4, warmup_t=2) for side in pair]
    for step in range(6):
        pair.steps(1)
        for scheduler in writers:
            scheduler.step(step)
        assert_groups(pair.mine, pair.theirs)
    pair.assert_equal()


@on_backends
@on_styles
def test_item_03_momentum_of_now_acts(backend: str, style: str) -> None:
    """The input of the report: after OneCycleLR has written, a momentum that is set by hand is the momentum."""
    pair = Pair("sam", "sgd", backend, style)
    writers = [SCHEDULERS["OneCycleLR"](side.inner) for side in pair]
    pair.steps(1)
    for scheduler in writers:
        advance(scheduler)
    pair.both(lambda side: side.groups[0].update(momentum=0.1))
    pair.steps(3)
    pair.assert_equal()
    assert isinstance(pair.mine.optimizer, looksam.SAM)
    assert HYPER["sam"]["rho"] == pair.mine.groups[0]["rho"]
