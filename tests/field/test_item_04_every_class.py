"""Item 4: any optimizer class under SAM and LookSAM is the class itself on their directions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

import looksam
from tests.field.classes import (
    CANNOT,
    LAST_BIT_DECIDES,
    NEED_PROCESS_GROUP,
    NOT_RESUMED,
    PACKAGES,
    Class,
    all_classes,
    importable,
)
from tests.field.reference import Reference
from tests.field.support import BACKENDS, HYPER

ALL = all_classes()
USABLE = [pytest.param(c, id=c.name) for c in ALL if c.name not in CANNOT]
STEPS = 6
"""RAdam moves from the sixth on."""
TOLERANCE = 1e-7
"""Absolute and relative: some classes compute in float32 whatever the parameters are, and are discontinuous."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classes' own, about themselves
        yield


@pytest.fixture(autouse=True)
def process_group(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of this process alone, for the classes that exchange something in their step."""
    callspec = getattr(request.node, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    if case is None or case.name not in NEED_PROCESS_GROUP:
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A model under an optimizer; every step draws the same random numbers on both sides."""

    def __init__(self, case: Class, make: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.case, self.make = case, make
        self.model = case.model()
        self.optimizer = make(case.groups(self.model))
        self.count, self.jitter = 0, 0.0
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(case.dtype)
        self.y = torch.randint(4, (16,), generator=generator)
        self.train()

    @property
    def base(self) -> Optimizer:
        reference = isinstance(self.optimizer, Reference)
        return self.optimizer.inner if reference else self.optimizer.base_optimizer  # type: ignore[no-any-return]

    def train(self) -> None:
        if hasattr(self.base, "train"):
            self.base.train()

    def steps(self, number: int, in_two_calls: bool) -> None:
        for _ in range(number):
            torch.manual_seed(self.count)
            self.count += 1
            if not in_two_calls:
                self.optimizer.step(self.backward)
                continue
            self.backward()
            if self.optimizer.first_step():
                self.backward()
                self.optimizer.second_step()

    def backward(self) -> Tensor:
        for p in self.model.parameters():
            p.grad = None
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        for p in self.model.parameters():
            if self.jitter and p.grad is not None:
                p.grad.mul_(1 + self.jitter * torch.rand_like(p).sub_(0.5))
        return loss

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def eval(self) -> list[Tensor]:
        """The weights that the class wants to be used, where it has others while it trains."""
        if hasattr(self.base, "eval"):
            self.base.eval()
        weights = self.weights
        self.train()
        return weights


def ours(case: Class, variant: str, backend: str) -> Run:
    cls = looksam.VARIANTS[variant]
    return Run(case, lambda groups: cls(groups, case.cls, backend=backend, **HYPER[variant], **_ours(case, variant)))


def _ours(case: Class, variant: str) -> dict[str, Any]:
    """An argument of the class whose name is also one of the variant's has ``base_`` before it."""
    return {f"base_{name}" if name in HYPER[variant] else name: value for name, value in case.options.items()}


def plain(case: Class, variant: str) -> Run:
    return Run(case, lambda groups: Reference(case.cls(groups, **case.options), variant, **HYPER[variant]))


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in ALL if c.name in LAST_BIT_DECIDES])
def test_item_04_a_rounding_leads_such_a_class_elsewhere(case: Class) -> None:
    """Why it is compared on one backend only, whose gradients have the reference's bits."""
    exact, moved = plain(case, "sam"), plain(case, "sam")
    moved.jitter = 4 * torch.finfo(torch.float64).eps
    for run in (exact, moved):
        run.steps(STEPS, False)
    with pytest.raises(AssertionError):
        assert_same(exact.weights, moved.weights)


def visible(group: Any) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@pytest.mark.skipif(not all(map(importable, PACKAGES)), reason="not all packages are installed")
def test_item_04_the_packages_have_the_classes_that_are_named() -> None:
    names = {c.name for c in ALL}
    assert CANNOT.keys() <= names
    assert len(names) > 160


@pytest.mark.parametrize("variant", ["sam", "looksam"])
@pytest.mark.parametrize("case", USABLE)
def test_item_04_a_class_under_a_variant(case: Class, variant: str) -> None:
    """Weights, what the class keeps in its groups, and all of it after a checkpoint."""
    in_two_calls = variant == "looksam"
    theirs = plain(case, variant)
    runs = [ours(case, variant, b) for b in BACKENDS if b == "reference" or case.name not in LAST_BIT_DECIDES]
    begin = theirs.weights
    for run in (theirs, *runs):
        run.steps(STEPS, in_two_calls)
    assert any(not torch.equal(a, b) for a, b in zip(begin, theirs.weights, strict=True)), "the class does not move"
    for run in runs:
        assert_same(run.weights, theirs.weights)
        assert_same(run.eval(), theirs.eval())
        for mine, alone in zip(run.base.param_groups, theirs.base.param_groups, strict=True):
            fused = run.base is run.optimizer  # the groups are then ours, too
            assert_alike({n: x for n, x in visible(mine).items() if not fused or n in alone}, visible(alone), skip(run))


def skip(run: Run) -> set[str]:
    """A method's own names win in our groups."""
    return {"alpha", "rho", "k"} if run.base is run.optimizer else set()


def assert_alike(a: Any, b: Any, skip: Collection[str] = ()) -> None:
    """Equal names, and numbers that are close."""
    if isinstance(b, dict):
        assert a.keys() - skip == b.keys() - skip
        for name in b.keys() - skip:
            assert_alike(a[name], b[name])
    elif isinstance(b, float | Tensor):
        torch.testing.assert_close(
            torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-6, atol=1e-9, equal_nan=True
        )
    elif isinstance(b, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_alike(x, y)
    elif isinstance(b, int | str | bool | None):
        assert a == b


@pytest.mark.parametrize("case", USABLE)
def test_item_04_resuming_with_a_class(case: Class) -> None:
    """Bit for bit, where the class alone does; and the list of those that do not is exact."""
    alone = Run(case, lambda groups: Reference(case.cls(groups, **case.options), "sam", rho=0.0))
    alone.steps(2, False)
    assert comes_back(alone, alone.base, lambda run: run.base) == (case.name not in NOT_RESUMED)
    if case.name not in NOT_RESUMED:
        run = ours(case, "looksam", BACKENDS[-1])
        run.steps(3, False)
        assert comes_back(run, run.optimizer, lambda other: other.optimizer)


def comes_back(run: Run, saved: Any, loads: Callable[[Run], Any]) -> bool:
    """Does a new run that loads what was saved go on as this one does?"""
    again = Run(run.case, run.make)
    again.model.load_state_dict(run.model.state_dict())
    again.count = run.count
    loads(again).load_state_dict(copy.deepcopy(saved.state_dict()))
    try:
        for each in (run, again):
            each.steps(2, False)
    except RuntimeError:  # float32 tables beside float64 parameters, after torch has cast them
        return False
    return all(torch.equal(a, b) for a, b in zip(run.weights, again.weights, strict=True))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in ALL if c.name in CANNOT])
def test_item_04_the_list_of_those_that_cannot_is_exact(case: Class) -> None:
    """One that could be a base is to be taken off the list."""
    try:
        for run in (plain(case, "sam"), ours(case, "sam", BACKENDS[0])):
            run.steps(2, False)
    except Exception:
        return
    assert_not_the_same(run, case)


def assert_not_the_same(run: Run, case: Class) -> None:
    theirs = plain(case, "sam")
    theirs.steps(2, False)
    with pytest.raises(AssertionError):
        assert_same(run.weights, theirs.weights)
