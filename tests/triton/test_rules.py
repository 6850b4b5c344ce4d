"""Rules as functions for the kernel ``evaluate``: what runs there, what is left to the reference, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels import formulas
from looksam_kernels.backends.triton import evaluation, rules
from looksam_kernels.backends.triton.tuning import RULE_BLOCK
from looksam_kernels.formulas import ASCENTS, DESCENTS, Coefficients, Direction, Sums
from tests.kernels.cases import RULE_GROUPS

from .test_triton import DEVICE

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning"),
    pytest.mark.skipif(
        not lk.backend_info(DEVICE)["triton"].available, reason=lk.backend_info(DEVICE)["triton"].reason
    ),
]
GROUPS = [{"norm_scope": "global", **group} for group in RULE_GROUPS]
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "clipped, with a loss scale": {"max_grad_norm": 0.1, "grad_scale": torch.tensor(8.0, device=DEVICE)},
    "for LARS": {"trust_ratio": True},
}


def table_of(rows: int, name: str) -> lk.TensorTable:
    return lk.TensorTable([torch.ones(1, device=DEVICE)] * rows, [i % 3 for i in range(rows)], backend=name)


def evaluated(name: str, rule: str, rows: int, pairs: Any, groups: Any = GROUPS, **extra: Any) -> Coefficients:
    return evaluated_in(table_of(rows, name), rule, pairs, groups, **extra)


def evaluated_in(table: lk.TensorTable, rule: str, pairs: Any, groups: Any, **extra: Any) -> Coefficients:
    rows = len(table)
    random = torch.Generator().manual_seed(len(pairs))
    values = torch.rand(len(pairs), rows, dtype=torch.float64, generator=random) + 0.1
    values[:, 1] = 0
    return lk.coefficients(table, rule, Sums(pairs, values.to(DEVICE)), groups, **extra)


def numbers(found: Coefficients) -> list[Tensor]:
    return [x for x in (found.d, found.q, found.post, found.kept, found.trust, found.found_inf) if x is not None]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("rule", [*ASCENTS, *DESCENTS])
def test_every_rule_has_the_references_numbers(rule: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, up to the order in which totals are added: some ulps."""
    pairs = lk.ops.pairs_of(rule, clip=True, trust_ratio=True)
    expected = evaluated("reference", rule, 7, pairs, **EXTRAS[extra])
    monkeypatch.setattr(evaluation.reference, "evaluate", None)  # nothing is left to it
    found = evaluated("triton", rule, 7, pairs, **EXTRAS[extra])
    for a, b in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm_scope", ["global", "tensor"])
def test_more_rows_than_the_kernel_takes_at_a_time(norm_scope: str) -> None:
    pairs, groups = (("g", "g"), ("q", "q"), ("g", "q")), [{**group, "norm_scope": norm_scope} for group in GROUPS]
    rows = 2 * RULE_BLOCK + 1
    a, b = (evaluated(x, "looksam_reuse", rows, pairs, groups, max_grad_norm=0.1) for x in ("triton", "reference"))
    torch.testing.assert_close(a.d, b.d, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_sum_that_is_not_finite_in_the_last_row(bad: float) -> None:
    rows = RULE_BLOCK + 1
    table = lk.TensorTable([torch.ones(1, device=DEVICE)] * rows, backend="triton")
    values = torch.ones(1, rows, dtype=torch.float64, device=DEVICE)
    values[0, -1] = bad
    found = lk.coefficients(table, "sam", Sums((("g", "g"),), values), GROUPS)
    assert found.found_inf == 1
    assert not found.d.any()


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Without files, as in a notebook, and gone after the test."""
    before = dict(formulas.ASCENTS), dict(formulas.DESCENTS)
    exec(OWN, {"torch": torch, "rule": formulas.rule, "Direction": Direction})
    yield
    for table, kept in zip((formulas.ASCENTS, formulas.DESCENTS), before, strict=True):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


OWN = """
@rule("descent", inputs="s g", pairs="gg gs ss")
def plain(sums, hyper):
    cosine = sums.of("g", "s") / torch.maximum(sums.of("g", "g") * sums.total("s", "s"), 1e-30 + sums.of("s", "s")).sqrt()
    away = torch.where((cosine < 0) | ~(hyper.row("rho") > 0.05), -cosine.abs(), cosine.clamp(min=0.1, max=0.5) ** 2)
    return Direction(d=(1 - away, away.square() + hyper.common("alpha", 1.0)))

@rule("descent", inputs="s g", pairs="gg gs ss")
def with_more(sums, hyper):
    return Direction(d=(torch.tanh(sums.of("g", "s")), 1.0))

@rule("descent", inputs="s g", pairs="gg gs ss")
def that_asks(sums, hyper):
    return Direction(d=(1.0 if hyper.common("alpha") > 0.5 else 0.0, 1.0))
"""


@pytest.mark.parametrize(("name", "has_program"), [("plain", True), ("with_more", False), ("that_asks", False)])
def test_rules_of_ones_own(name: str, has_program: bool, own_rules: None) -> None:
    """What no program can do is left to the reference: the numbers are the same."""
    pairs = DESCENTS[name].pairs
    assert (rules.program(name, pairs, GROUPS, formulas.Scaling()) is not None) == has_program
    a, b = (evaluated(x, name, 7, pairs) for x in ("triton", "reference"))
    torch.testing.assert_close(a.d, b.d, rtol=1e-13, atol=0, equal_nan=True)


def test_hyper_parameters_are_read_anew_in_every_step() -> None:
    """Numbers, tensors, and those that are neither, in the same table."""
    pairs = (("g", "g"), ("q", "q"))
    lr = torch.tensor(0.3, device=DEVICE)
    tables = [table_of(7, name) for name in ("triton", "reference")]
    for changes in (
        {},
        {"alpha": 0.3},
        {"norm_scope": "tensor"},
        {"alpha": lr},
        {"alpha": lr.mul_(2)},
        {"maximize": True},
    ):
        groups = [{**group, **changes} for group in GROUPS]
        a, b = (evaluated_in(table, "looksam_reuse", pairs, groups) for table in tables)
        torch.testing.assert_close(a.d, b.d, rtol=1e-13, atol=0)
