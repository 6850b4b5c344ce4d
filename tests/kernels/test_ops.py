"""Every op x case x rule or base x backend against the reference in float64, and the promises of ops.py one by one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels import Mask, ops
from looksam_kernels.formulas import ASCENTS, DESCENTS, Coefficients, Sums
from looksam_kernels.ops import pairs_of
from looksam_kernels.updates import BASES
from tests.kernels import cases
from tests.kernels.cases import (
    BASE_CASES,
    CASES,
    COMBINATIONS,
    F32,
    F64,
    RULE_GROUPS,
    TARGETS,
    Columns,
    Combination,
    Row,
    Target,
)
from tests.nightly import NIGHTLY

pytestmark = [pytest.mark.whole, pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")]

UP = Combination(("g",), (0.05,))

on_every_target = pytest.mark.parametrize("target", TARGETS)
on_every_case = pytest.mark.parametrize("case", CASES)

STRETCHED = (("Tg", "Tg"), ("Tg", "Tm"), ("Tm", "Tm"), ("Tg", "m"))
PAIRS = (("g", "g"), ("g", "s"), ("s", "s"), ("g", "q"), ("w", "w"), ("q", "q"))


# The matrix ---------------------------------------------------------------------------------------------------------


@on_every_target
@on_every_case
@pytest.mark.parametrize(
    ("pairs", "t"),
    [
        (PAIRS, None),
        (PAIRS[:1], None),
        (STRETCHED[:1], "asam"),
        (STRETCHED, "asam"),
        (STRETCHED[:1], "adagrad"),
        (STRETCHED, "adam"),
    ],
    ids=["all pairs", "gg", "Tg", "Tg and Tm", "preconditioned g", "preconditioned g and m"],
)
def test_sums(target: Target, case: str, pairs: tuple[tuple[str, str], ...], t: str | None) -> None:
    rows = CASES[case]
    cols = cases.columns(rows, target.device)
    cols["m"] = cols["q"]

    def sums(backend: str, cols: Columns) -> Sums:
        made = cases.table(rows, cols, backend, device=target.device)
        return lk.sums(made, pairs, cases.factor(t, rows, made))

    found, again = (sums(target.backend, x) for x in (cols, cases.copy(cols)))
    wide = {name: [None if x is None else x.to(F64) for x in column] for name, column in cols.items()}
    truth = sums("reference", wide)

    assert found.pairs == pairs
    assert found.values.shape == (len(pairs), len(rows))
    assert found.values.dtype == F64
    assert torch.equal(found.values, again.values), "same inputs, other bits"
    for i, (x, y) in enumerate(pairs):
        for row in range(len(rows)):
            value, expected = found.values[i, row].item(), truth.values[i, row].item()
            a, b = (cols[name.removeprefix("T")][row] for name in (x, y))
            if a is None or b is None or (x, y) == ("q", "q"):
                assert value == expected
                continue
            if "T" in x + y and cols["g"][row] is not None:
                factor = _factor(t, rows, cols, row)
                a, b = (factor * v if name.startswith("T") else v for name, v in ((x, a), (y, b)))
                assert abs(expected - (a.double() * b.double()).sum().item()) <= cases.sum_tolerance(a, b, F64)
            tolerance = cases.sum_tolerance(a, b, cases.arithmetic(rows[row].dtype))
            assert abs(value - expected) <= tolerance, f"<{x}, {y}> of row {row}: {value}, not {expected}"


def _factor(t: str | None, rows: Sequence[Row], cols: Columns, row: int) -> Tensor:
    """T of a row in float64, by hand."""
    w, g = (cols[name][row].double() for name in ("w", "g"))
    if t == "asam":
        eta = cases.eta(rows)[row]
        return torch.ones_like(w) if eta is None else w.abs() + eta
    group = BASE_CASES[t][1][rows[row].group]
    if t == "adagrad":
        return 1 / ((cols["sum"][row].double() + (g / 4) ** 2).sqrt() + group["eps"])
    b2, count = group["betas"][1], cols["step"][row].item() + 1
    v = (b2 * cols["exp_avg_sq"][row].double() + (1 - b2) * (g / 4) ** 2) / (1 - b2**count)
    return 1 / (v.sqrt() + group["eps"])


@on_every_target
@on_every_case
@pytest.mark.parametrize(
    "inputs",
    ["c g", "T^2 c g", "c g + c q", "c g from b", "b c g", "b T^2 c g", "T c g", "b T c g + c q from b"],
)
def test_perturb(target: Target, case: str, inputs: str) -> None:
    rows = CASES[case]
    t = "asam" if "T^2" in inputs else "adamw" if "T" in inputs else None
    mask = lk.Mask(keep=0.6, seed=3, draw=5) if inputs.startswith("b ") else None
    start = cases.columns(rows, target.device)
    several = Combination(("g", "q"), (0.05, -0.02)) if "c g + c q" in inputs else UP
    c = several.coefficients(rows, target.device)
    moved = [x is not None for x in start["g"]]
    again = "from b" in inputs

    def run(backend: str, cols: Columns) -> Columns:
        made = cases.table(rows, cols, backend, moved if again else None, target.device)
        storage = [w.data_ptr() for w in cols["w"]]
        lk.perturb(made, c, cases.factor(t, rows, made), mask)
        assert made.perturbed == moved
        assert [w.data_ptr() for w in cols["w"]] == storage
        return cols

    found = run(target.backend, cases.copy(start))
    assert cases.same_bits(found, run(target.backend, cases.copy(start))), "same inputs, other bits"
    baseline = run("reference", cases.copy(start))
    truth = run("reference", cases.widened(start))

    untouched = [name for name in start if name not in ("w", "b")]
    assert cases.same_bits({n: found[n] for n in untouched}, {n: start[n] for n in untouched})
    for row, takes_part in enumerate(moved):
        if not takes_part:
            assert cases.same_bits({"w": [found["w"][row]]}, {"w": [start["w"][row]]})
            continue
        saved = start["b" if rows[row].master or again else "w"][row]
        assert cases.same_bits({"b": [found["b"][row]]}, {"b": [saved]}), "the backup is not exact"
        cases.assert_close(f"w of row {row}", found["w"][row], baseline["w"][row], truth["w"][row])


@on_every_target
@pytest.mark.parametrize("case", ["shapes", "large", "unaligned", "channels last", "not dense", "dtypes", "groups"])
def test_a_mask_moves_the_elements_that_its_hash_keeps_and_no_bit_of_the_others(target: Target, case: str) -> None:
    rows = CASES[case]
    cols = cases.columns(rows, target.device)
    for w, g in zip(cols["w"], cols["g"], strict=True):
        g.fill_(8.0)  # moves a float16 too
        if w.numel():
            w[(0,) * w.ndim] = -0.0  # whose sign + 0.0 would take off
    before = cases.copy(cols)
    c = UP.coefficients(rows, target.device)
    lk.perturb(cases.table(rows, cols, target.backend), c, None, lk.Mask(keep=0.37, seed=2**40 + 17, draw=2**31 + 1))
    for row, (w, old) in enumerate(zip(cols["w"], before["w"], strict=True)):
        kept = cases.kept_elements(0.37, 2**40 + 17, 2**31 + 1, row, w)
        assert torch.equal(w != old, kept), f"row {row}"
        assert cases.same_bits({"w": [w[~kept]]}, {"w": [old[~kept]]}), f"row {row}"


def _steps() -> list[Any]:
    """Every base x case x combination; of a slow target a sixth, in which every two of them still meet, and of the reference,
    which is compared with itself in float64. In the interpreter without the large rows, which are the same to a step as
    those of three chunks."""

    def often(target: Target, case: str, place: int) -> bool:
        if NIGHTLY or not (target.is_slow or target.backend == "reference"):
            return True
        return place % len(COMBINATIONS) == 0 and (case != "large" or target != Target("triton", "cpu"))

    return [
        pytest.param(
            *target.values, case, base, combination, id=f"{target.id}-{base}-{combination}-{case}", marks=target.marks
        )
        for target in TARGETS
        for i, base in enumerate(BASE_CASES)
        for j, combination in enumerate(COMBINATIONS)
        for k, case in enumerate(CASES)
        if often(target.values[0], case, i + j + k) and cases.fits(combination, BASE_CASES[base][0])
    ]


@pytest.mark.parametrize(("target", "case", "base", "combination"), _steps())
def test_step(target: Target, case: str, base: str, combination: str) -> None:
    rows = CASES[case]
    name, groups = BASE_CASES[base]
    c = cases.for_base(COMBINATIONS[combination].coefficients(rows, target.device), name)
    start = cases.columns(rows, target.device)
    away = [not COMBINATIONS[combination].at_w and i % 3 != 2 for i in range(len(rows))]

    def run(backend: str, cols: Columns) -> Columns:
        for w, b, moved in zip(cols["w"], cols["b"], away, strict=True):
            if moved:
                b.copy_(w if b.dtype == w.dtype else b)
                w.add_(0.25)
        made = cases.table(rows, cols, backend, away, target.device)
        lk.step(made, name, c, groups)
        assert not any(made.perturbed)
        return cols

    found = run(target.backend, cases.copy(start))
    assert cases.same_bits(found, run(target.backend, cases.copy(start))), "same inputs, other bits"
    baseline = run("reference", cases.copy(start))
    truth = run("reference", cases.widened(start))

    written = {"w", *BASES[name].states, *(["q", "q_norm_sq"] if c.q is not None else [])}
    written |= {c.inputs[0]} if name == "grad" else {"step"}
    for column in start:
        for row in range(len(rows)):
            x = found[column][row]
            if x is None:
                assert start[column][row] is None
            elif column not in written and column != "b":
                assert cases.same_bits({column: [x]}, {column: [start[column][row]]}), f"{column} of row {row}"
            elif column == "step":
                assert x.item() == truth[column][row].item()
            elif column == "q_norm_sq":
                q, precision = truth["q"][row], cases.arithmetic(rows[row].dtype)
                error = abs(x.item() - truth[column][row].item())
                of_q = 2 * cases.FEW_ULPS * torch.finfo(precision).eps * q.abs().clamp(min=1).mul(q.abs()).sum().item()
                assert error <= cases.sum_tolerance(q, q, precision) + of_q, f"row {row}"
            elif column == "b":
                if rows[row].master:
                    cases.assert_close(f"master of row {row}", x, baseline["b"][row], truth["w"][row])
            else:
                cases.assert_close(f"{column} of row {row}", x, baseline[column][row], truth[column][row])


RULE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grad_scale": {"grad_scale": 1024.0},
    "clipped": {"max_grad_norm": 0.5},
    "clipped, grad_scale": {"max_grad_norm": 0.5, "grad_scale": 8.0},
    "loosely clipped": {"max_grad_norm": 1e9},
    "found_inf": {"found_inf": 1.0},
    "not found_inf": {"found_inf": 0.0},
    "per tensor": {"norm_scope": "tensor"},
    "per tensor, clipped": {"norm_scope": "tensor", "max_grad_norm": 0.5},
    "lars": {"trust_ratio": True},
    "lars, clipped, grad_scale": {"trust_ratio": True, "max_grad_norm": 0.5, "grad_scale": 8.0},
}


RESTING = [name for name, rule in DESCENTS.items() if rule.along is not None]
FOR_RESTING = ("plain", "clipped", "clipped, grad_scale", "found_inf")
"""They read no norm_scope, and no LARS follows them."""


def _rules(target: Target) -> Iterator[tuple[str, str, str]]:
    """Kind, name and options. Triton compiles its rules from the reference's text, and its interpreter takes a third of a
    second for each case: of each rule it gets three options, and each option of some rules."""
    for kind, table in (("ascent", ASCENTS), ("descent", DESCENTS)):
        for number, name in enumerate(table):
            every = FOR_RESTING if name in RESTING else tuple(RULE_OPTIONS)
            some = (
                every
                if NIGHTLY or target.backend != "triton"
                else {every[(number + i) % len(every)] for i in (0, 3, 7)}
            )
            yield from ((kind, name, options) for options in every if options in some)


RULES = [
    pytest.param(target, kind, name, options, id=f"{kind} {name}-{options}-{place.id}", marks=place.marks)
    for place in TARGETS
    for target in place.values
    for kind, name, options in _rules(target)
]


@pytest.mark.parametrize(("target", "kind", "name", "options"), RULES)
def test_coefficients(target: Target, kind: str, name: str, options: str) -> None:
    chosen = dict(RULE_OPTIONS[options])
    scope = chosen.pop("norm_scope", "global")
    if kind == "ascent":
        chosen.pop("max_grad_norm", None)
    for scalar in ("grad_scale", "found_inf"):
        if scalar in chosen:
            chosen[scalar] = torch.tensor(chosen[scalar], device=target.device)
    groups = [{**group, "norm_scope": scope} for group in RULE_GROUPS]
    pairs = pairs_of(name, clip="max_grad_norm" in chosen, trust_ratio=chosen.get("trust_ratio", False))

    for values in ("numbers", "zeros", "a row of zeros", "one zero", "not finite", "no rows"):
        rows = [Row((3,), group=i % 3) for i in range(0 if values == "no rows" else 7)]
        sums = Sums(pairs, _inner_products(pairs, len(rows)).to(target.device))
        if values == "zeros":
            sums.values.zero_()
        if values == "a row of zeros":
            sums.values[:, 1] = 0
        if values == "one zero":
            sums.values[0, 2] = sums.values[-1, 4] = 0
        if values == "not finite":
            sums.values[-1, -1] = math.inf
        cols = cases.columns(rows, target.device)
        found, truth = (
            lk.coefficients(cases.table(rows, cols, backend, device=target.device), name, sums, groups, **chosen)
            for backend in (target.backend, "reference")
        )
        assert (found.inputs, found.writes) == (truth.inputs, truth.writes)
        assert found.found_inf.dtype == F32
        assert found.found_inf.shape == ()
        assert found.found_inf.item() == truth.found_inf.item()
        if values == "not finite" and kind == "descent":
            continue  # nothing reads them
        assert (found.trust is not None) == (kind == "descent" and "trust_ratio" in chosen)
        for field in ("d", "q", "post", "trust", "kept"):
            mine, theirs = getattr(found, field), getattr(truth, field)
            assert (mine is None) == (theirs is None), field
            if theirs is not None:
                assert mine.dtype == F64
                assert mine.shape == theirs.shape
                allowed = ROUNDINGS * torch.finfo(F64).eps * theirs.abs()
                assert ((mine - theirs).abs() <= allowed).all(), (field, values, mine, theirs)


ROUNDINGS = 40
"""A clipped direction of three inputs: nine terms of three roundings, a sum over seven rows, a root, a quotient."""


def _inner_products(pairs: Sequence[tuple[str, str]], rows: int) -> Tensor:
    """Of vectors whose angles are 60 degrees, so that no total cancels."""
    names = dict.fromkeys(x for pair in pairs for x in pair)
    length = {x: 0.5 + torch.rand(rows, dtype=F64, generator=torch.Generator().manual_seed(ord(x[0]))) for x in names}
    return torch.stack([length[x] * length[y] * (1.0 if x == y else 0.5) for x, y in pairs])


# Promises -----------------------------------------------------------------------------------------------------------


def _whole_step(target: Target, rows: list[Row], cols: Columns, base: str = "adamw", **options: Any) -> Columns:
    """LookSAM's refresh through all ops, with the gradients at w + e taken as given."""
    name, groups = BASE_CASES[base]
    made = cases.table(rows, cols, target.backend)
    options["trust_ratio"] = name == "lars"
    found, up = lk.measure(
        made, "sam", RULE_GROUPS, grad_scale=options.get("grad_scale"), trust_ratio=options["trust_ratio"]
    )
    lk.perturb(made, up)
    _, down = lk.measure(made, "looksam_refresh", RULE_GROUPS, known=found, found_inf=up.found_inf, **options)
    lk.step(made, name, down, groups)
    return cols


ROWS = [Row((5,), group=0), Row((), group=1), Row((300,), group=2), Row((4, 3), torch.bfloat16, master=True)]


@on_every_target
@pytest.mark.parametrize("base", BASE_CASES)
@pytest.mark.parametrize("perturbed", [False, True], ids=["at w", "at w+e"])
def test_found_inf_leaves_everything_as_before_the_perturbation(target: Target, base: str, perturbed: bool) -> None:
    name, groups = BASE_CASES[base]
    cols = cases.columns(ROWS, target.device)
    before = cases.copy(cols)
    made = cases.table(ROWS, cols, target.backend)
    if perturbed:
        lk.perturb(made, UP.coefficients(ROWS, target.device))
    c = COMBINATIONS["s, q = s - c g"].coefficients(ROWS, target.device, found_inf=1.0)
    lk.step(made, name, cases.for_base(c, name), groups)
    saved = cols.pop("b"), before.pop("b")
    assert cases.same_bits(cols, before)
    masters = [[b for b, row in zip(column, ROWS, strict=True) if row.master] for column in saved]
    assert cases.same_bits({"b": masters[0]}, {"b": masters[1]})


@on_every_target
@pytest.mark.parametrize("case", ["shapes", "unaligned", "channels last", "dtypes", "master copies", "not dense"])
def test_restore_is_exact_and_in_place(target: Target, case: str) -> None:
    rows = CASES[case]
    cols = cases.columns(rows, target.device)
    before = cases.copy({"w": cols["w"]})
    storage = [w.data_ptr() for w in cols["w"]]
    made = cases.table(rows, cols, target.backend)
    lk.perturb(made, UP.coefficients(rows, target.device))
    assert not cases.same_bits({"w": cols["w"]}, before)
    lk.restore(made)
    assert cases.same_bits({"w": cols["w"]}, before)
    assert [w.data_ptr() for w in cols["w"]] == storage
    assert not any(made.perturbed)


