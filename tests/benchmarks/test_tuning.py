"""The sizes of Triton's programs: every candidate runs with its own, and the fastest is the line for the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tuning as bench
from looksam_kernels.backends.triton import tuning as sizes
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.tuning import Tuning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="times the interpreter's stand-in"),
]

CANDIDATES = [Tuning(64, 32), Tuning(128, 32), Tuning(32, 32)]


def test_each_candidate_runs_with_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts programs stands in for the device's: the larger the chunk, the fewer there are."""
    programs: list[int] = []
    asked: set[Any] = set()

    def launch(prepared: Launch, grid: Any, device: Any, *arguments: Any) -> None:
        programs.append(grid[0])
        asked.add(sizes.tuning_of(None))
        if prepared.kernel.__name__ == "evaluate":
            arguments[6].zero_()

    def clock(step: Callable[[], Any]) -> float:
        programs.clear()
        step()
        time.sleep(1e-4)
        return float(sum(programs))

    monkeypatch.setattr(Launch, "__call__", launch)
    found = bench.medians([(1000,), (7, 3)], "cpu", CANDIDATES, clock, 0.0)
    assert asked == set(CANDIDATES)
    assert set(found) == set(bench.CASES)
    ratios = bench.relative(found, CANDIDATES[0])
    assert ratios[CANDIDATES[0]] == pytest.approx([1.0] * 4)
    assert min(ratios, key=lambda x: ratios[x][-1]) == Tuning(128, 32)
    *_, line = bench.lines(ratios, SimpleNamespace(backend="cuda", arch=90))
    assert eval(f"{{{line}}}", {"Tuning": Tuning}) == {("cuda", 90): Tuning(128, 32)}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([])
    assert "there is none" in capsys.readouterr().err
