"""What nvcc makes of csrc/cuda, read without a GPU: registers, spills, the width of memory accesses. And the binding."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.nightly import NIGHTLY

from . import build

ARCHITECTURES = ("75", "80", "86", "90", "100", "120") if NIGHTLY else ("90",)
"""Every time that whose PTX test_ptx.py executes: nvcc makes it once for both."""
NVCC = build.nvcc()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not there: not in PATH, CUDA_HOME or /usr/local/cuda"),
]


class Resources(NamedTuple):
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


class Compiled(NamedTuple):
    resources: dict[tuple[str, str], Resources]
    """By kernel and architecture."""
    binaries: list[Path]
    """One an architecture."""


_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<sm>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


_LOAD = r"\bLDG\.E(?:\.\w+)*\.128\b"


def assemble(name: str, architecture: str) -> tuple[str, Path]:
    """What ptxas says and makes of nvcc's PTX. No torch header is on its path."""
    with build.locked(f"cubin-{name}-{architecture}") as folder:
        binary = folder / f"{name}.cubin"
        options = ["-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
        return build.run(str(NVCC), *options, build.ptx(name, architecture), "-o", binary), binary


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: [pool.submit(assemble, name, sm) for sm in ARCHITECTURES] for name in build.KERNELS}
    found = {}
    for name, results in jobs.items():
        log = "".join(job.result()[0] for job in results)
        resources = {
            (m["kernel"], m["sm"]): Resources(*(int(m[key]) for key in ("stack", "stores", "loads", "registers")))
            for m in _ENTRY.finditer(log)
        }
        found[name] = Compiled(resources, [job.result()[1] for job in results])
    return found


def test_no_kernel_spills_or_has_a_stack(compiled: dict[str, Compiled]) -> None:
    resources = {key: value for part in compiled.values() for key, value in part.resources.items()}
    assert {sm for _, sm in resources} == set(ARCHITECTURES)
    bodies = ("SumsBody", "PerturbBody", "StepBody", "LambBody", "LarsBody", "UploadBody", "IndexBody")
    assert all(any(body in kernel for kernel, _ in resources) for body in bodies)
    for (kernel, sm), found in resources.items():
        print(f"sm_{sm} {found.registers:4d} registers  {kernel}")
        assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), f"{kernel} on sm_{sm}: {found}"


def sass(compiled: Compiled) -> list[str]:
    """The functions, as they are executed."""
    cuobjdump = build.cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not there: neither beside nvcc nor in a Triton wheel")
    texts = [build.run(cuobjdump, "-sass", binary) for binary in compiled.binaries]
    return [function for text in texts for function in text.split("Function : ")[1:]]


@pytest.mark.parametrize(("name", "stores"), [("sums", False), ("perturb", True), ("step", True)])
def test_streaming_kernels_access_16_bytes_at_a_time(compiled: dict[str, Compiled], name: str, stores: bool) -> None:
    functions = sass(compiled[name])
    assert len(functions) == len(compiled[name].resources)
    for function in functions:
        kernel = function.split(maxsplit=1)[0]
        if "LarsBody" in kernel:  # works on a few numbers a row
            continue
        assert re.search(_LOAD, function), f"{kernel} has no 128-bit load"
        assert not stores or re.search(r"\bSTG\.E(\.\w+)*\.128", function), f"{kernel} has no 128-bit store"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{kernel} uses local memory"


def test_sums_have_two_loads_of_each_column_under_way(compiled: dict[str, Compiled]) -> None:
    """Three columns and w, before the first of them is waited for. Where there are two storage types a vector of the wide one
    is two packs, and the code for both stands there."""
    for function in sass(compiled["sums"]):
        kernel = function.split(maxsplit=1)[0]
        if "LarsBody" in kernel:
            continue
        before = re.split(r"\b[FD](?:FMA|MUL|ADD)\b", function[re.search(_LOAD, function).start() :])[0]
        assert len(re.findall(_LOAD, before)) == 2 * 4 * (1 if "TypesIffE" in kernel else 3), kernel


def test_an_arrival_is_no_fence_for_all_memory(compiled: dict[str, Compiled]) -> None:
    for name in ("sums", "step"):
        for function in sass(compiled[name]):
            assert not re.search(r"\bMEMBAR\.SC\b", function), function.split(maxsplit=1)[0]


def test_the_binding_compiles_against_a_torch_without_cuda(tmp_path: Path) -> None:
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DLOOKSAM_MODULE=_cuda"]
    build.run(build.CXX, *options, *build.PYTHON, *build.cuda_include(str(NVCC)), build.CSRC / "bindings/cuda.cpp")
