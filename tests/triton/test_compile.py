"""Every launch that the ops make compiles for GPUs that are not there: no spills, and memory in 16-byte words."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from looksam_kernels.formulas import ASCENTS, DESCENTS
from tests.nightly import NIGHTLY

HERE = Path(__file__).parent
EVERY = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx90a", "hip:gfx942")
TARGETS = EVERY if NIGHTLY else ("cuda:90", "hip:gfx942")
STREAMS = ("inner_products", "perturb", "restore", "step", "apply_lamb")
"""The kernels that walk through chunks."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(HERE / "launches.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["launches"]
    return found


@pytest.mark.parametrize("target", EVERY if NIGHTLY else ("hip:gfx90a",))
def test_every_rule_is_compiled_without_spills(target: str) -> None:
    """All of them: none is left to the reference, which would take dozens of launches."""
    launches = compiled(target, "rules")
    assert {x["kernel"] for x in launches} == {"evaluate"}
    assert len(launches) >= 2 * len(DESCENTS) + len(ASCENTS)
    assert not [x for x in launches if x["spilled"]]


@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles_without_spills_and_in_16_byte_words(target: str) -> None:
    launches = compiled(target)
    assert {x["kernel"] for x in launches} == {*STREAMS, "add_partials", "advance", "finish_step"}
    for launch in launches:
        assert launch["spilled"] == 0, f"registers are spilled: {launch}"
        if launch["kernel"] in STREAMS:
            assert launch["loads"] > 0, f"no 16-byte load: {launch}"
            assert launch["stores"] > 0 or launch["kernel"] == "inner_products", f"no 16-byte store: {launch}"
        if target.startswith("cuda") and "bfloat16" not in launch["constexprs"]:
            assert launch["loads"] == 2 * columns_read(launch), f"a column is read otherwise, or twice: {launch}"


def columns_read(launch: dict[str, str]) -> int:
    """By a launch on float32 rows: each column is two words a thread, 8 elements."""
    kernel, constexprs = launch["kernel"], launch["constexprs"]
    if kernel == "inner_products":
        return 2  # g and s, or g and w for T g
    if kernel == "step":  # w or b, s, g, and the base's states
        states = constexprs.partition("'STATES': (")[2].partition(")")[0]
        return 3 + states.count("triton.language.")
    return {"perturb": 2, "restore": 1, "apply_lamb": 5}.get(kernel, 0)
