"""pytorch_optimizer's own tests of SAM and LookSAM, run on our classes.

They are in its sdist only. ``PYTORCH_OPTIMIZER_SDIST`` names the unpacked one:
``pip download --no-deps --no-binary :all: pytorch_optimizer==4.1.0`` and ``tar xzf``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.support import BACKENDS

pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
SDIST = os.environ.get("PYTORCH_OPTIMIZER_SDIST", "")
HERE = Path(__file__).parent


@pytest.mark.skipif(not SDIST, reason="PYTORCH_OPTIMIZER_SDIST does not name its unpacked sdist")
@pytest.mark.parametrize("backend", BACKENDS)
def test_their_tests_pass_on_our_classes(backend: str) -> None:
    theirs = Path(SDIST) / "tests" / "test_wrapper_optimizers.py"
    assert theirs.is_file(), f"{theirs} is not there"
    environment = {**os.environ, "LOOKSAM_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytorch_optimizer_adapter", "-p", "no:cacheprovider"]
    command += [str(theirs), "-k", "TestSAM and not WSAM and not BSAM and not FriendlySAM", "-o", "addopts="]
    result = subprocess.run(command, cwd=SDIST, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20
