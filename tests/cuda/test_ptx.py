"""The CUDA kernels as nvcc compiles them, executed on the CPU from their PTX: a part of the op matrix, and what they cost.

The host harness (test_harness.py) compiles the sources for the CPU. What it cannot see is seen here: the code for the device
alone, inline assembly among it, contraction as nvcc does it, 256 threads a block, the width of every access. What neither can
show: what ptxas makes of the PTX (test_compile.py), and the order of memory between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from . import build
from .process import Done, assert_green, on_ptx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not there: not in PATH, CUDA_HOME or /usr/local/cuda"),
]

ARCHITECTURE = "90"
OP_MATRIX = "tests/kernels/test_ops.py"
ROUNDING = "tests/kernels/test_rounding.py"
COUNTS = "tests/cuda/ptx_cases.py"
NO_STEP = ("upload", "sums", "perturb")
"""The kernels without those of the step, which take nvcc longer than all others and most tests together."""


class Part(NamedTuple):
    tests: str
    chosen: str
    """pytest's -k."""
    kernels: tuple[str, ...] = NO_STEP
    """Those that it launches."""


PARTS = {
    "sums": Part(OP_MATRIX, "native-cpu and test_sums"),
    "perturb": Part(OP_MATRIX, "native-cpu and (test_perturb or test_a_mask) and not test_perturbed"),
    "coefficients": Part(OP_MATRIX, "native-cpu and test_coefficients and clipped and not (loosely or lars or tensor)"),
    "counts": Part(COUNTS, "not test_step and not aligned"),
    "step": Part(
        OP_MATRIX,
        "native-cpu and (test_step and (master or dtypes and (adamw or lamb)) or test_perturbed)",
        build.KERNELS,
    ),
    "rounding": Part(ROUNDING, "native-cpu and (test_perturb or test_step or largest)", build.KERNELS),
    "counts of the step": Part(COUNTS, "test_step or aligned", build.KERNELS),
}


FAULTS = {
    "only 4 of the 16 bytes of a store are written": (
        build.Fault("perturb", "../core/vec.h", "    *target = raw;\n", "    target->x = raw.x;\n"),
        Part(OP_MATRIX, "native-cpu and test_perturb and shapes"),
    ),
    "a thread takes the next one's vectors too": (
        build.Fault("perturb", "block.cuh", "{ return kThreads; }", "{ return kThreads / 2; }"),
        Part(OP_MATRIX, "native-cpu and test_perturb and shapes"),
    ),
    "16 bytes are loaded 4 at a time": (
        build.Fault(
            "perturb",
            "../core/vec.h",
            "cache == Cache::stream ? __ldcs(source) : *source;",
            "{*(volatile unsigned*)&source->x, *(volatile unsigned*)&source->y, *(volatile unsigned*)&source->z, "
            "*(volatile unsigned*)&source->w};",
        ),
        Part(COUNTS, "test_perturb"),
    ),
}
"""All in code that is for the device alone, each with the tests that must fail. The last makes no wrong number."""


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Future[Done]]]:
    """Of every part and fault, two at a time: while nvcc compiles the step, what does not need it runs."""
    module = build.harness(sanitize=False)
    with ThreadPoolExecutor(2) as pool:
        ptx = {kernel: pool.submit(build.ptx, kernel, ARCHITECTURE) for kernel in ("step", *NO_STEP)}

        def run(part: Part, fault: build.Fault | None = None) -> Done:
            files = [
                build.ptx(kernel, ARCHITECTURE, fault) if fault and kernel == fault.kernel else ptx[kernel].result()
                for kernel in part.kernels
            ]
            return on_ptx(module, files, part.tests, "-k", part.chosen)

        early = {name: pool.submit(run, part) for name, part in PARTS.items() if part.kernels == NO_STEP}
        faulty = {name: pool.submit(run, part, fault) for name, (fault, part) in FAULTS.items()}
        late = {name: pool.submit(run, part) for name, part in PARTS.items() if part.kernels != NO_STEP}
        yield early | faulty | late


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_the_op_matrix_and_counts(results: dict[str, Future[Done]], part: str) -> None:
    assert_green(results[part].result())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_the_harness_does_not_see_is_found(
    results: dict[str, Future[Done]], name: str, tmp_path: Path
) -> None:
    fault, _ = FAULTS[name]
    faulty = build.with_fault(fault, tmp_path) / "cuda" / f"{fault.kernel}.cu"
    seen = [build.preprocessed(path) for path in (build.CSRC / "cuda" / f"{fault.kernel}.cu", faulty)]
    assert seen[0] == seen[1], "the harness is compiled from the same text"
    done = results[name].result()
    assert done.returncode != 0, f"all is green with the fault: {name}"
    assert "AssertionError" in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
