"""The cases of ``python -m benchmarks`` through pytest-benchmark: ``pytest benchmarks/ --shapes vit-s -k LookSAM``.

Here contenders run one after the other, in what cache the last run left: good for watching one kernel while working on
it. Ratios to peers come from ``python -m benchmarks``, which takes turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import OPS, STEPS, Arena, Run
from benchmarks.peers import PEERS, YARDSTICK
from benchmarks.shapes import LISTS

CONTENDERS = {case.name: case.build for case in (*STEPS, *OPS)} | {YARDSTICK: PEERS[YARDSTICK].build}


@pytest.fixture(scope="module", params=LISTS)
def arena(request: pytest.FixtureRequest) -> Arena:
    chosen, device, backend = (request.config.getoption(name) for name in ("--shapes", "--device", "--backend"))
    if request.param not in chosen.split(","):
        pytest.skip("not in --shapes")
    torch.set_num_threads(2)
    return Arena(LISTS[request.param](), device, backend)


@pytest.mark.parametrize("name", CONTENDERS)
def test_speed(benchmark: Any, arena: Arena, name: str) -> None:
    run = CONTENDERS[name](arena)
    benchmark.group = name
    rounds = 5 if arena.numel > 1e6 else 100
    benchmark.pedantic(finished(run, arena), setup=run.prepare, rounds=rounds, warmup_rounds=2)


def finished(run: Run, arena: Arena) -> Callable[[], Any]:
    """The step, with the wait for a device that works on its own."""
    if arena.device.type == "cpu":
        return run.step

    def step() -> None:
        run.step()
        torch.cuda.synchronize()

    return step
