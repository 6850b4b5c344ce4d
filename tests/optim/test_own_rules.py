"""Rules that are written in Python alone, on every backend, against the same method in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import looksam
import looksam_kernels as lk
from looksam.plans import PLAIN, Variant, sharp_plan
from looksam_kernels import formulas
from looksam_kernels.formulas import Direction
from tests.optim.cases import BACKENDS

on_backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, LR, RHO, MIX, KEEP = 4, 0.1, 0.3, 0.3, 0.6
START = ([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]], [0.2, -0.4], 1.5)


@pytest.fixture(autouse=True)
def _rules() -> Iterator[None]:
    """They are gone after each test."""
    before = dict(formulas.ASCENTS), dict(formulas.DESCENTS)
    define()
    yield
    for table, kept in zip((formulas.ASCENTS, formulas.DESCENTS), before, strict=True):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


def define() -> None:
    @looksam.rule("ascent", inputs="g", pairs="gg")
    def unified(sums: Any, hyper: Any) -> Tensor:
        norm, mix = sums.total("g", "g").sqrt(), hyper.row("mix")
        return torch.where(norm > 0, hyper.row("rho") * (1 - mix + mix / norm), 0.0)

    @looksam.rule("descent", inputs="s g m", pairs="ss gg mm", writes="m")
    def remembered(sums: Any, hyper: Any) -> Direction:
        """d = s + m / 2, m <- keep m + (1 - keep) (s - g)."""
        keep = hyper.row("keep")
        return Direction(d=(1.0, 0.0, 0.5), q=(1 - keep, keep - 1, keep))


class Own(looksam.SharpnessAware):
    def __init__(self, params: Any, base: Any, backend: str | None = None, **base_kwargs: Any) -> None:
        variant = Variant(sharp=sharp_plan("unified", "remembered"), between=PLAIN)
        hyper = {"rho": RHO, "mix": MIX, "keep": KEEP, "k": 1}
        super().__init__(params, base, variant, hyper, backend=backend, base_kwargs=base_kwargs)


def gradient(w: Any) -> Any:
    return w / (1 + w * w) + w / 4


def by_numpy(limit: float = np.inf) -> list[np.ndarray]:
    w = [np.array(x) for x in START]
    m = [0 * x for x in w]
    for _ in range(STEPS):
        g = [gradient(x) for x in w]
        norm = np.sqrt(sum((x * x).sum() for x in g))
        s = [gradient(x + RHO * (1 - MIX + MIX / norm) * y) for x, y in zip(w, g, strict=True)]
        d = [x + y / 2 for x, y in zip(s, m, strict=True)]
        m = [KEEP * x + (1 - KEEP) * (y - z) for x, y, z in zip(m, s, g, strict=True)]
        size = np.sqrt(sum((x * x).sum() for x in d))
        w = [x - LR * min(1, limit / size) * y for x, y in zip(w, d, strict=True)]
    return w


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in START]


def closure_of(params: list[torch.nn.Parameter], scale: float = 1.0) -> Callable[[], None]:
    def closure() -> None:
        for p in params:
            p.grad = scale * gradient(p.detach())

    return closure


def assert_equal(params: list[torch.nn.Parameter], expected: list[np.ndarray]) -> None:
    for p, x in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12, atol=1e-12)


@on_backends
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("in_two_calls", [False, True])
def test_a_rule_of_ones_own(backend: str, limit: float | None, in_two_calls: bool) -> None:
    params = parameters()
    optimizer = Own(params, "sgd", backend=backend, lr=LR, max_grad_norm=limit)
    closure = closure_of(params)
    for _ in range(STEPS):
        if in_two_calls:
            closure()
            assert optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
    assert optimizer.backend == backend
    assert_equal(params, by_numpy(np.inf if limit is None else limit))


@on_backends
def test_a_rule_of_ones_own_over_a_class_of_ones_own(backend: str) -> None:
    class Plain(torch.optim.SGD):
        pass

    params = parameters()
    optimizer = Own(params, Plain, backend=backend, lr=LR)
    for _ in range(STEPS):
        optimizer.step(closure_of(params))
    assert_equal(params, by_numpy())


@on_backends
def test_a_loss_scale_changes_nothing_and_an_overflow_leaves_everything(backend: str) -> None:
    params = parameters()
    optimizer: Any = Own(params, "sgd", backend=backend, lr=LR)
    for _ in range(STEPS):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0)
        optimizer.step(closure_of(params, 64.0))
    assert_equal(params, by_numpy())
    before = [p.detach().clone() for p in params]
    memory = [optimizer.state[p]["m"].clone() for p in params]
    optimizer.step(closure_of(params, float("inf")))
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert all(torch.equal(optimizer.state[p]["m"], x) for p, x in zip(params, memory, strict=True))


@on_backends
def test_defining_a_rule_again_replaces_it(backend: str) -> None:
    params = parameters()
    Own(params, "sgd", backend=backend, lr=LR).step(closure_of(params))

    @looksam.rule("descent", inputs="g s", pairs="gg ss")
    def remembered(sums: Any, hyper: Any) -> Direction:
        return Direction(d=(1.0, 0.0))

    params = parameters()
    Own(params, "sgd", backend=backend, lr=LR).step(closure_of(params))
    assert_equal(params, [np.array(x) - LR * gradient(np.array(x)) for x in START])


@on_backends
def test_an_ascent_may_become_a_descent(backend: str) -> None:
    @looksam.rule("ascent", inputs="s", pairs="ss")
    def remembered(sums: Any, hyper: Any) -> Tensor:
        return hyper.row("rho")

    define()
    params = parameters()
    optimizer = Own(params, "sgd", backend=backend, lr=LR)
    for _ in range(STEPS):
        optimizer.step(closure_of(params))
    assert_equal(params, by_numpy())


@on_backends
def test_a_rule_of_several_inputs_in_the_ops(backend: str) -> None:
    @looksam.rule("ascent", inputs="g m", pairs="gg mm")
    def both(sums: Any, hyper: Any) -> tuple[Tensor, float]:
        return hyper.row("rho"), -0.25

    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    columns = {"g": torch.tensor([3.0, 5.0]), "m": torch.tensor([4.0, 8.0]), "b": torch.zeros(2)}
    table = lk.TensorTable([w], backend=backend, **{name: [x.double()] for name, x in columns.items()})
    _, c = lk.measure(table, "both", [{"rho": 0.5}])
    lk.perturb(table, c)
    assert w.tolist() == [1.5, 2.5]


@on_backends
def test_what_is_written_is_not_added_after_the_update(backend: str) -> None:
    @looksam.rule("descent", inputs="s m", pairs="ss mm", writes="m")
    def late(sums: Any, hyper: Any) -> Direction:
        return Direction(d=(1.0, 0.0), q=(1.0, 0.0), post=(0.0, 1.0))

    w = torch.ones(2)
    table = lk.TensorTable([w], backend=backend, s=[torch.ones(2)], m=[torch.ones(2)])
    with pytest.raises(ValueError, match="m is written before that"):
        lk.measure(table, "late", [{}])


def test_what_is_refused() -> None:
    def refuses(*arguments: Any, message: str, name: str = "mine", **options: Any) -> None:
        def formula(sums: Any, hyper: Any) -> Any:
            return None

        formula.__name__ = name
        with pytest.raises(ValueError, match=message):
            looksam.rule(*arguments, **options)(formula)

    refuses("up", message='kind must be "ascent" or "descent", not \'up\'')
    refuses("ascent", message="there is a rule 'sam' already", name="sam")
    refuses("descent", message="there is a rule 'looksam_reuse' already", name="looksam_reuse")
    refuses("descent", inputs="s g", pairs="gg", message="s is in none of the pairs 'gg'; add ss")
    refuses("descent", inputs="s g r m", pairs="ss gg rr mm", message="one to three columns")
    refuses("descent", inputs="", message="one to three columns")
    refuses("descent", writes="w", message="writes must be q, m or y")
    refuses("ascent", writes="m", message="writes must be q, m or y")
