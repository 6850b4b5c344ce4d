"""Runs tests in a process of its own, where CPU tensors go through the CUDA binding and kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from . import build

Done = subprocess.CompletedProcess[str]


def run_tests(plugin: str, environment: dict[str, str], *arguments: str) -> Done:
    """With one of the plugins beside this: they say which variables they read."""
    environment = {**os.environ, "LOOKSAM_BACKEND": "", "OMP_NUM_THREADS": "1", **environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(build.ROOT / "python"), str(build.ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", f"tests.cuda.{plugin}", "-p", "no:cacheprovider"]
    command.append("--capture=no")  # a sanitizer ends the process, and with it whatever pytest holds back
    return subprocess.run(
        [*command, *arguments], cwd=build.ROOT, env=environment, capture_output=True, text=True, check=False
    )


def on_harness(module: Path, *arguments: str, sanitize: bool) -> Done:
    environment = {"LOOKSAM_HARNESS": str(module)}
    if sanitize:
        library = build.run(build.CXX, "-print-file-name=libasan.so").strip()
        environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}
    return run_tests("on_harness", environment, *arguments)


def on_ptx(module: Path, ptx: list[Path], *arguments: str) -> Done:
    return run_tests(
        "on_ptx", {"LOOKSAM_HARNESS": str(module), "LOOKSAM_PTX": os.pathsep.join(map(str, ptx))}, *arguments
    )


def assert_green(done: Done) -> None:
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout
