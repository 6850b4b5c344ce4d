"""Sentence 39: the ops on lists of tensors, registered with torch.library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import looksam_kernels.library  # noqa: F401
from looksam_kernels import use_backend
from looksam_kernels.updates import BASES, hyper_of
from tests import bases
from tests.contract.support import BACKENDS, assert_same

SHAPES = [(3, 4), (5,), (), (0,)]
C = torch.linspace(-1, 1, len(SHAPES), dtype=torch.float64)
TRUST = torch.tensor([0.5, 0.75, 1.0, 1.25])
UPDATES = 3
MOVERS = ("sums", "perturb_", "restore_")


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def group_of(base: str) -> dict[str, Any]:
    """The case in which all states are there."""
    return {**list(bases.BASES[base].kernels.values())[-1], "lr": 0.1, "weight_decay": 0.05}


def arguments(name: str, update: int = 0) -> tuple[Any, ...]:
    """update: which of several, with a gradient of its own."""
    if name in MOVERS:
        return {
            "sums": lambda: (tensors(0), tensors(1)),
            "perturb_": lambda: (tensors(0), tensors(1), tensors(2), C),
            "restore_": lambda: (tensors(0), tensors(1)),
        }[name]()
    base = BASES[name.removesuffix("_")]
    states = [[torch.zeros_like(x) for x in tensors(0)] for _ in base.states]
    ratios = [TRUST] if base.takes_trust_ratio else []
    count = [torch.tensor(0.0) for _ in SHAPES]
    hyper = [hyper_of(group_of(name.removesuffix("_")), x) for x in base.read]
    return (tensors(0), *states, count, tensors(2 + 10 * update), tensors(3), C, *ratios, *hyper)


def expected(base: str) -> list[np.ndarray]:
    """The weights after some updates with d = g + c q, in NumPy. LARS gets its ratio here."""
    made = bases.BASES[base].independent(len(SHAPES))
    results = []
    for i, (w, q) in enumerate(zip(tensors(0), tensors(3), strict=True)):
        h, x = bases.by_own_names(group_of(base)), w.numpy()
        for update in range(UPDATES):
            d = (tensors(2 + 10 * update)[i] + C[i] * q).numpy()
            if base == "lars":
                r = float(TRUST[i])
                x = made.sgd.update(i, x, r * d, {**h, "weight_decay": r * h["weight_decay"]})
            else:
                x = made.update(i, x, d, {"initial_accumulator_value": 0.0, **h})
        results.append(x)
    return results


OPS = (*MOVERS, *(f"{name}_" for name in bases.BASES))
on_ops = pytest.mark.parametrize("name", OPS)
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def test_every_base_has_an_op() -> None:
    assert {f"{name}_" for name, base in BASES.items() if base.update is not None} == {*OPS} - {*MOVERS}
    assert all(hasattr(torch.ops.looksam, name) for name in OPS)


@on_ops
@on_backends
def test_contract_39_opcheck(name: str, backend: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.looksam, name).default, arguments(name))


@on_ops
@on_backends
def test_contract_39_under_compile(name: str, backend: str) -> None:
    op = getattr(torch.ops.looksam, name)
    eager, compiled = arguments(name), arguments(name)
    with use_backend(backend):
        torch._dynamo.reset()
        results = op(*eager), torch.compile(lambda *a: op(*a), backend="aot_eager", fullgraph=True)(*compiled)
    assert_same([x for x in eager if isinstance(x, list)], [x for x in compiled if isinstance(x, list)])
    if name == "sums":
        assert_same(*results)


@on_backends
def test_contract_39_sums_perturb_and_restore(backend: str) -> None:
    (x, y), (w, backup, g, c) = arguments("sums"), arguments("perturb_")
    with use_backend(backend):
        found = torch.ops.looksam.sums(x, y)
        torch.ops.looksam.perturb_(w, backup, g, c)
    np.testing.assert_allclose(found, [np.sum(a.numpy() * b.numpy()) for a, b in zip(x, y, strict=True)], rtol=1e-12)
    for i, (before, moved, kept, along) in enumerate(zip(tensors(0), w, backup, g, strict=True)):
        assert torch.equal(kept, before)
        np.testing.assert_allclose(moved, before.numpy() + float(c[i]) * along.numpy(), rtol=1e-12)
    with use_backend(backend):
        torch.ops.looksam.restore_(w, backup)
    assert_same(w, tensors(0))


@on_backends
@pytest.mark.parametrize("base", bases.BASES)
def test_contract_39_base_updates(base: str, backend: str) -> None:
    kept = 2 + len(BASES[base].states)  # the weights, the states and the counts
    given = arguments(f"{base}_")[:kept]
    with use_backend(backend):
        for update in range(UPDATES):
            getattr(torch.ops.looksam, f"{base}_")(*given, *arguments(f"{base}_", update)[kept:])
    for mine, other in zip(given[0], expected(base), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)
    assert [float(x) for x in given[-1]] == [UPDATES] * len(SHAPES)
