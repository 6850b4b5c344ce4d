"""What only the host harness can do: let a launch fail, say which stream it is, and which capture. Run by test_harness.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import looksam_kernels as lk
from looksam_kernels import TensorTable
from looksam_kernels.backends import native
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, BF16, F16, RULE_GROUPS, Columns, Combination, Row

ROWS = [Row((33,)), Row((5,), BF16, master=True), Row((9000,), group=1)]
harness: Any = native._C


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    harness.fail_after(-1)
    harness.use_stream(0)
    harness.use_capture(0)


def ops(table: TensorTable, base: str) -> list[Callable[[], None]]:
    """A LookSAM step of sharp and reuse, op by op; each can be run again if it fails."""
    name, groups = BASE_CASES[base]
    kept: dict[str, Any] = {}
    lars = name == "lars"

    def up() -> None:
        kept["sums"], kept["up"] = lk.measure(table, "asam", RULE_GROUPS, adaptive=cases.eta(ROWS), trust_ratio=lars)

    def down() -> None:
        _, kept["down"] = lk.measure(table, "looksam_refresh", RULE_GROUPS, known=kept["sums"], trust_ratio=lars)

    def reuse() -> None:
        _, kept["down"] = lk.measure(table, "looksam_reuse", RULE_GROUPS, trust_ratio=lars)

    def step() -> None:
        lk.step(table, name, kept["down"], groups)

    return [up, lambda: lk.perturb(table, kept["up"], cases.eta(ROWS)), down, step, reuse, step]


@pytest.mark.parametrize("base", ["adamw", "lars"])
def test_whichever_launch_fails_the_op_can_be_run_again(base: str) -> None:
    """As after an asynchronous error that the driver gives to the next launch: nothing counts as uploaded that was not."""
    start = cases.columns(ROWS)
    whole = cases.copy(start)
    before = harness.launches()
    for op in ops(cases.table(ROWS, whole, "native"), base):
        op()
    for launch in range(harness.launches() - before):
        cols = cases.copy(start)
        failures = []
        harness.fail_after(launch)
        for op in ops(cases.table(ROWS, cols, "native"), base):
            try:
                op()
            except RuntimeError as error:
                failures.append(str(error))
                op()
        assert len(failures) == 1
        assert "a launch that was to fail" in failures[0]
        assert cases.same_bits(cols, whole), f"launch {launch}"


def test_addresses_that_came_half_way_are_not_taken_for_those_of_before() -> None:
    """A column of more rows than one launch files: the second launch fails, then the old addresses come back."""
    rows = [Row((1,)) for _ in range(4100)]
    cols = cases.columns(rows)
    made = cases.table(rows, cols, "native")
    c = Combination(("g",), (0.05,)).coefficients(rows, "cpu")
    lk.perturb(made, c)
    first = cases.copy({"w": cols["w"]})
    lk.restore(made)
    gradients = [g for g in cols["g"] if g is not None]
    before = [g.data for g in gradients]
    for g in gradients:  # moved unseen: the table is not told
        g.data = 2 * g.data
    harness.fail_after(1)
    with pytest.raises(RuntimeError, match="was to fail"):
        lk.perturb(made, c)
    for g, data in zip(gradients, before, strict=True):
        g.data = data
    lk.perturb(made, c)
    assert cases.same_bits({"w": cols["w"]}, first)


def test_memory_of_its_own_is_recorded_with_every_further_stream() -> None:
    """Or the allocator, which knows the first one only, gives it away while another still reads it."""
    cols: Columns = cases.columns(ROWS)
    made = cases.table(ROWS, cols, "native")
    before = len(harness.recorded())
    harness.use_stream(1)
    for op in ops(made, "adamw"):
        op()
    assert len(harness.recorded()) == before, "one stream needs no record"
    for stream in (2, 1):
        harness.use_stream(stream)
        for op in ops(made, "adamw"):
            op()
        recorded = {address for address, on in harness.recorded()[before:] if on == stream}
        assert {x.data_ptr() for x in made.handle.arrays()} <= recorded
    passed = lk.measure(made, "sam", RULE_GROUPS)[1]
    harness.use_stream(2)
    lk.perturb(made, passed)
    assert (passed.d.data_ptr(), 2) in harness.recorded(), "coefficients made on another stream"


def test_what_a_graph_reads_is_kept_however_many_plans_come_after_it() -> None:
    rows = [Row((33,)) for _ in range(6)]
    cols = cases.columns(rows)
    made = cases.table(rows, cols, "native")
    harness.use_capture(7)
    lk.sums(made, (("g", "g"),))
    harness.use_capture(0)
    of_graph = {x.data_ptr() for x in made.handle.arrays()}
    for mix in range(30):
        made["g"] = [x.to(BF16 if mix >> i & 1 else F16) for i, x in enumerate(cols["g"])]
        lk.sums(made, (("g", "g"),))
    assert of_graph <= {x.data_ptr() for x in made.handle.arrays()}
