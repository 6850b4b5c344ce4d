"""Builds looksam_kernels._C and ._cuda where it can; everything else about the package is in pyproject.toml.

LOOKSAM_NATIVE=auto (the default) builds the extension where torch and a C++ compiler are there, and says in one line what
was built or why not; 0 leaves it out; 1 makes every reason not to build it an error. LOOKSAM_CUDA says the same about the
CUDA kernels, which need nvcc and a torch with CUDA. TORCH_CUDA_ARCH_LIST names the architectures; default: those of the
GPUs in this machine, else 8.0 and 9.0, and newer ones through PTX.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/ops.cpp",
    "csrc/cpu/baseline.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/avx512.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda_bindings.cpp",
    "csrc/cuda/sums.cu",
    "csrc/cuda/perturb.cu",
    "csrc/cuda/step.cu",
    "csrc/cuda/file.cu",
]
# No contraction to fused multiply-adds: all instruction sets then give the same bits. Python's own -fwrapv would keep the
# compiler from vectorising loops with int indices: sums take three times as long.
FLAGS = [
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-wrapv",
    "-fvisibility=hidden",
]
# For at::parallel_for in torch's headers. Only while compiling: linking it would bring a second OpenMP runtime with
# threads of its own beside torch's.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CUDA_MODULE = "looksam_kernels._cuda"
# The installed package tells from this file why it has no extension, since pip shows a build's output only on failure.
WHY_NOT = Path("looksam_kernels", "native_build.txt")


def why_not_buildable() -> str | None:
    if os.environ.get("LOOKSAM_NATIVE", "auto") == "0":
        return "it was installed with LOOKSAM_NATIVE=0"
    compiler = os.environ.get("CXX", "c++").split()  # as torch chooses it
    try:
        subprocess.run([*compiler, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no C++ compiler was there ({error})"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch was not there while it was built; install torch first and pass --no-build-isolation to pip"
    return None


def why_no_cuda() -> str | None:
    if os.environ.get("LOOKSAM_CUDA", "auto") == "0":
        return "LOOKSAM_CUDA=0"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "nvcc not found; CUDA_HOME names the toolkit's folder"
    return None


def say(line: str) -> None:
    print(f"looksam-kernels: {line}", file=sys.stderr, flush=True)


def without_extension(reason: str, build_folder: str = "") -> None:
    if os.environ.get("LOOKSAM_NATIVE", "auto") == "1":
        raise SystemExit(f"looksam-kernels: no native backend: {reason} (LOOKSAM_NATIVE=0 installs without it)")
    for note in (WHY_NOT, Path(build_folder) / WHY_NOT):  # when the compiler fails, the package is already copied
        if note.parent.is_dir():
            note.write_text(f"looksam_kernels has no compiled extension: {reason}\n")
    say(f"no native backend: {reason}. The other backends work; LOOKSAM_NATIVE=0 leaves it out without this message.")


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Sends this process's and its children's output to a file: what a failing compiler said, to quote its end."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            os.close(saved[0]), os.close(saved[1])


def without_cuda(reason: str) -> None:
    if os.environ.get("LOOKSAM_CUDA", "auto") == "1":
        raise SystemExit(f"looksam-kernels: no CUDA kernels: {reason} (LOOKSAM_CUDA=0 builds without them)")


def extension() -> dict[str, object]:
    """setup()'s arguments that build the extensions."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extension(self, ext: object) -> None:
            log = Path(tempfile.gettempdir(), f"looksam-build-{os.getpid()}.log")
            try:
                with output_to(log):
                    super().build_extension(ext)
            except Exception as error:
                lines = [line for line in log.read_text().splitlines() if line.strip()]
                say("the compiler failed; its log ends:")
                print("\n".join(lines[-20:]), file=sys.stderr, flush=True)
                errors = [line for line in lines if "error" in line.lower()]
                reason = f"the compiler failed ({(errors or [str(error)])[0].strip()})"
                if ext.name == CUDA_MODULE:
                    without_cuda(reason)
                else:
                    without_extension(reason, self.build_lib)
                ext.optional = True
            else:
                if ext.name != CUDA_MODULE:
                    for note in (WHY_NOT, Path(self.build_lib) / WHY_NOT):
                        note.unlink(missing_ok=True)
                device = f"CUDA {torch.version.cuda}" if ext.name == CUDA_MODULE else "CPU"
                say(f"native backend built for {device} with torch {torch.__version__}")
            finally:
                log.unlink(missing_ok=True)

    headers = [str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cuh")]
    modules = [
        CppExtension("looksam_kernels._C", SOURCES, depends=headers, extra_compile_args=FLAGS + OPENMP),
    ]
    reason = why_no_cuda()
    if reason is None:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-DLOOKSAM_MODULE=_cuda"], "nvcc": ["-O3"]}
        modules.append(CUDAExtension(CUDA_MODULE, CUDA_SOURCES, depends=headers, extra_compile_args=flags))
    else:
        without_cuda(reason)
        say(f"without CUDA kernels: {reason}")
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


reason = why_not_buildable()
if reason is not None:
    without_extension(reason)
setup(**(extension() if reason is None else {}))
