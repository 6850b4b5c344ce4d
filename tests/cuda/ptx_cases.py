"""What the kernels cost, counted in nvcc's PTX: instructions, bytes, barriers, widths. Run by test_ptx.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels.backends import native
from looksam_kernels.formulas import ASCENTS, DESCENTS, Sums
from looksam_kernels.ops import pairs_of
from tests.cuda.machine import THREADS, Machine
from tests.cuda.on_ptx import KERNELS
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, BF16, COMBINATIONS, RULE_GROUPS, Columns, Combination, Row


def launched(op: Callable[[], object]) -> list[tuple[str, Machine]]:
    """The launches of an op: names of the kernels, and what was counted."""
    seen: list[tuple[str, Machine]] = []
    KERNELS.watcher = lambda name, machine: seen.append((name, machine))
    try:
        op()
    finally:
        KERNELS.watcher = None
    return seen


def machine_of(body: str, op: Callable[[], object]) -> Machine:
    """That of the one launch of a kernel; an op of a new table uploads it, too."""
    (found,) = [machine for name, machine in launched(op) if body in name]
    return found


# The coefficients -----------------------------------------------------------------------------------------------------


def of_coefficients(rule: str, count: int) -> Machine:
    rows = [Row((1,), group=i % 3) for i in range(count)]
    pairs = pairs_of(rule, clip=rule in DESCENTS)
    sums = Sums(pairs, 1 + torch.arange(len(pairs) * count, dtype=torch.float64).view(len(pairs), count) % 7)
    table = cases.table(rows, {"w": [torch.zeros(1) for _ in rows]}, "native")
    clip = {"max_grad_norm": 1.0} if rule in DESCENTS else {}
    return machine_of("SumsBody", lambda: lk.coefficients(table, rule, sums, RULE_GROUPS, **clip))


@pytest.mark.parametrize("rule", [rule for rule in (*ASCENTS, *DESCENTS) if rule in native._C.rules()])
def test_coefficients_are_at_most_1500_instructions_at_152_rows(rule: str) -> None:
    """One thread a row: as many up to 256 rows. The last block of a sum evaluates the rule alone while the GPU waits."""
    at_8, at_152, at_512 = (of_coefficients(rule, count).instructions for count in (8, 152, 512))
    assert at_152 <= 1500
    assert at_152 <= at_8 + 250, "threads of three groups take different branches; no more than that"
    assert at_512 - at_152 <= 2 * 256


def test_the_order_of_a_total() -> None:
    """Rows that are 256 apart in one thread, then threads that are 32 apart, then those 32."""
    count = 700
    rows = [Row((1,)) for _ in range(count)]
    squares = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    table = cases.table(rows, {"w": [torch.zeros(1) for _ in rows]}, "native")
    found = lk.coefficients(table, "sam", Sums((("g", "g"),), squares[None]), RULE_GROUPS[:1])
    of_thread = [math_sum(squares[t::THREADS].tolist()) for t in range(THREADS)]
    total = math_sum([math_sum(of_thread[lane::32]) for lane in range(32)])
    group = RULE_GROUPS[0]
    assert found.d[0, 0].item() == group["rho"] / (math.sqrt(total) + group["perturb_eps"])


def math_sum(terms: list[float]) -> float:
    """One by one, as ``sum`` of Python 3.12 does not."""
    total = 0.0
    for term in terms:
        total += term
    return total


# Bytes and widths -------------------------------------------------------------------------------------------------------


def traffic(machine: Machine, cols: Columns) -> dict[str, Counter[int]]:
    """For each column the bytes that were read from its tensors or written there, by the width of the access."""
    result: dict[str, Counter[int]] = {}
    for access in machine.accesses:
        for name, tensors in cols.items():
            for x in tensors:
                if x is not None:
                    begin, end = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
                    count = int(((access.addresses >= begin) & (access.addresses < end)).sum())
                    if count:
                        result.setdefault(name, Counter())[access.bytes] += count * access.bytes
    return result


SIZE = 8192 + 512


def per_element(machine: Machine, cols: Columns, *names: str) -> float:
    """Bytes, of the named columns."""
    moved = traffic(machine, cols)
    return sum(sum(moved.get(name, Counter()).values()) for name in names) / SIZE


@pytest.mark.parametrize(
    ("row", "again", "stretched", "bytes_"),
    [
        (Row((SIZE,)), False, False, 12),
        (Row((SIZE,)), True, False, 8),
        (Row((SIZE,)), True, True, 12),
        (Row((SIZE,), BF16), False, False, 6),
        (Row((SIZE,), BF16), True, False, 4),
        (Row((SIZE,), BF16, master=True), False, False, 6),
        (Row((SIZE,), BF16, master=True), True, False, 6),
        (Row((SIZE,), BF16, master=True), False, True, 8),
    ],
    ids=str,
)
def test_perturb_moves_no_byte_too_many(row: Row, again: bool, stretched: bool, bytes_: int) -> None:
    """Of w and b: w is read only where the perturbation starts from it or is scaled with it."""
    cols = cases.columns([row])
    table = cases.table([row], cols, "native", [True] if again else None)
    c = Combination(("g",), (0.05,)).coefficients([row], "cpu")
    machine = machine_of("PerturbBody", lambda: lk.perturb(table, c, [0.01] if stretched else None))
    assert per_element(machine, cols, "w", "b") == bytes_
    assert {width for widths in traffic(machine, cols).values() for width in widths} == {16}


def test_sums_read_each_column_once() -> None:
    row = Row((SIZE,))
    cols = cases.columns([row])
    machine = machine_of(
        "SumsBody", lambda: lk.sums(cases.table([row], cols, "native"), (("g", "g"), ("g", "s"), ("s", "s")))
    )
    assert per_element(machine, cols, "g", "s") == 8
    assert per_element(machine, cols, *cols) == 8


@pytest.mark.parametrize(("base", "bytes_"), [("adamw", 28), ("sgd-momentum", 20)])
def test_step_reads_and_writes_each_column_once(base: str, bytes_: int) -> None:
    row = Row((SIZE,))
    cols = cases.columns([row])
    name, groups = BASE_CASES[base]
    table = cases.table([row], cols, "native")
    c = Combination(("g",), (1.0,)).coefficients([row], "cpu")
    machine = machine_of("StepBody", lambda: lk.step(table, name, c, groups))
    assert per_element(machine, cols, *(column for column in cols if column != "step")) == bytes_
    assert {width for name, widths in traffic(machine, cols).items() if name != "step" for width in widths} == {16}


@pytest.mark.parametrize("misaligned", ["g", "w"])
def test_a_tensor_that_is_not_aligned_keeps_no_other_from_16_bytes(misaligned: str) -> None:
    """As the parts of DDP's buffers behind one of an odd size."""
    row = Row((SIZE,))
    cols = cases.columns([row])
    (x,) = cols[misaligned]
    assert x is not None
    cols[misaligned] = [cases.place(x, "unaligned", "cpu")]
    table = cases.table([row], cols, "native")
    c = COMBINATIONS["g + c q"].coefficients([row], "cpu")
    ops: dict[str, Callable[[], object]] = {
        "SumsBody": lambda: lk.sums(table, (("g", "q"), ("w", "w"))),
        "PerturbBody": lambda: lk.perturb(table, c),
        "StepBody": lambda: lk.step(table, "adamw", c, BASE_CASES["adamw"][1]),
    }
    for body, op in ops.items():
        moved = traffic(machine_of(body, op), cols)
        assert set(moved[misaligned]) == {4}
        assert {width for name in moved.keys() - {misaligned, "step"} for width in moved[name]} == {16}, body


