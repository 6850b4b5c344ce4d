"""What the compiled modules are made of: sources, flags, and the reasons why one cannot be compiled here.

``setup.py``, ``CMakeLists.txt`` and ``python -m looksam_kernels build`` all read this file; the first two by its path,
before the package or torch need be there. So it needs the standard library only, and imports nothing of the package.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

CPU = "_C"
CUDA = "_cuda"
Report = Callable[[str], None]
COMMAND = "python -m looksam_kernels build"

# No contraction to fused multiply-adds: all instruction sets then give the same bits.
MATH_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# Python's own -fwrapv would keep the compiler from vectorising loops with int indices: sums take three times as long.
CPU_FLAGS = (*MATH_FLAGS, "-g0", "-fno-wrapv", "-fvisibility=hidden")
# For at::parallel_for in torch's headers. Only while compiling: linking it would bring a second OpenMP runtime with
# threads of its own beside torch's.
OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()
CUDA_CXX_FLAGS = ("-O3", "-g0", "-fvisibility=hidden", "-DLOOKSAM_MODULE=_cuda")
NVCC_FLAGS = ("-O3",)
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")

SOURCES = {
    CPU: ("bindings/cpu.cpp", "bindings/places.cpp", "bindings/snapshot.cpp", "cpu/*.cpp"),
    CUDA: ("bindings/cuda.cpp", "cuda/*.cu"),
}
HEADERS = {
    CPU: (
        "bindings/arguments.h",
        "bindings/host_columns.h",
        "bindings/places.h",
        "bindings/snapshot.h",
        "core/*.h",
        "cpu/*.h",
    ),
    CUDA: (
        "bindings/arguments.h",
        "bindings/session.h",
        "bindings/device_table.h",
        "bindings/borrowed_columns.h",
        "core/*.h",
        "cuda/*.h",
        "cuda/*.cuh",
    ),
}


class Stamp(NamedTuple):
    """What a compiled module was made for and from. It stands in the module's file and is read without loading it."""

    module: str
    torch: str
    python: str
    cuda: str | None
    """torch's CUDA version, for :data:`CUDA`; the CPU's module does not depend on it."""
    machine: str
    sources: str
    compiler: str
    arch: str
    """TORCH_CUDA_ARCH_LIST, for :data:`CUDA`."""


MARK = b"looksam-stamp:"


def read_stamp(file: Path) -> Stamp | None:
    """``None`` for a file without one: it was made before there were stamps, or is not ours."""
    content = file.read_bytes()
    start = content.find(MARK + b"{")
    if start < 0:
        return None
    try:
        fields = json.loads(content[start + len(MARK) : content.index(b"\0", start)])
        return Stamp(**fields)
    except (TypeError, ValueError):
        return None


def stamp_source(stamp: Stamp) -> str:
    """C++ source that puts the stamp into a module."""
    text = json.dumps(MARK.decode() + json.dumps(stamp._asdict()))
    return f'extern "C" __attribute__((used, visibility("default"))) const char looksam_stamp[] = {text};\n'


# What is there -----------------------------------------------------------------------------------------------------------


def files(csrc: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(csrc.glob(pattern))]


def sources(csrc: Path, module: str) -> list[Path]:
    return files(csrc, SOURCES[module])


def flags(module: str) -> dict[str, list[str]]:
    """For torch's ``extra_compile_args``."""
    if module == CPU:
        return {"cxx": [*CPU_FLAGS, *OPENMP]}
    return {"cxx": list(CUDA_CXX_FLAGS), "nvcc": list(NVCC_FLAGS)}


def digest(csrc: Path, module: str) -> str:
    """Of all that the module is compiled from, flags included."""
    made_of = hashlib.sha256(json.dumps(flags(module)).encode())
    for path in files(csrc, SOURCES[module] + HEADERS[module]):
        made_of.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        made_of.update(path.read_bytes())
    return made_of.hexdigest()[:16]


def python_abi() -> str:
    return str(sysconfig.get_config_var("SOABI"))


