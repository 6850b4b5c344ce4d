"""The CUDA kernels, executed on the CPU: the op matrix, under AddressSanitizer and UndefinedBehaviorSanitizer.

The host harness (csrc/harness) runs the very bodies that nvcc compiles, thread by thread in random order between barriers,
block by block in random order. Above them stands the binding that runs on a GPU, too. That all this finds faults is tested
with faults: :data:`FAULTS` are the ones that were tried.

What no test here can show: that the driver's answer and its error codes are what CUDA's manual says, that memory recorded with
a stream is kept from others, that a copy between two GPUs is in order. A stub answers for the driver
(tests/kernels/test_devices.py), the harness notes what would be recorded, and test_gpu.py asks a real one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.nightly import NIGHTLY

from . import build
from .process import Done, assert_green, on_harness

pytestmark = pytest.mark.slow

OP_MATRIX = ("tests/kernels/test_ops.py", "tests/kernels/test_rounding.py")
LAUNCHES = ("tests/cuda/launch_cases.py", "tests/cuda/harness_cases.py")


PARTS = {
    "sums, perturb and promises": "not test_step and not test_coefficients",
    "step": "test_step",
    "coefficients": "test_coefficients",
}


@pytest.fixture(scope="module")
def matrix() -> dict[str, Done]:
    """All parts, two at a time."""
    module = build.harness(sanitize=True)

    def run(part: str) -> Done:
        return on_harness(module, *OP_MATRIX, "-k", f"native-cpu and ({PARTS[part]})", sanitize=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PARTS, pool.map(run, PARTS), strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_op_matrix(matrix: dict[str, Done], part: str) -> None:
    assert_green(matrix[part])


def test_launches() -> None:
    assert_green(on_harness(build.harness(sanitize=False), *LAUNCHES, sanitize=False))


TESTS_OF = {"step": "test_step and adamw", "perturb": "(test_perturb or test_a_mask)", "sums": "test_sums"}
"""Those that must fail when a kernel has a fault."""

FAULTS = {
    "the last element of a tail is left out": build.Fault(
        "perturb",
        "table.cuh",
        "chunk_size - i < T::lanes ? chunk_size - i :",
        "chunk_size - i < T::lanes ? chunk_size - i - 1 :",
    ),
    "the block sum reads its terms before all are there": build.Fault(
        "sums",
        "block.cuh",
        "double totals(const Block& block, int count) {\n    block.barrier();",
        "double totals(const Block& block, int count) {",
    ),
    "the two states are swapped": build.Fault(
        "step",
        "step.cuh",
        "has_state<Update>(k, h) ? a.state[k]",
        "has_state<Update>(k, h) ? a.state[(k + 1) % states_of<Update>]",
    ),
    "a row is added up when half of its blocks have arrived": build.Fault(
        "sums",
        "sums.cuh",
        "block_of(row_end - 1) - block_of(row_begin) + 1",
        "(block_of(row_end - 1) - block_of(row_begin) + 2) / 2",
    ),
    "the offset of a chunk is taken in bytes": build.Fault(
        "perturb",
        "table.cuh",
        "data_ += offset * (narrow() ? sizeof(Narrow) : sizeof(Wide))",
        "data_ += offset",
    ),
    "a mask is counted from the chunk on": build.Fault(
        "perturb",
        "perturb.cuh",
        "mask(a.mask, chunk.row, chunk.offset)",
        "mask(a.mask, chunk.row, 0)",
    ),
    "a preconditioner's T is not made of g in the sums": build.Fault(
        "sums",
        "sums.cuh",
        "p.root(value[0].lane[lane], root.lane[lane])",
        "p.root(value[1].lane[lane], root.lane[lane])",
    ),
    "a preconditioner's T is not made of g in the perturbation": build.Fault(
        "perturb",
        "perturb.cuh",
        "p.root(inputs[0].lane[k], moment.lane[k])",
        "p.root(inputs[1].lane[k], moment.lane[k])",
    ),
    "stochastic rounding is counted from the chunk on": build.Fault(
        "perturb",
        "table.cuh",
        "random(rounding.key, chunk.row, chunk.offset)",
        "random(rounding.key, chunk.row, 0)",
    ),
    "only some threads reach a barrier": build.Fault(
        "sums",
        "block.cuh",
        "of_lane_[i / kLanes][i % kLanes] = sum;\n    }\n    block.barrier();",
        "of_lane_[i / kLanes][i % kLanes] = sum;\n    block.barrier();\n    }",
    ),
    "an unaligned tensor is taken for an aligned one": build.Fault(
        "perturb",
        "table.cuh",
        "body(i, size, aligned && size == T::lanes);",
        "body(i, size, size == T::lanes);",
    ),
    "one element after the tail": build.Fault(
        "perturb",
        "table.cuh",
        "chunk_size - i < T::lanes ? chunk_size - i :",
        "chunk_size - i < T::lanes ? chunk_size - i + 1 :",
    ),
}
"""Each is planted in a copy of the sources, which must then fail the tests of the kernel. The last two do not make wrong
numbers, or not always: the sanitizers find them."""

FOUND_BY_SANITIZER = {
    "an unaligned tensor is taken for an aligned one": "runtime error",
    "one element after the tail": "AddressSanitizer",
}
"""And the word by which."""

EVERY_TIME = (
    "the last element of a tail is left out",
    "only some threads reach a barrier",
    "one element after the tail",
)
TRIED = [name for name in FAULTS if NIGHTLY or name in EVERY_TIME]
"""Each is a build of its own; three show that the harness and its sanitizers see anything at all."""


@pytest.fixture(scope="module")
def with_fault() -> dict[str, Done]:
    """What the matrix says of each fault that is tried, two at a time."""

    def run(name: str) -> Done:
        fault, sanitize = FAULTS[name], name in FOUND_BY_SANITIZER
        chosen = f"native-cpu and {TESTS_OF[fault.kernel]}"
        return on_harness(build.harness(sanitize, fault), *OP_MATRIX, "-k", chosen, sanitize=sanitize)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TRIED, pool.map(run, TRIED), strict=True))


@pytest.mark.parametrize("name", TRIED)
def test_a_planted_fault_is_found(with_fault: dict[str, Done], name: str) -> None:
    done = with_fault[name]
    assert done.returncode != 0, f"all is green with the fault: {name}"
    said = FOUND_BY_SANITIZER.get(name, "Error")
    assert said in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