@on_every_target
def test_the_t_of_a_preconditioner_is_made_of_g(target: Target) -> None:
    """Sums without T may be taken with one; of Tm without Tg only the reference, which reads the table, knows T."""
    rows = CASES["groups"]
    cols = cases.columns(rows, target.device)
    made = cases.table(rows, {**cols, "m": cols["q"]}, target.backend)
    t = cases.factor("adamw", rows, made)
    assert torch.equal(lk.sums(made, PAIRS, t).values, lk.sums(made, PAIRS).values)
    mixed = (("g", "g"), ("Tg", "Tg"), ("g", "Tg"), ("w", "w"), ("Tg", "Tm"))
    alone = torch.cat([lk.sums(made, (("Tg", "Tg"), pair), t).values[1:] for pair in mixed])
    made["g"] = [None if g is None else g.clone() for g in cols["g"]]
    assert torch.equal(lk.sums(made, mixed, t).values, alone)
    if target.backend != "reference" and "LOOKSAM_HARNESS" not in os.environ:
        with pytest.raises(ValueError, match="T is made of g: take the sums of Tg together"):
            lk.sums(made, (("Tm", "Tm"),), t)


@on_every_target
def test_an_element_without_second_moment_and_gradient_is_not_moved(target: Target) -> None:
    """eps = 0 makes T infinite there; T g is 0, and not NaN."""
    cols = cases.columns([Row((300,))], target.device)
    for name in ("g", "exp_avg_sq"):
        cols[name][0][::2] = 0
    before = cols["w"][0].clone()
    made = cases.table([Row((300,))], cols, target.backend)
    t = ops.preconditioner(made, "adam", [{"betas": (0.9, 0.99), "eps": 0.0}])
    _, inf = ops.measure_and_perturb(made, "asam", [{"rho": 0.1, "perturb_eps": 0.0}], adaptive=t)
    assert inf.item() == 0
    assert torch.equal(cols["w"][0][::2], before[::2])
    assert (cols["w"][0] - before).norm().item() == pytest.approx(0.1, rel=1e-5)


