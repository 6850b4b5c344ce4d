"""The CUDA kernels as nvcc compiles them, executed on the CPU from their PTX: a part of the op matrix, and what they cost.

The host harness (test_harness.py) compiles the sources for the CPU. What it cannot see is seen here: the code for the device
alone, inline assembly among it, contraction as nvcc does it, 256 threads a block, the width of every access. What neither can
show: what ptxas makes of the PTX (test_compile.py), and the order of memory between blocks.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import build
from .process import Done, assert_green, on_ptx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not there: not in PATH, CUDA_HOME or /usr/local/cuda"),
]

ARCHITECTURE = "90"
OP_MATRIX = "tests/kernels/test_ops.py"
COUNTS = "tests/cuda/ptx_cases.py"
PARTS = {
    "sums": "test_sums",
    "perturb": "test_perturb or test_a_mask",
    "step": "test_step and (dtypes or master)",
    "coefficients": "test_coefficients and (clipped or plain) and not loosely and not lars",
}
"""Of the op matrix on the native backend."""


@pytest.fixture(scope="module")
def ptx() -> dict[str, Path]:
    """Of each file of kernels, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {kernel: pool.submit(build.ptx, kernel, ARCHITECTURE) for kernel in build.KERNELS}
        return {kernel: job.result() for kernel, job in jobs.items()}


@pytest.fixture(scope="module")
def found(ptx: dict[str, Path]) -> dict[str, Done]:
    """All parts, two at a time."""
    module = build.harness(sanitize=False)

    def run(part: str) -> Done:
        if part == COUNTS:
            return on_ptx(module, [*ptx.values()], COUNTS)
        return on_ptx(module, [*ptx.values()], OP_MATRIX, "-k", f"native-cpu and ({PARTS[part]})")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((*PARTS, COUNTS), pool.map(run, (*PARTS, COUNTS)), strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_op_matrix(found: dict[str, Done], part: str) -> None:
    assert_green(found[part])


def test_counts(found: dict[str, Done]) -> None:
    assert_green(found[COUNTS])


FAULTS = {
    "only 4 of the 16 bytes of a store are written": (
        build.Fault("perturb", "../core/vec.h", "    *target = raw;\n", "    target->x = raw.x;\n"),
        OP_MATRIX,
    ),
    "a thread takes the next one's vectors too": (
        build.Fault("perturb", "block.cuh", "{ return kThreads; }", "{ return kThreads / 2; }"),
        OP_MATRIX,
    ),
    "16 bytes are loaded 4 at a time": (
        build.Fault(
            "perturb",
            "../core/vec.h",
            "cache == Cache::stream ? __ldcs(source) : *source;",
            "{*(volatile unsigned*)&source->x, *(volatile unsigned*)&source->y, *(volatile unsigned*)&source->z, "
            "*(volatile unsigned*)&source->w};",
        ),
        COUNTS,
    ),
}
"""All in code that is for the device alone, each with the tests that must fail. The last makes no wrong number."""


CHOSEN = {OP_MATRIX: "native-cpu and test_perturb and shapes", COUNTS: "test_perturb"}


@pytest.fixture(scope="module")
def with_fault(ptx: dict[str, Path]) -> dict[str, Done]:
    """What the tests say of each fault, two at a time."""
    module = build.harness(sanitize=False)

    def run(name: str) -> Done:
        fault, tests = FAULTS[name]
        others = [path for kernel, path in ptx.items() if kernel != fault.kernel]
        return on_ptx(module, [build.ptx(fault.kernel, ARCHITECTURE, fault), *others], tests, "-k", CHOSEN[tests])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(run, FAULTS), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_the_harness_does_not_see_is_found(with_fault: dict[str, Done], name: str, tmp_path: Path) -> None:
    fault, _ = FAULTS[name]
    faulty = build.with_fault(fault, tmp_path) / "cuda" / f"{fault.kernel}.cu"
    seen = [build.preprocessed(path) for path in (build.CSRC / "cuda" / f"{fault.kernel}.cu", faulty)]
    assert seen[0] == seen[1], "the harness is compiled from the same text"
    done = with_fault[name]
    assert done.returncode != 0, f"all is green with the fault: {name}"
    assert "AssertionError" in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
