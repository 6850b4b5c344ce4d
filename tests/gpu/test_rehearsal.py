"""``make gpu`` from end to end, without a GPU: see :mod:`tests.gpu.rehearsal`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.parts import LISTS
from tests.gpu.runner import LINES
from tests.gpu.toolchain import ROOT
from tests.nightly import NIGHTLY

KINDS = ("build", "smoke native", "native tests", "benchmark tiny", "memcheck", "profile ncu")
"""One part of each kind."""
PARTS = tuple(part.name for parts in LISTS.values() for part in parts) if NIGHTLY else KINDS
EVERY = 20 if NIGHTLY else 600
"""Of the tests, one of so many."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")
def test_both_lists_run_to_their_ends(tmp_path: Path) -> None:
    options = f"--rehearse --every {EVERY} --processes 1 --patience 20 --folder {tmp_path} --only '{','.join(PARTS)}'"
    command = ["make", "-s", "gpu", f"GPU_PYTHON={sys.executable}", f"GPU_ARGS={options}"]
    environment = {name: x for name, x in os.environ.items() if name not in ("LOOKSAM_BACKEND", "TRITON_INTERPRET")}
    environment["OUT"] = str(tmp_path / "out")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(tmp_path.rglob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    for name in PARTS:
        assert f"ok          {name}" in done.stdout
    for name in ("first", "second"):
        summary = (tmp_path / "out" / f"gpu-{name}.txt").read_text().splitlines()
        assert len(summary) <= LINES
        assert all(line.startswith(("ok", " ")) for line in summary[3:-1]), summary
    assert "passed" in (tmp_path / "first" / "summary.txt").read_text()
    travelling = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(travelling) <= 8
    assert {name.rpartition(".")[2] for name in travelling} == {"txt", "log", "json", "md"}