def test_who_cannot_be_preconditioned() -> None:
    rows = [Row((3,)), Row((3,), absent=("exp_avg_sq",))]
    made = cases.table(rows, cases.columns(rows), "reference")
    for base in ("sgd", "lion", "grad", "adma"):
        with pytest.raises(ValueError, match=f"base '{base}' has no second moment; those that have one: adam, adamw, "):
            ops.preconditioner(made, base, [{}])
    with pytest.raises(ValueError, match="row 1 takes part, but column 'exp_avg_sq' has no tensor for it"):
        ops.preconditioner(made, "adam", [{"betas": (0.9, 0.99), "eps": 1e-8}])


@on_every_target
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_c_0_leaves_the_bits_of_w_whatever_g_holds(target: Target, value: float) -> None:
    rows = [Row((33,)), Row((5,), torch.float16), Row((5,), torch.bfloat16, master=True)]
    cols = cases.columns(rows, target.device)
    for w, g in zip(cols["w"], cols["g"], strict=True):
        g.fill_(value)
        w[0] = -0.0
    cols["b"][2].copy_(cols["w"][2])
    before = cases.copy({"w": cols["w"]})
    zero = Coefficients(("g",), torch.zeros(1, 3, dtype=F64, device=target.device), None, _number(0.0, target))
    lk.perturb(cases.table(rows, cols, target.backend), zero, cases.eta(rows))
    assert cases.same_bits({"w": cols["w"]}, before)


