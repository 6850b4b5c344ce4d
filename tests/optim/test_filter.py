"""``perturb_filter``: what a method leaves alone costs it nothing, and is the same whether its gradients are there or not."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from tests.contract.support import OPTIONS, PERIODIC, SHARP
from tests.optim.cases import QUICK

on_backends = pytest.mark.parametrize("backend", QUICK)
on_variants = pytest.mark.parametrize("variant", looksam.VARIANTS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())

    def others(self) -> list[nn.Parameter]:
        return [*self.first.parameters(), *self.last.parameters()]


def is_norm(p: Tensor) -> bool:
    return p.shape == (8,)


def in_norm(model: Net) -> Callable[[Tensor], bool]:
    return {*model.norm.parameters()}.__contains__


def build(model: Net, variant: str, backend: str, base: str = "sgd", **options: Any) -> Any:
    cls = looksam.VARIANTS[variant]
    given = {"rho": 0.3, **({"k": 2} if variant in PERIODIC else {}), **OPTIONS.get(variant, {}), **options}
    return cls(model.parameters(), base, lr=0.1, momentum=0.9, perturb_filter=in_norm(model), backend=backend, **given)


def train(
    model: Net, optimizer: Any, steps: int = 6, before: Callable[[int], None] = lambda call: None
) -> list[Tensor]:
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=random, dtype=torch.float64), torch.randint(3, (16,), generator=random)
        calls = 0

        def closure(kept: Tensor | None = None, x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal calls
            before(calls)
            calls += 1
            optimizer.zero_grad()
            if optimizer.per_sample:
                return F.cross_entropy(model(x), y, reduction="none")
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


@on_backends
@pytest.mark.parametrize("variant", SHARP)
def test_the_others_are_not_moved_and_have_no_backup(backend: str, variant: str) -> None:
    model = Net()
    optimizer = build(model, variant, backend)
    here: list[list[Tensor]] = []
    train(model, optimizer, 3, lambda call: here.append([p.detach().clone() for p in model.parameters()]))
    names = [name for name, _ in model.named_parameters()]
    moved = {n for a, b in itertools.pairwise(here) for n, x, y in zip(names, a, b, strict=True) if not x.equal(y)}
    first = here[:1] if variant == "sampa" else here[:2]  # the second pass of SAMPa is elsewhere with all
    in_step = {n for n, *xs in zip(names, *first, strict=True) if any(not x.equal(xs[0]) for x in xs)}
    assert in_step == (set() if variant == "sampa" else {"norm.weight", "norm.bias"})
    assert moved == {*names}, "all are trained"
    saved = {p for p, b in zip(model.parameters(), optimizer._binding.table["b"], strict=True) if b is not None}
    assert saved == {*(model.parameters() if variant == "sampa" else model.norm.parameters())}
    for p in model.others():
        assert not optimizer.state[p].keys() & {"q", "q_norm_sq", "m"}
    for p in model.norm.parameters():
        assert optimizer.state[p].keys() >= {x for x in optimizer._written if variant not in ("aesam",)}


@on_backends
@pytest.mark.parametrize("base", ["sgd", "wrapped"])
@pytest.mark.parametrize("variant", [v for v in SHARP if v != "sampa"])
def test_the_first_pass_of_a_sharp_step_may_leave_out_their_gradients(backend: str, variant: str, base: str) -> None:
    """Bit for bit: in a pass that is followed by another."""

    class OfUser(torch.optim.SGD):
        """Not the fused one."""

    results = []
    for leave_out in (False, True):
        model = Net()
        optimizer = build(model, variant, backend, base="sgd" if base == "sgd" else OfUser)

        def before(call: int, model: Net = model, optimizer: Any = optimizer, leave_out: bool = leave_out) -> None:
            skip = leave_out and call == 0 and optimizer.needs_second_pass
            for p in model.others():
                p.requires_grad_(not skip)

        results.append(train(model, optimizer, 6, before))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@on_backends
@on_variants
def test_a_filter_that_takes_all_changes_nothing_but_the_host_of_the_formulas(backend: str, variant: str) -> None:
    results = []
    for accepts in (None, lambda p: True):
        model = Net()
        options = {"k": 2} if variant in PERIODIC else {}
        options |= OPTIONS.get(variant, {})
        optimizer = looksam.VARIANTS[variant](
            model.parameters(), "sgd", lr=0.1, momentum=0.9, perturb_filter=accepts, backend=backend, **options
        )
        results.append(train(model, optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@on_backends
def test_ae_sam_decides_by_the_norm_of_those_inside(backend: str) -> None:
    model = Net()
    optimizer = looksam.AESAM(
        model.parameters(), "sgd", total_steps=10, delta=0.0, lr=0.1, perturb_filter=in_norm(model), backend=backend
    )
    train(model, optimizer, 1)
    twin, random = Net(), torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=random, dtype=torch.float64), torch.randint(3, (16,), generator=random)
    F.cross_entropy(twin(x), y).backward()
    expected = sum(p.grad.square().sum().item() for p in twin.norm.parameters())
    assert optimizer.param_groups[0]["mu"] == pytest.approx(expected, rel=1e-12)


@on_backends
def test_esam_draws_its_mask_for_those_inside(backend: str) -> None:
    model = Net()
    optimizer = build(model, "esam", backend, beta=0.5)
    here: list[list[Tensor]] = []
    train(model, optimizer, 1, lambda call: here.append([p.detach().clone() for p in model.parameters()]))
    moved = [(a != b) for a, b in zip(here[0], here[1], strict=True)]
    counts = dict(zip([n for n, _ in model.named_parameters()], (int(m.sum()) for m in moved), strict=True))
    inside = counts.pop("norm.weight"), counts.pop("norm.bias")
    assert set(counts.values()) == {0}
    assert 0 < sum(inside) < 16


@on_backends
@pytest.mark.parametrize("variant", ["sam", "looksam", "vasso"])
def test_flags_are_saved_with_the_groups_and_may_change_between_steps(backend: str, variant: str) -> None:
    model = Net()
    optimizer = build(model, variant, backend)
    train(model, optimizer, 3)
    flags = optimizer.state_dict()["param_groups"][0]["perturb_filter"]
    assert flags == [False, False, True, True, False, False]
    other = Net()
    other.load_state_dict(model.state_dict())
    resumed = looksam.VARIANTS[variant](other.parameters(), "sgd", lr=0.1, momentum=0.9, backend=backend)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, train(model, optimizer, 3), train(other, resumed, 3)))
    for opt in (optimizer, resumed):
        opt.param_groups[0]["perturb_filter"] = None if opt is optimizer else [True] * 6
    for a, b in zip(train(model, optimizer, 3), train(other, resumed, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all(optimizer.state[p].keys() >= {*optimizer._written} for p in model.parameters())


def test_it_is_for_what_perturbs() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="no argument 'perturb_filter'"):
        looksam.LAMB([p], lr=0.1, perturb_filter=is_norm)
    with pytest.raises(ValueError, match="perturb_filter has 2 flags for 1 parameters"):
        looksam.SAM([{"params": [p], "perturb_filter": [True, False]}], "sgd", lr=0.1)
    assert "perturb_filter" in inspect.getdoc(looksam.SharpnessAware)
