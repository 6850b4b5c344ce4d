"""Builds what the tests of the CUDA code need: its kernels for the CPU (the host harness), for GPUs, and its binding."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pybind11
import torch
from torch.utils import cpp_extension

from tests.nightly import NIGHTLY

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda-tests"
KERNELS = ("step", "sums", "perturb", "upload")
"""Those first that take longest to compile."""
KERNEL_HEADERS = ("core", "cuda", "harness")
"""Folders of those that a kernel for the CPU is compiled with."""

CXX = os.environ.get("CXX", "c++")
COMMON = ["-fPIC", "-Wall", "-Werror", "-DLOOKSAM_HARNESS", "-DLOOKSAM_MODULE=_harness"]
# As nvcc does: products and sums become fused multiply-adds, which have other roundings.
CONTRACT = ["-mfma", "-ffp-contract=fast"] if " fma " in Path("/proc/cpuinfo").read_text() else []
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
# Of the time to compile the many instances of the step UndefinedBehaviorSanitizer takes more than half; how a row is read and
# written is the same code in the others.
ADDRESSES_ONLY = [] if NIGHTLY else ["-fno-sanitize=undefined"]
PYTHON = [
    part
    for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"], pybind11.get_include())
    for part in ("-isystem", path)
]
TORCH = Path(torch.__file__).parent / "lib"
LIBRARIES = [f"-L{TORCH}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH}"]


class Fault(NamedTuple):
    kernel: str
    """One of :data:`KERNELS`, which alone is compiled with the fault."""
    file: str
    """Under csrc/cuda."""
    text: str
    """Stands in it once."""
    replacement: str


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """A folder that one process at a time works in."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def compiled(command: Sequence[str], source: Path, folder: Path, headers: Sequence[str], suffix: str = ".o") -> Path:
    """What the command makes of one source; made again only if it, the command or a header in one of the folders has changed."""
    digest = hashlib.sha256(repr((command, source.name, torch.__version__)).encode())
    for path in sorted(path for name in headers for path in (source.parents[1] / name).glob("*.*h")):
        digest.update(path.read_bytes())
    digest.update(source.read_bytes())
    target = folder / f"{source.stem}-{digest.hexdigest()[:16]}{suffix}"
    if not target.exists():
        part = target.with_suffix(".part")
        run(*command, source, "-o", part)
        part.rename(target)
    return target


def binding_object() -> Path:
    """The CUDA binding for CPU tensors and the harness. Without sanitizers: they are for the kernels."""
    with locked("binding") as folder:
        return compiled(
            [CXX, "-std=c++20", "-O0", *COMMON, *PYTHON, "-c"],
            CSRC / "bindings/cuda.cpp",
            folder,
            ("core", "cuda", "bindings"),
        )


def harness(sanitize: bool, fault: Fault | None = None) -> Path:
    """The extension module ``_harness``: looksam_kernels._cuda, for CPU tensors."""
    name = "sanitized" if sanitize else "plain"
    command = [CXX, "-std=c++17", *COMMON, *(SANITIZE if sanitize else CONTRACT), "-c", "-x", "c++"]
    sources = [CSRC / "cuda" / f"{kernel}.cu" for kernel in KERNELS] + [CSRC / "harness" / "execute.cpp"]
    with locked(name) as folder:
        with ThreadPoolExecutor(2) as pool:
            # With the sanitizers' checks, -O1 takes longer to compile than it saves.
            level = "-O0" if sanitize else "-O1"
            jobs = [
                pool.submit(compiled, [*command, level, *options_of(path, sanitize)], path, folder, KERNEL_HEADERS)
                for path in sources
            ]
            objects = [job.result() for job in jobs] + [binding_object()]
        if fault is None:
            return _module(objects, folder, sanitize)
    with locked(f"{name}-{hashlib.sha256(repr(fault).encode()).hexdigest()[:8]}") as folder:
        source = with_fault(fault, folder) / "cuda" / f"{fault.kernel}.cu"
        objects[KERNELS.index(fault.kernel)] = compiled([*command, "-O0"], source, folder, KERNEL_HEADERS)
        return _module(objects, folder, sanitize)


def options_of(source: Path, sanitize: bool) -> list[str]:
    return ADDRESSES_ONLY if sanitize and source.stem == "step" else []


def _module(objects: Sequence[Path], folder: Path, sanitize: bool) -> Path:
    module = folder / "_harness.so"
    run(CXX, "-shared", *(SANITIZE if sanitize else []), *objects, "-o", module, *LIBRARIES)
    return module


def with_fault(fault: Fault, folder: Path) -> Path:
    _, file, text, replacement = fault
    source = folder / "csrc"
    shutil.rmtree(source, ignore_errors=True)
    for part in ("core", "cuda", "harness"):
        shutil.copytree(CSRC / part, source / part)
    path = source / "cuda" / file
    original = path.read_text()
    assert original.count(text) == 1, f"{file} does not hold {text!r} once"
    path.write_text(original.replace(text, replacement))
    return source


def preprocessed(source: Path) -> str:
    """The text that the harness is compiled from, without the names of the files that it comes from."""
    return run(CXX, "-std=c++17", *COMMON, "-E", "-P", "-x", "c++", source)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))


def ptx(kernel: str, architecture: str, fault: Fault | None = None) -> Path:
    """What nvcc makes of one of :data:`KERNELS` before its assembler."""
    command = [str(nvcc()), "-std=c++17", "-O3", "-ptx", f"-arch=compute_{architecture}", "-Werror", "all-warnings"]
    with locked(f"ptx-{kernel}-{architecture}") as folder:
        if fault is None:
            return compiled(command, CSRC / "cuda" / f"{kernel}.cu", folder, ("core", "cuda"), ".ptx")
    with locked(f"ptx-{hashlib.sha256(repr(fault).encode()).hexdigest()[:8]}") as folder:
        return compiled(command, with_fault(fault, folder) / "cuda" / f"{kernel}.cu", folder, ("core", "cuda"), ".ptx")


def cuda_include(compiler: str) -> list[str]:
    """-isystem options for the toolkit's headers, as its own compiler has them."""
    done = subprocess.run(
        [compiler, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    words = [word.strip('"') for line in done.stderr.splitlines() if "INCLUDES=" in line for word in line.split()]
    places = [word.split("-I", 1)[1].strip('"') for word in words if "-I" in word]
    assert places, done.stderr
    return [part for place in places for part in ("-isystem", place)]


def cuobjdump() -> str | None:
    """Beside nvcc, or in the Triton wheel."""
    compiler = nvcc()
    beside = str(Path(os.path.realpath(compiler)).parent) if compiler else None
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump", path=beside)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump", path=beside) or shutil.which("cuobjdump", path=str(bundled))