@on_every_target
def test_a_non_finite_input_with_coefficient_0_does_not_enter_the_direction(target: Target) -> None:
    rows = [Row((33,))]
    cols = cases.columns(rows, target.device)
    cols["q"][0].fill_(math.inf)
    d = torch.tensor([[1.0], [0.0]], dtype=F64, device=target.device)
    name, groups = BASE_CASES["adamw"]
    lk.step(
        cases.table(rows, cols, target.backend),
        name,
        Coefficients(("g", "q"), d, None, _number(0.0, target)),
        groups,
    )
    assert all(cols[n][0].isfinite().all() for n in ("w", "exp_avg", "exp_avg_sq"))


@on_every_target
def test_perturbed_rows_without_the_first_input_are_restored_only(target: Target) -> None:
    rows = [Row((9,), absent=("s",)), Row((9,)), Row((9,), torch.bfloat16, master=True, absent=("s",))]
    cols = cases.columns(rows, target.device)
    before = cases.copy(cols)
    made = cases.table(rows, cols, target.backend)
    lk.perturb(made, UP.coefficients(rows, target.device))
    name, groups = BASE_CASES["adam"]
    lk.step(made, name, COMBINATIONS["s"].coefficients(rows, target.device), groups)
    for row in (0, 2):
        for column in ("w", "exp_avg", "step"):
            assert cases.same_bits({"x": [cols[column][row]]}, {"x": [before[column][row]]})
    assert not torch.equal(cols["w"][1], before["w"][1])


@on_every_target
@pytest.mark.parametrize("base", [name for name in BASE_CASES if name != "grad"])
def test_lr_may_be_a_tensor(target: Target, base: str) -> None:
    name, groups = BASE_CASES[base]
    tensors = [{**h, "lr": torch.tensor(h["lr"], dtype=F64, device=target.device)} for h in groups]
    results = []
    for chosen in (groups, tensors):
        cols = cases.columns(CASES["groups"], target.device)
        lk.step(
            cases.table(CASES["groups"], cols, target.backend),
            name,
            cases.for_base(COMBINATIONS["g + c q"].coefficients(CASES["groups"], target.device), name),
            chosen,
        )
        results.append(cols["w"])
    for x, y in zip(*results, strict=True):
        assert (x - y).abs().max() <= 2 * torch.finfo(F32).eps * y.abs().max()


@on_every_target
def test_hyper_parameters_are_read_each_step(target: Target) -> None:
    """One table, several learning rates: what a backend keeps of a table holds no hyper-parameter."""
    rows = CASES["groups"]
    once, each = (cases.columns(rows, target.device) for _ in range(2))
    kept = cases.table(rows, once, target.backend)
    name, groups = BASE_CASES["adam"]
    for lr in (0.1, 0.01, 0.02):
        chosen = [{**h, "lr": lr, "betas": (0.9, 1 - lr)} for h in groups]
        lk.step(kept, name, COMBINATIONS["s"].coefficients(rows, target.device), chosen)
        lk.step(
            cases.table(rows, each, target.backend), name, COMBINATIONS["s"].coefficients(rows, target.device), chosen
        )
    assert cases.same_bits(once, each)


