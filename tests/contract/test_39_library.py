"""Sentence 39: the ops on lists of tensors, registered with torch.library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import looksam_kernels.library  # noqa: F401
from looksam_kernels import use_backend
from tests.contract.support import BACKENDS, assert_same

SHAPES = [(3, 4), (5,), (), (0,)]
ADAPTIVE = ("adam_", "adamw_", "lamb_")


def tensors(seed: int, scalar: bool = False, positive: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(() if scalar else shape, generator=generator) for shape in SHAPES]
    return [x.abs() for x in made] if positive else made


def arguments(name: str) -> tuple[Any, ...]:
    c = torch.linspace(-1, 1, len(SHAPES), dtype=torch.float64)
    count = [torch.tensor(3.0) for _ in SHAPES]
    return {
        "sums": lambda: (tensors(0), tensors(1)),
        "perturb_": lambda: (tensors(0), tensors(1), tensors(2), c),
        "restore_": lambda: (tensors(0), tensors(1)),
        "sgd_": lambda: (tensors(0), tensors(1), count, tensors(2), tensors(3), c, 0.1, 0.9, 0.0, 0.01, True),
        **{
            base: lambda: (
                *(tensors(0), tensors(1), tensors(5, positive=True), count, tensors(2), tensors(3), c),
                *(0.1, 0.9, 0.999, 1e-8, 0.01),
            )
            for base in ADAPTIVE
        },
    }[name]()


OPS = ("sums", "perturb_", "restore_", "sgd_", *ADAPTIVE)
on_ops = pytest.mark.parametrize("name", OPS)
on_backends = pytest.mark.parametrize("backend", BACKENDS)


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
        torch.testing.assert_close(results[0][0], (eager[0][0].double() * eager[1][0]).sum())
    else:
        assert not torch.equal(eager[0][0], arguments(name)[0][0])
