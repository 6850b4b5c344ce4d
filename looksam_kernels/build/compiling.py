"""Compiles one module with torch's own build helpers, in a process of its own.

A process of its own, because torch's helpers change the environment, the working folder and setuptools' classes, end
the process on some errors, and print what users should read only when something fails. Standard library only, as
:mod:`looksam_kernels.build.recipe`, which setup.py hands in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = """
import json, sys
job = json.load(sys.stdin)
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
make = CUDAExtension if "nvcc" in job["flags"] else CppExtension
module = make(job["name"], job["sources"], depends=job["depends"], extra_compile_args=job["flags"])
command = ["build_ext", "--build-lib", job["into"], "--build-temp", job["objects"]]
setup(name="looksam-extension", version="0", ext_modules=[module], cmdclass={"build_ext": BuildExtension},
      script_args=command)
"""


class CompileError(RuntimeError):
    """``str()`` is one line, the first error; ``tail`` the last lines of the compiler."""

    def __init__(self, output: list[str]) -> None:
        self.tail = [line.rstrip() for line in output if line.strip()][-20:]
        errors = [line.strip() for line in output if re.search(r"\b(fatal )?error\b|^[A-Za-z.]+Error:", line, re.I)]
        super().__init__((errors or self.tail or ["it ended without a word"])[0])


def compile_module(
    recipe: Any, csrc: Path, stamp: Any, objects: Path, into: Path, progress: Callable[[str], None]
) -> Path:
    """Compiles ``stamp.module`` and returns its file in ``into``.

    Args:
        recipe: :mod:`looksam_kernels.build.recipe`, as a module.
        stamp: what it is made for; goes into the file.
        objects: a folder for the objects; what is there and up to date is not compiled again.
        progress: gets every line of output.

    Raises:
        CompileError: with the reason and the compiler's last lines.
    """
    objects.mkdir(parents=True, exist_ok=True)
    into.mkdir(parents=True, exist_ok=True)
    stamp_file = objects / "stamp.cpp"
    if not stamp_file.exists() or stamp_file.read_text() != recipe.stamp_source(stamp):
        stamp_file.write_text(recipe.stamp_source(stamp))
    sources = [*recipe.sources(csrc, stamp.module), stamp_file]
    job = {
        "name": stamp.module,
        "sources": [str(path.resolve()) for path in sources],
        "depends": [str(path.resolve()) for path in recipe.files(csrc, recipe.HEADERS[stamp.module])],
        "flags": recipe.flags(stamp.module),
        "into": str(into.resolve()),
        "objects": str(objects.resolve()),
    }
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if stamp.arch:
        environment["TORCH_CUDA_ARCH_LIST"] = stamp.arch
        environment["CUDA_HOME"] = str(recipe.cuda_home(recipe.nvcc()))
    # The worker runs in another folder than this process.
    if paths := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep))
    # Ninja may be installed for this Python without being on the search path.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    output = _run([sys.executable, "-c", WORKER], json.dumps(job), objects, environment, progress)
    made = into / f"{stamp.module}.{stamp.python}.so"
    if not made.exists():
        raise CompileError(output)
    return made


def _run(
    command: list[str], given: str, folder: Path, environment: dict[str, str], progress: Callable[[str], None]
) -> list[str]:
    """The output's lines. The process and its compilers end with this one's exceptions, Ctrl-C among them."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    output = []
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have ended already; its output says why
            process.stdin.write(given)
        with process.stdout:
            for line in process.stdout:
                output.append(line)
                progress(line.rstrip())
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code != 0:
        raise CompileError(output)
    return output
