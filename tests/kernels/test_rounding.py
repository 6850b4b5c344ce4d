"""Stochastic rounding of bfloat16 weights: what it makes of a number, and which numbers the ops round so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam.shards import Shards
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, BF16, COMBINATIONS, F16, F32, F64, TARGETS, Columns, Row, Target
from tests.nightly import NIGHTLY

on_every_target = pytest.mark.parametrize("target", TARGETS)
SEED = 2**40 + 17
PERTURB, STEP = 1, 2
SIGMAS = 4.5
"""Deviations that one of a hundred thousand fair draws exceeds."""
ROWS = [
    *(Row(shape, BF16) for shape in ((0,), (1,), (), (33, 5), (4097,), (8200,))),
    Row((4097,), BF16, memory="unaligned"),
    Row((33, 5), BF16, memory="strided"),
    Row((4, 3, 5, 5), BF16, memory="channels_last"),
    Row((4, 3, 5, 5), BF16, memory="mixed"),
    Row((65,), BF16, absent=("g", "s")),
    Row((65,), BF16, master=True),
    Row((65,), F16),
    Row((65,), F32, group=1),
    Row((65,), F64, group=2),
]
STOCHASTIC = [row.dtype == BF16 and not row.master for row in ROWS]


def expected(x: Tensor, op: int, updates: int, row: int, w: Tensor) -> Tensor:
    """x, float32, rounded: the distance to the number nearer to 0, in units of 2^-16 of the distance between both, against 16
    bits of the hash."""
    nearer = x.to(BF16)
    too_far = nearer.double().abs() > x.double().abs()
    nearer = torch.where(too_far, (nearer.view(torch.int16) - 1).view(BF16), nearer)
    further = (nearer.view(torch.int16) + 1).view(BF16)
    low, high = nearer.double().abs(), further.double().abs()
    share = (x.double().abs() - low) / (high - low) * 2**16
    random = cases.hashes((0x7F4A7C15, SEED % 2**32, SEED // 2**32, op, updates, row, 0), w) >> 16
    return torch.where(random.double() + share >= 2**16, further, nearer)


def test_the_mean_of_many_roundings_is_the_number() -> None:
    """A rounding of x between a and b has the variance (x - a)(b - x)."""
    values = torch.tensor([1.0 + 2**-12, -1.0 - 2**-9, 3.14159, -1e-3, 1e-30, 2**-127 * 1.01, 0.0], dtype=F32)
    n = 1 << 16
    w = torch.empty(n, dtype=BF16)
    for x in values:
        rounded = lk.Rounding(3)(x.expand(n).contiguous(), "step", torch.tensor(5.0), 0, w)
        assert torch.equal(rounded.to(BF16).float(), rounded)
        low, high = rounded.min().double(), rounded.max().double()
        sigma = math.sqrt((x.double() - low) * (high - x.double()) / n) if low < high else 0.0
        # Steps of 2^-16 leave the mean off by less than one of them: a truncated share.
        assert abs(rounded.double().mean() - x.double()) <= SIGMAS * sigma + (high - low) * 2**-16


def test_what_bfloat16_holds_stays() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(BF16).float()
    for seed in range(3):
        rounded = lk.Rounding(seed)(exact, "perturb", torch.tensor(1.0), 0, exact)
        assert torch.equal(rounded.view(torch.int32), exact.view(torch.int32))


@on_every_target
def test_the_largest_number_and_beyond_are_rounded_to_nearest(target: Target) -> None:
    largest = torch.finfo(BF16).max
    e = torch.tensor([0.0, largest * 2.0**-10, largest * 2.0**-8, math.inf, math.nan]).repeat_interleave(100)
    ends = []
    for rounding in (lk.Rounding(SEED), None):
        g = torch.cat([e, -e]).to(BF16).to(target.device)
        w = torch.full((1000,), largest, dtype=BF16, device=target.device).copysign(g)
        columns = {"w": [w], "b": [w.clone()], "g": [g], "step": [torch.zeros((), device=target.device)]}
        c = cases.Combination(("g",), (1.0,)).coefficients([Row(())], target.device)
        lk.perturb(lk.TensorTable(backend=target.backend, rounding=rounding, **columns), c)
        ends.append(w.nan_to_num(7.0, math.inf, -math.inf))
    assert torch.equal(*ends)
    assert set(ends[0].tolist()) == {largest, -largest, math.inf, -math.inf, 7.0}


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**32}, {"op": "step"}, {"updates": 2.0}, {"row": 1}])
def test_seeds_ops_updates_and_rows_are_rounded_independently(other: dict[str, Any]) -> None:
    n = 1 << 18

    def up(seed: int = 0, op: Any = "perturb", updates: float = 1.0, row: int = 0) -> Tensor:
        x = torch.full((n,), 1 + 2**-8)
        return (lk.Rounding(seed)(x, op, torch.tensor(updates), row, x) > 1).double() - 0.5

    for shift in (0, 1, 64):
        product = 4 * (up()[: n - shift] * up(**other)[shift:])
        assert abs(product.mean().item()) < SIGMAS / math.sqrt(n - shift)


def wide(cols: Columns) -> Columns:
    """The same numbers, with the weights that are rounded stochastically, and their backups, in float32."""
    made = cases.copy(cols)
    for row, stochastic in enumerate(STOCHASTIC):
        for name in ("w", "b"):
            made[name][row] = made[name][row].float() if stochastic else made[name][row]
    return made


def table(cols: Columns, backend: str, rounding: lk.Rounding | None, moved: list[bool] | None = None) -> lk.TensorTable:
    made = lk.TensorTable(group=[row.group for row in ROWS], backend=backend, rounding=rounding, **cols)
    made.perturbed = moved or made.perturbed
    return made


def start(target: Target) -> Columns:
    cols = cases.columns(ROWS, target.device)
    for row, w in enumerate(cols["w"]):
        if not ROWS[row].master:
            cols["b"][row].copy_(w)
    return cols


@on_every_target
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_perturb_rounds_by_the_hash_and_keeps_the_backup(target: Target, again: bool, masked: bool) -> None:
    """Of the sum that a float32 weight would hold."""
    mask = lk.Mask(keep=0.6) if masked else None
    begin = start(target)
    moved = [x is not None for x in begin["g"]] if again else None
    c = cases.Combination(("g", "q"), (0.01, -0.002)).coefficients(ROWS, target.device)
    found, full, nearest = cases.copy(begin), wide(begin), cases.copy(begin)
    lk.perturb(made := table(found, target.backend, lk.Rounding(SEED), moved), c, None, mask)
    lk.perturb(table(full, target.backend, None, moved), c, None, mask)
    lk.perturb(table(nearest, target.backend, None, moved), c, None, mask)
    for row, stochastic in enumerate(STOCHASTIC):
        if stochastic and begin["g"][row] is not None:
            updates = int(begin["step"][row]) + 1
            assert torch.equal(found["w"][row], expected(full["w"][row], PERTURB, updates, row, found["w"][row])), row
        else:
            assert cases.same_bits({"w": [found["w"][row]]}, {"w": [nearest["w"][row]]})
    assert cases.same_bits({"b": found["b"]}, {"b": nearest["b"]})
    lk.restore(made)
    assert cases.same_bits({"w": found["w"]}, {"w": begin["w"]})


SHARED = ("sgd", "lamb", "lars", "grad")
"""In Triton's interpreter, which takes long, these cases stand for the others, that go the same way."""


