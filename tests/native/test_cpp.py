"""The C++ tests of csrc/, built by CMake under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_cpp(tmp_path: Path) -> None:
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run("cmake", "-S", str(ROOT), "-B", str(tmp_path), *ninja)
    _run("cmake", "--build", str(tmp_path))
    _run("ctest", "--test-dir", str(tmp_path), "--output-on-failure")


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