@on_every_target
def test_a_table_follows_its_columns(target: Target) -> None:
    """Other tensors, another layout, another dtype, no tensor: set between two calls, seen by the second."""
    rows = [Row((40,)), Row((3, 4)), Row((3, 4, 2, 2), memory="channels_last")]
    cols = cases.columns(rows, target.device)
    made = cases.table(rows, cols, target.backend)
    replacements: list[list[Tensor | None]] = [
        cases.columns(rows, target.device, seed=1)["g"],
        [x.double() for x in cols["g"]],
        [x.half() for x in cols["g"]],
        [None, *cols["g"][1:]],
        [torch.cat([x.reshape(-1), x.reshape(-1)[:1]])[1:].view(x.shape) for x in cols["g"]],
        [cols["g"][0], cols["g"][1].t().contiguous().t(), cols["g"][2].contiguous()],
        cols["g"],
    ]
    for g in replacements:
        made["g"] = g
        found = lk.sums(made, PAIRS[:1]).values
        fresh = lk.sums(cases.table(rows, {**cols, "g": g}, target.backend), PAIRS[:1]).values
        assert torch.equal(found, fresh)


@on_every_target
def test_a_table_follows_parameters_whose_data_was_replaced(target: Target) -> None:
    rows = [Row((40,)), Row((3, 4))]
    cols = cases.columns(rows, target.device)
    cols["w"] = [torch.nn.Parameter(w) for w in cols["w"]]
    made = cases.table(rows, cols, target.backend)
    lk.sums(made, (("w", "w"),))
    kept = [w.data for w in cols["w"]]
    for w in cols["w"]:
        w.data = w.data * 2
    assert torch.allclose(
        lk.sums(made, (("w", "w"),)).values[0], 4 * torch.stack([x.double().square().sum() for x in kept])
    )


@on_every_target
def test_measure_is_sums_then_coefficients(target: Target) -> None:
    rows = CASES["groups"]
    cols = cases.columns(rows, target.device)
    made = cases.table(rows, cols, target.backend)
    known = lk.sums(made, (("g", "g"),))
    both, fused = lk.measure(made, "looksam_refresh", RULE_GROUPS, known=known, max_grad_norm=1.0)
    pairs = pairs_of("looksam_refresh", clip=True)
    apart = lk.coefficients(made, "looksam_refresh", lk.sums(made, pairs), RULE_GROUPS, max_grad_norm=1.0)
    assert set(both.pairs) == set(pairs)
    assert torch.allclose(fused.d, apart.d, rtol=1e-14)
    assert torch.allclose(fused.q, apart.q, rtol=1e-14)


JOINED: list[tuple[str | None, str, str]] = [
    ("sam", "looksam_refresh", "adamw"),
    ("asam", "wsam", "sgd"),
    ("vasso", "vasso_direction", "adam"),
    ("friendly_adaptive", "friendly_direction", "adan"),
    ("sam", "gsam", "lamb"),
    ("sam", "at_perturbed", "lars"),
    (None, "looksam_reuse", "adamw"),
    (None, "at_w", "lion"),
]


@pytest.mark.parametrize("target", [x for x in TARGETS if not x.values[0].is_slow])  # Triton has no such calls
@pytest.mark.parametrize("found", [None, 1.0], ids=["finite", "found_inf"])
@pytest.mark.parametrize("case", ["shapes", "unaligned", "not dense", "dtypes", "master copies", "groups", "absent"])
@pytest.mark.parametrize(("ascent", "descent", "base"), JOINED)
def test_measuring_and_moving_at_once_gives_the_bits_of_one_after_the_other(
    target: Target, ascent: str | None, descent: str, base: str, case: str, found: float | None
) -> None:
    rows = CASES[case]
    groups = [{**a, **b} for a, b in zip(RULE_GROUPS, BASE_CASES[base][1], strict=True)]
    scaling: dict[str, Any] = {"grad_scale": _number(4.0, target)}
    lars = base == "lars"

    def step(at_once: bool) -> tuple[Columns, Columns, list[bool], Tensor]:
        cols = cases.columns(rows, target.device)
        cols["m"], cols["m_norm_sq"] = [None if x is None else 2 * x for x in cols["q"]], cols["q_norm_sq"]
        table = cases.table(rows, cols, target.backend)
        inf = None if found is None else _number(found, target)
        sums: Sums | None = None
        if ascent is not None:
            stretch = {"asam": "asam", "friendly_adaptive": base}.get(ascent)
            eta = cases.factor(stretch, rows, table)
            options: dict[str, Any] = {**scaling, "adaptive": eta, "found_inf": inf, "trust_ratio": lars}
            if at_once:
                sums, inf = ops.measure_and_perturb(table, ascent, groups, mask=Mask(0.7), **options)
            else:
                sums, up = ops.measure(table, ascent, groups, **options)
                ops.perturb(table, up, eta, Mask(0.7))
                inf = up.found_inf
        between = cases.copy(cols)
        options = {**scaling, "known": sums, "found_inf": inf, "max_grad_norm": 0.5}
        if at_once:
            inf = ops.measure_and_step(table, descent, base, groups, **options)
        else:
            _, down = ops.measure(table, descent, groups, trust_ratio=lars, **options)
            ops.step(table, base, down, groups)
            inf = down.found_inf
        return between, cols, table.perturbed, inf

    *mine, moved, inf = step(at_once=True)
    *theirs, as_moved, as_inf = step(at_once=False)
    for here, there in zip(mine, theirs, strict=True):
        assert cases.same_bits(here, there)
    assert moved == as_moved
    assert torch.equal(inf, as_inf)