# Barriers and fences ----------------------------------------------------------------------------------------------------

PAIRS = (("g", "g"), ("g", "s"), ("s", "s"), ("g", "q"), ("s", "q"), ("w", "w"))


@pytest.mark.parametrize(("pairs", "barriers"), [(PAIRS[:1], 6), (PAIRS[:3], 8)], ids=["one pair", "three pairs"])
def test_barriers_and_fences_of_a_sum(pairs: tuple[tuple[str, str], ...], barriers: int) -> None:
    """A chunk and the end of its row: two barriers for all sums together, one more where there are several, and that of an
    arrival. An arrival orders its own counter with what the block wrote, not all memory for all threads."""
    row = Row((SIZE // 8,))
    cols = cases.columns([row])
    machine = machine_of("SumsBody", lambda: lk.sums(cases.table([row], cols, "native"), pairs))
    assert machine.barriers == barriers
    assert machine.opcodes["atom.add.acq_rel.gpu.global.u32"] == 2
    assert not any(opcode.startswith(("membar", "fence")) for opcode in machine.opcodes)


def test_what_is_counted_is_what_runs() -> None:
    """A launch without a row's block counts nothing; one with it as many loads as there are vectors."""
    row = Row((SIZE,))
    cols = cases.columns([row])
    table = cases.table([row], cols, "native")
    machine = machine_of("SumsBody", lambda: lk.sums(table, PAIRS[:1]))
    (g,) = cols["g"]
    assert isinstance(g, Tensor)
    begin = g.data_ptr()
    places = [int(x) for a in machine.accesses for x in a.addresses if begin <= int(x) < begin + 4 * SIZE]
    assert sorted(places) == list(range(begin, begin + 4 * SIZE, 16)), "each once"
