"""What nvcc makes of csrc/cuda, read without a GPU: registers, spills, the width of memory accesses. And the binding."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.nightly import NIGHTLY

from . import build

ARCHITECTURES = ("75", "80", "86", "90", "100", "120") if NIGHTLY else ("80", "90", "100")
NVCC = build.nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not there: not in PATH, CUDA_HOME or /usr/local/cuda")


class Resources(NamedTuple):
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


class Compiled(NamedTuple):
    resources: dict[tuple[str, str], Resources]
    """By kernel and architecture."""
    binary: Path


_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<sm>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(name: str) -> Compiled:
    with build.locked("nvcc") as folder:
        binary = folder / f"{name}.fatbin"
        targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
        options = ["-std=c++17", "-O3", "--threads=2", "--fatbin", "-Xptxas", "-v", "-Werror", "all-warnings", *targets]
        # No torch header is on its path.
        log = build.run(str(NVCC), *options, build.CSRC / "cuda" / f"{name}.cu", "-o", binary)
    resources = {
        (m["kernel"], m["sm"]): Resources(*(int(m[key]) for key in ("stack", "stores", "loads", "registers")))
        for m in _ENTRY.finditer(log)
    }
    return Compiled(resources, binary)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(build.KERNELS, pool.map(compile_kernels, build.KERNELS), strict=True))


def test_no_kernel_spills_or_has_a_stack(compiled: dict[str, Compiled]) -> None:
    resources = {key: value for part in compiled.values() for key, value in part.resources.items()}
    assert {sm for _, sm in resources} == set(ARCHITECTURES)
    bodies = ("SumsBody", "PerturbBody", "StepBody", "LambBody", "LarsBody", "UploadBody", "IndexBody")
    assert all(any(body in kernel for kernel, _ in resources) for body in bodies)
    for (kernel, sm), found in resources.items():
        print(f"sm_{sm} {found.registers:4d} registers  {kernel}")
        assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), f"{kernel} on sm_{sm}: {found}"


@pytest.mark.parametrize(("name", "stores"), [("sums", False), ("perturb", True), ("step", True)])
def test_streaming_kernels_access_16_bytes_at_a_time(compiled: dict[str, Compiled], name: str, stores: bool) -> None:
    cuobjdump = build.cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not there: neither beside nvcc nor in a Triton wheel")
    functions = build.run(cuobjdump, "-sass", compiled[name].binary).split("Function : ")[1:]
    assert len(functions) == len(compiled[name].resources)
    for function in functions:
        kernel = function.split(maxsplit=1)[0]
        if "LarsBody" in kernel:  # works on a few numbers a row
            continue
        assert re.search(r"\bLDG\.E(\.\w+)*\.128", function), f"{kernel} has no 128-bit load"
        assert not stores or re.search(r"\bSTG\.E(\.\w+)*\.128", function), f"{kernel} has no 128-bit store"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{kernel} uses local memory"


def test_the_binding_compiles_against_a_torch_without_cuda(tmp_path: Path) -> None:
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DLOOKSAM_MODULE=_cuda"]
    build.run(build.CXX, *options, *build.PYTHON, *build.cuda_include(str(NVCC)), build.CSRC / "bindings/cuda.cpp")