@pytest.mark.parametrize(
    ("target", "base"),
    [
        pytest.param(*target.values, base, id=f"{target.id}-{base}", marks=target.marks)
        for target in TARGETS
        for base in BASE_CASES
        if NIGHTLY or base in SHARED or not target.values[0].is_slow
    ],
)
def test_step_rounds_by_the_hash(target: Target, base: str) -> None:
    name, groups = BASE_CASES[base]
    begin = start(target)
    combination = COMBINATIONS["g + c q" if name == "lamb" else "s, q = s - c g"]
    c = cases.for_base(combination.coefficients(ROWS, target.device), name)
    if name == "lamb":
        c = c._replace(post=0.01 * c.d)
    moved = [row % 2 == 0 for row in range(len(ROWS))]
    found, full, nearest = cases.copy(begin), wide(begin), cases.copy(begin)
    lk.step(table(found, target.backend, lk.Rounding(SEED), moved), name, c, groups)
    lk.step(table(full, target.backend, None, moved), name, c, groups)
    lk.step(table(nearest, target.backend, None, moved), name, c, groups)
    for row, stochastic in enumerate(STOCHASTIC):
        if stochastic and begin["g"][row] is not None and name != "grad":
            updates = int(begin["step"][row]) + 1
            assert torch.equal(found["w"][row], expected(full["w"][row], STEP, updates, row, found["w"][row])), row
        else:
            assert cases.same_bits({"w": [found["w"][row]]}, {"w": [nearest["w"][row]]})
    others = [column for column in begin if column != "w"]
    assert cases.same_bits({n: found[n] for n in others}, {n: nearest[n] for n in others}), "only w is rounded so"


