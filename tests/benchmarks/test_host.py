"""``python -m benchmarks.host``: every contender, or some, with Triton's launches left out, and without the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host

FEW = ["--tensors", "3", "--seconds", "0.01", "--steps", "1"]


def test_every_contender_is_timed_beside_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    host.main([*FEW, "--backend", "reference"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["µs", "ratio", "µs/tensor", "calls", "modules"]
    assert [line[:20].strip() for line in lines] == list(host.loops(1, "reference"))
    assert lines[0].split()[-2] == "1.000"


def test_triton_without_launches_and_without_the_extension() -> None:
    """In a process of its own: what is left out stays out."""
    pytest.importorskip("triton")
    root = Path(host.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "python"), str(root)])}
    options = ["--backend", "triton", "--no-extension", "--only", "LookSAM reuse"]
    command = [sys.executable, "-m", "benchmarks.host", *FEW, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=root)
    _, line = done.stdout.splitlines()
    assert line.startswith("LookSAM reuse")
    assert line.split()[3] == "-"
