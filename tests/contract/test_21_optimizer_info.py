"""Sentence 21: torch's own test matrix. Its module is private: skipped where it is not there or has changed."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import looksam
from tests.contract.support import BACKENDS, OPTIONS, REUSING, assert_same, backward, states

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs torch's tests and expecttest")

BASES = {torch.optim.SGD: ("sgd", "optim_inputs_func_sgd"), torch.optim.Adam: ("adam", "optim_inputs_func_adam")}
BASES[torch.optim.AdamW] = ("adamw", "optim_inputs_func_adamw")


def info(variant: str, base: type[torch.optim.Optimizer]) -> Any:
    """An ``OptimizerInfo`` of one of our classes over one of torch's, with torch's inputs and errors for that base."""
    cls = looksam.VARIANTS[variant]
    suffix = base.__name__.lower()

    def inputs(device: Any, dtype: Any = None) -> Any:
        return [
            common.OptimizerInput(None, i.kwargs, i.desc)
            for i in getattr(common, f"optim_inputs_func_{suffix}")(device, dtype)
        ]

    return common.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=getattr(common, f"optim_error_inputs_func_{suffix}"),
        supported_impls=("foreach", "fused"),
        supports_complex=False,
        step_requires_closure=True,
        supports_fused_on=("cpu",),
    )


INFOS = {f"{v}-{b.__name__}": (info(v, b), b) for v in looksam.VARIANTS for b in BASES}
del INFOS["msam-SGD"]  # torch's inputs have no momentum
on_infos = pytest.mark.parametrize("name", INFOS)
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def cases(name: str, **flags: Any) -> list[tuple[str, dict[str, Any]]]:
    """torch's inputs, but for what is refused on purpose: differentiable, and amsgrad fused."""
    return [
        (i.desc, {**i.kwargs, **flags})
        for i in INFOS[name][0].optim_inputs_func("cpu")
        if not i.kwargs.get("differentiable") and not i.kwargs.get("amsgrad")
    ]


def make(name: str, params: Any, backend: str, kwargs: dict[str, Any]) -> looksam.SharpnessAware:
    optimizer_info, base = INFOS[name]
    variant = name.partition("-")[0]
    own = {"k": 2, "alpha": 0.3} if variant in REUSING else {}
    own |= OPTIONS.get(variant, {})
    return optimizer_info.optim_cls(params, base, rho=1e-3, backend=backend, **own, **kwargs)


class Quadratic:
    """torch's problem of "goes right direction": (weight x + bias)^2."""

    def __init__(self, maximize: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(10, generator=generator))
        self.x = torch.randn(5, generator=generator)
        self.sign = -1 if maximize else 1

    def loss(self) -> torch.Tensor:
        return self.sign * (self.weight.mv(self.x) + self.bias).pow(2).sum()

    def closure(self, optimizer: Any) -> Any:
        def closure(kept: None = None) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(optimizer, self.loss())

        return closure

    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def run(self, optimizer: Any, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            optimizer.step(self.closure(optimizer))
        return [p.detach().clone() for p in self.params()]


@on_infos
@on_backends
def test_contract_21_goes_right_direction(name: str, backend: str) -> None:
    optimizer_info, _ = INFOS[name]
    for (desc, kwargs), schedulers in itertools.product(cases(name), [None, *optimizer_info.scheduler_inputs]):
        problem = Quadratic(kwargs.get("maximize", False))
        optimizer = make(name, problem.params(), backend, {"lr": 1e-3, **kwargs})
        built = [constructor(optimizer) for constructor in schedulers or []]
        first = problem.loss().item()
        closure = problem.closure(optimizer)
        for _ in range(10):
            loss = optimizer.step(closure)
            for scheduler in built:
                metric = [loss.detach()] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []
                scheduler.step(*metric)
        last = problem.loss().item()
        assert last < first if not kwargs.get("maximize") else last > first, desc


@on_infos
def test_contract_21_errors(name: str) -> None:
    optimizer_info, base = INFOS[name]
    errors = optimizer_info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(errors) > 5
    for error in errors:
        given = error.optimizer_error_input
        if error.error_on is not common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            continue
        warns = issubclass(error.error_type, Warning)
        with (pytest.warns if warns else pytest.raises)(error.error_type, match=error.error_regex):
            optimizer_info.optim_cls(given.params, base, **OPTIONS.get(name.partition("-")[0], {}), **given.kwargs)


@on_infos
@on_backends
def test_contract_21_foreach_and_fused_against_the_loop(name: str, backend: str) -> None:
    for desc, kwargs in cases(name):
        results = []
        for flags in ({}, {"foreach": True}, {"fused": True}):
            if flags and {"foreach", "fused"} & kwargs.keys():
                continue
            if isinstance(kwargs.get("lr"), torch.Tensor) and "foreach" in flags and not kwargs.get("capturable"):
                continue  # torch refuses it
            problem = Quadratic()
            results.append(problem.run(make(name, problem.params(), backend, {**kwargs, **flags}), 5))
        for other in results[1:]:
            assert_same(results[0], other, desc)


@on_infos
@on_backends
def test_contract_21_tensor_lr_against_a_number(name: str, backend: str) -> None:
    for desc, kwargs in cases(name):
        if isinstance(kwargs.get("lr"), torch.Tensor) or (kwargs.get("foreach") and not kwargs.get("capturable")):
            continue
        results = []
        for lr in (1e-3, torch.tensor(1e-3, dtype=torch.float64)):
            problem = Quadratic()
            results.append(problem.run(make(name, problem.params(), backend, {**kwargs, "lr": lr}), 5))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, msg=desc)


@on_infos
@on_backends
def test_contract_21_no_op_without_gradients(name: str, backend: str) -> None:
    for _, kwargs in cases(name):
        problem = Quadratic()
        before = [p.detach().clone() for p in problem.params()]
        optimizer = make(name, problem.params(), backend, kwargs)
        optimizer.step(lambda kept=None: torch.ones(1, requires_grad=True))
        assert_same(before, [p.detach() for p in problem.params()])


@on_infos
@on_backends
def test_contract_21_state_dict_round_trip_and_deepcopy(name: str, backend: str) -> None:
    for desc, kwargs in cases(name):
        problem = Quadratic()
        optimizer = make(name, problem.params(), backend, kwargs)
        problem.run(optimizer, 3)
        twin = copy.deepcopy(problem)
        second = make(name, twin.params(), backend, kwargs)
        calls: list[str] = []
        second.register_load_state_dict_post_hook(lambda o, c=calls: c.append("loaded"))
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert calls == ["loaded"]
        pair = copy.deepcopy((problem, optimizer))
        expected = problem.run(optimizer, 3)
        assert_same(expected, twin.run(second, 3), desc)
        assert_same(expected, pair[0].run(pair[1], 3), desc)
        assert_same(states(optimizer), states(second), desc)