@on_every_target
def test_measure_without_the_check_needs_no_sums_where_the_rule_reads_none(target: Target) -> None:
    rows = CASES["groups"]
    cols = cases.columns(rows, target.device)
    made = cases.table(rows, {**cols, "r": cols["s"]}, target.backend)
    options = {"grad_scale": torch.tensor(8.0, device=target.device)}
    without = [rule for rule in DESCENTS if not pairs_of(rule, check=False)]
    assert without == ["at_w", "at_perturbed", "sam_blend", "wsam", "wsam_coupled", "crsam", "sampa"]
    for rule in without:
        sums, found = lk.measure(made, rule, RULE_GROUPS, check=False, **options)
        _, checked = lk.measure(made, rule, RULE_GROUPS, **options)
        assert sums.pairs == ()
        assert sums.values.shape == (0, len(rows))
        assert found.found_inf.item() == 0
        for name in ("d", "q", "post"):
            mine, theirs = getattr(found, name), getattr(checked, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs), (rule, name)
    found = lk.measure(made, "at_w", RULE_GROUPS, check=False, found_inf=torch.ones((), device=target.device))[1]
    assert found.found_inf.item() == 0


@on_every_target
def test_all_reduce_sees_the_new_sums_once(target: Target) -> None:
    rows = CASES["groups"]
    made = cases.table(rows, cases.columns(rows, target.device), target.backend)
    seen = []

    def all_reduce(sums: Sums) -> Sums:
        seen.append(sums.pairs)
        return Sums(sums.pairs, 4 * sums.values)

    _, alone = lk.measure(made, "sam", RULE_GROUPS)
    _, reduced = lk.measure(made, "sam", RULE_GROUPS, all_reduce=all_reduce)
    lk.measure(made, "at_w", RULE_GROUPS, all_reduce=all_reduce, check=False)
    assert seen == [(("g", "g"),)]
    assert torch.allclose(reduced.d, alone.d / 2, rtol=1e-12)


@on_every_target
def test_errors(target: Target) -> None:
    rows = [Row((4,))]
    cols = cases.columns(rows, target.device)
    c = COMBINATIONS["s, q = s - c g"].coefficients(rows, target.device)
    name, groups = BASE_CASES["adam"]
    for absent in ("exp_avg", "step"):
        made = cases.table(rows, {**cols, absent: [None]}, target.backend)
        with pytest.raises(ValueError, match=absent):
            lk.step(made, name, c, groups)
    with pytest.raises(ValueError, match="no column 'q', which is to be written"):
        lk.step(cases.table(rows, {x: y for x, y in cols.items() if x != "q"}, target.backend), name, c, groups)
    with pytest.raises(ValueError, match="'b'"):
        lk.perturb(cases.table(rows, {**cols, "b": [None]}, target.backend), c)
    with pytest.raises(ValueError, match="unknown base"):
        lk.step(cases.table(rows, cols, target.backend), "adamax", c, groups)
    for base, wrong in (("lars", c), ("sgd", cases.for_base(c, "lars"))):
        with pytest.raises(ValueError, match="trust ratio"):
            lk.step(cases.table(rows, cols, target.backend), base, wrong, BASE_CASES["sgd"][1])
    for base, option, state in (
        ("sgd-momentum", "momentum", "momentum_buffer"),
        ("rmsprop-centered", "centered", "grad_avg"),
    ):
        name, groups = BASE_CASES[base]
        made = cases.table(rows, {**cols, state: [None]}, target.backend)
        with pytest.raises(ValueError, match=state):
            lk.step(made, name, c, groups)
        lk.step(made, name, c, [{**g, option: 0} for g in groups])
    made = cases.table(rows, cols, target.backend, perturbed=[True])
    with pytest.raises(ValueError, match="before the perturbation"):
        lk.measure(made, "at_perturbed", RULE_GROUPS, trust_ratio=True)
    with pytest.raises(ValueError, match="unknown rule"):
        lk.measure(cases.table(rows, cols, target.backend), "look", groups)