def compiler() -> list[str]:
    """The C++ compiler, as torch chooses it."""
    return os.environ.get("CXX", "c++").split()


@functools.cache
def _version_of(*command: str) -> str:
    done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, timeout=60)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else "")


def nvcc() -> Path | None:
    """Where torch looks for it: CUDA_HOME, CUDA_PATH, the search path, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and (found := shutil.which("nvcc")):
        return Path(found)
    path = Path(home or "/usr/local/cuda", "bin", "nvcc")
    return path if path.exists() else None


def cuda_home(compiler: Path) -> Path:
    """The toolkit's folder, with the headers. nvcc itself knows it; torch takes the folder above nvcc's, which is another
    one where nvcc on the search path is a link or a script that calls the real one."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(named)
    dry = [str(compiler), "--dryrun", "-x", "cu", "-c", os.devnull]
    top = re.search(r"^#\$ TOP=(.*)$", subprocess.run(dry, capture_output=True, text=True, check=False).stderr, re.M)
    return Path(top[1].strip() if top else compiler.parent / "..").resolve()


def wanted_stamp(csrc: Path, module: str, arch: str = "") -> Stamp:
    """What a module compiled here and now would carry. Asks torch, and the compilers for their versions."""
    import torch

    versions = [_version_of(*compiler())]
    if module == CUDA and (found := nvcc()):
        versions.append(_version_of(str(found)))
    return Stamp(
        module=module,
        torch=torch.__version__,
        python=python_abi(),
        cuda=torch.version.cuda if module == CUDA else None,
        machine=platform.machine(),
        sources=digest(csrc, module),
        compiler="; ".join(versions),
        arch=arch,
    )


# What is missing ---------------------------------------------------------------------------------------------------------


def setting(name: str) -> str:
    """``auto``, ``0`` or ``1``.

    Raises:
        ValueError: the variable has another value.
    """
    value = os.environ.get(name, "auto") or "auto"
    if value not in ("auto", "0", "1"):
        raise ValueError(f"{name}={value!r} means nothing; set it to 0 (leave out), 1 (required) or auto")
    return value


def why_no_cpu() -> str | None:
    """Why :data:`CPU` cannot be compiled here, or ``None``."""
    try:
        _version_of(*compiler())
    except (OSError, subprocess.SubprocessError) as error:
        return f"there is no C++ compiler ({error}); on Debian and Ubuntu: apt install g++"
    if importlib.util.find_spec("torch") is None:
        return "torch was not there"
    if importlib.util.find_spec("setuptools") is None:  # torch's build helpers need it
        return "setuptools is not installed; run: pip install setuptools ninja"
    return None


def why_no_cuda() -> str | None:
    """Why :data:`CUDA` cannot be compiled here, or ``None``. To be asked where :func:`why_no_cpu` has no objection."""
    if setting("LOOKSAM_CUDA") == "0":
        return "LOOKSAM_CUDA=0"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    found = nvcc()
    if found is None:
        return "nvcc was not found; CUDA_HOME names the toolkit's folder"
    try:
        release = re.search(r"release (\d+)\.", _version_of(str(found)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{found} does not run ({error})"
    if release is None:
        return f"{found} does not tell its version"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"{found} is of CUDA {release[1]}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def cuda_arch_list() -> str:
    """TORCH_CUDA_ARCH_LIST where it is set; else the GPUs of this machine; else what nvcc knows of :data:`ARCHITECTURES`,
    and newer ones through the last one's PTX."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return given
    import torch

    if torch.cuda.is_available():
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(here))
    done = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in done.stdout.split()]
    return ";".join(known or ["8.0", "9.0"]) + "+PTX"


def main() -> None:
    """For CMake: ``flags``, or the ``sources`` that need no torch."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    print(
        *{"flags": MATH_FLAGS, "sources": files(csrc, [x for x in SOURCES[CPU] if x.startswith("cpu/")])}[sys.argv[1]],
        sep=";",
        end="",
    )


if __name__ == "__main__":
    main()