@on_every_target
def test_a_step_that_is_left_out_restores_exactly(target: Target) -> None:
    name, groups = BASE_CASES["sgd"]
    begin = start(target)
    found = cases.copy(begin)
    c = COMBINATIONS["s"].coefficients(ROWS, target.device, found_inf=1.0)
    lk.step(table(found, target.backend, lk.Rounding(SEED), [True] * len(ROWS)), name, c, groups)
    kept = [b if row.master is False else None for row, b in zip(ROWS, begin["b"], strict=True)]
    for w, b in zip(found["w"], kept, strict=True):
        assert b is None or cases.same_bits({"w": [w]}, {"w": [b]})


@on_every_target
def test_the_joined_ops_round_as_the_single_ones(target: Target) -> None:
    groups = [{**cases.RULE_GROUPS[0], **BASE_CASES["sgd"][1][0]}] * 3
    ends = []
    for joined in (False, True):
        cols = start(target)
        made = table(cols, target.backend, lk.Rounding(SEED))
        if joined:
            sums, _ = lk.ops.measure_and_perturb(made, "sam", groups)
            moved = cases.copy(cols)
            lk.ops.measure_and_step(made, "looksam_refresh", "sgd", groups, known=sums)
        else:
            sums, up = lk.measure(made, "sam", groups)
            lk.perturb(made, up)
            moved = cases.copy(cols)
            _, down = lk.measure(made, "looksam_refresh", groups, known=sums)
            lk.step(made, "sgd", down, groups)
        ends.append((moved, cols))
    assert all(cases.same_bits(here, there) for here, there in zip(*ends, strict=True))


@on_every_target
def test_the_bits_are_those_of_the_reference(target: Target) -> None:
    """Where the sums are exact: w a multiple of 2^-7 below 2, and d one of 2^-20."""
    whole = cases.columns([Row((8200,), BF16), Row((4097,), BF16)], target.device)
    for name, unit in (("w", 2.0**-7), ("g", 2.0**-4), ("s", 2.0**-4)):
        whole[name] = [(x / unit).round().clamp(-1 / unit, 1 / unit) * unit + 0.0 for x in whole[name]]  # no -0.0
    name, groups = "sgd", [{**BASE_CASES["sgd"][1][0], "lr": 2.0**-12, "momentum": 0.0, "weight_decay": 0.0}]
    ends = []
    for backend in (target.backend, "reference"):
        cols = cases.copy(whole)
        made = lk.TensorTable(backend=backend, rounding=lk.Rounding(SEED), **cols)
        c = cases.Combination(("g",), (2.0**-12,)).coefficients([Row(())] * 2, target.device)
        lk.perturb(made, c)
        moved = cases.copy(cols)
        lk.step(made, name, cases.Combination(("s",), (1.0,)).coefficients([Row(())] * 2, target.device), groups)
        ends.append((moved, cols))
    assert all(cases.same_bits(here, there) for here, there in zip(*ends, strict=True))


@on_every_target
def test_without_a_count_it_is_an_error(target: Target) -> None:
    cols = start(target)
    cols["step"][1] = None
    with pytest.raises(ValueError, match="row 1 takes part, but column 'step' has no tensor for it"):
        lk.perturb(table(cols, target.backend, lk.Rounding()), COMBINATIONS["s"].coefficients(ROWS, target.device))


@on_every_target
def test_lamb_on_shards_rounds_as_lamb(target: Target) -> None:
    """It is computed tensor by tensor, after the norms of whole layers are known."""
    name, groups = BASE_CASES["lamb"]
    begin = start(target)
    c = COMBINATIONS["s"].coefficients(ROWS, target.device)
    found, full = cases.copy(begin), wide(begin)
    for cols, rounding in ((found, lk.Rounding(SEED)), (full, None)):
        Shards(cols["w"]).step(table(cols, target.backend, rounding), name, c, groups)
    for row, stochastic in enumerate(STOCHASTIC):
        if stochastic and begin["s"][row] is not None:
            updates = int(begin["step"][row]) + 1
            assert torch.equal(found["w"][row], expected(full["w"][row], STEP, updates, row, found["w"][row])), row