def _number(value: float, target: Target) -> Tensor:
    return torch.tensor(value, device=target.device)


# Properties ---------------------------------------------------------------------------------------------------------

ON_G = ["sam", "asam", "trust_normalized", "trust", "trust_global", "unit"]
few_examples = settings(max_examples=8, deadline=None, derandomize=True, database=None)
shapes = st.lists(st.sampled_from([(0,), (1,), (), (3,), (130,), (4, 5)]), min_size=1, max_size=5)


@on_every_target
@few_examples
@given(
    shapes=shapes,
    order=st.randoms(use_true_random=False),
    base=st.sampled_from(["sgd-nesterov", "adamw", "lamb", "lars"]),
)
def test_permuting_the_tensors_changes_nothing_per_tensor(target: Target, shapes: Any, order: Any, base: str) -> None:
    """Up to the order in which the total over tensors is added."""
    rows = [Row(shape, group=i % 3) for i, shape in enumerate(shapes)]
    places = list(range(len(rows)))
    order.shuffle(places)
    straight = cases.columns(rows, target.device)
    shuffled = {name: [x[i] for i in places] for name, x in cases.copy(straight).items()}
    _whole_step(target, rows, straight, base)
    _whole_step(target, [rows[i] for i in places], shuffled, base)
    for name in ("w", "q", "exp_avg", "step"):
        for position, i in enumerate(places):
            torch.testing.assert_close(shuffled[name][position], straight[name][i], rtol=1e-6, atol=1e-6)


@on_every_target
@few_examples
@given(shapes=shapes, exponent=st.integers(-8, 8), rule=st.sampled_from(ON_G))
def test_a_loss_scale_does_not_move_the_ascent(target: Target, shapes: Any, exponent: int, rule: str) -> None:
    rows = [Row(shape, group=i % 3) for i, shape in enumerate(shapes)]
    results = []
    for scale in (1.0, 2.0**exponent):
        cols = cases.columns(rows, target.device)
        for g in cols["g"]:
            g.mul_(scale)
        made = cases.table(rows, cols, target.backend)
        groups = [{**h, "perturb_eps": 0.0} for h in RULE_GROUPS]
        eta = cases.eta(rows) if rule == "asam" else None
        _, c = lk.measure(made, rule, groups, adaptive=eta, grad_scale=_number(scale, target))
        lk.perturb(made, c, eta)
        results.append(cols["w"])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-7, atol=2e-7)


@on_every_target
@few_examples
@given(
    row=st.integers(0, len(ROWS) - 1),
    column=st.sampled_from(["g", "s"]),
    value=st.sampled_from([math.inf, -math.inf, math.nan]),
    base=st.sampled_from(list(BASE_CASES)),
    max_grad_norm=st.sampled_from([None, 1.0]),
)
def test_a_non_finite_value_anywhere_leaves_every_tensor_untouched(
    target: Target, row: int, column: str, value: float, base: str, max_grad_norm: float | None
) -> None:
    cols = cases.columns(ROWS, target.device)
    cols[column][row].reshape(-1)[-1] = value
    before = cases.copy(cols)
    _whole_step(target, ROWS, cols, base, max_grad_norm=max_grad_norm)
    for place, of in enumerate(ROWS):
        if not of.master:
            cols["b"][place] = before["b"][place] = None
    assert cases.same_bits(cols, before)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_a_float64_master_of_narrower_weights_is_computed_in_float64(target: Target, dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=target.device) / 3
    columns = {"w": exact.to(dtype), "b": exact.clone(), "g": torch.ones_like(exact).to(dtype)}
    table = lk.TensorTable(
        backend=target.backend,
        step=[torch.zeros((), device=target.device)],
        **{name: [x] for name, x in columns.items()},
    )
    c = Coefficients(
        ("g",),
        torch.full((1, 1), 1 / 7, dtype=torch.float64, device=target.device),
        None,
        torch.zeros((), device=target.device),
    )
    lk.perturb(table, c)
    assert torch.equal(columns["b"], exact)
    assert torch.equal(columns["w"], (exact + 1 / 7).to(dtype))
    lk.restore(table)
    assert torch.equal(columns["w"], exact.to(dtype))
    lk.step(table, "sgd", c, [{"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}])
    assert torch.equal(columns["b"], exact - 1 / 7)
    assert torch.equal(columns["w"], (exact - 1 / 7).to(dtype))


@pytest.mark.parametrize("column", ["w", "exp_avg"])
def test_lamb_cannot_add_what_its_first_phase_changes(column: str) -> None:
    rows = [Row((3,))]
    name, groups = BASE_CASES["lamb"]
    c = cases.Combination(("g", column), (1.0, 0.0), post=(0.0, 0.1)).coefficients(rows, "cpu")
    with pytest.raises(ValueError, match=f"lamb adds after .* {column} cannot be added"):
        lk.step(cases.table(rows, cases.columns(rows), "reference"), name, c, groups)
