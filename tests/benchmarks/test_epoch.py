"""Epochs by optimizer: who takes part, how often each runs its passes, and what becomes of the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from benchmarks import epoch, figures, pages
from benchmarks.peers import YARDSTICK

PASSES = {
    YARDSTICK: 1.0,
    "LookSAM, k = 5": 1.2,
    "Look-LayerSAM over LAMB, k = 5": 1.2,
    "SAM": 2.0,
    "SAM as a loop over tensors": 2.0,
    "pytorch_optimizer SAM": 2.0,
    "pytorch_optimizer LookSAM, k = 5": 2.0,
}


class Small(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(epoch.SIZE**2, epoch.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        Small.calls += 1
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("contender", epoch.CONTENDERS, ids=lambda contender: contender.name)
def test_passes_of_each_and_that_it_learns(contender: epoch.Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    Small.calls, made = 0, []
    monkeypatch.setattr(epoch, "BASE", {**epoch.BASE, "lr": 1e-3})
    found = epoch.measure(lambda: made.append(Small()) or made[-1], [contender], 2)[contender.name]
    if isinstance(found, str):
        pytest.skip(found)
    assert len(found) == 2
    assert Small.calls == pytest.approx(3 * epoch.BATCHES * PASSES[contender.name])
    nn.init.zeros_(fresh := Small().layer.weight)
    assert made[0].layer.weight.isfinite().all()
    assert not made[0].layer.weight.equal(fresh)


def test_the_file_the_table_and_the_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(epoch, "MODELS", {"small": Small})
    clock = iter(range(10**6))
    monkeypatch.setattr(epoch.time, "perf_counter", lambda: float(next(clock)))
    epoch.main(["--rounds", "2", "--threads", "1", "--out", str(tmp_path)])
    path = next(tmp_path.glob("epoch-*.json"))
    content: Any = json.loads(path.read_text())
    assert {r["optimizer"] for r in content["epochs"]} | {m["optimizer"] for m in content["missing"]} == {*PASSES}
    assert all((r["median_s"], r["ratio"]) == (1.0, 1.0) for r in content["epochs"])
    assert "| looksam SAM | 1.00 s, 1.00 × |" in epoch.markdown(content)
    assert pages.newest_epochs(tmp_path) == content
    drawn = {"where": pages.where_of(content), "panels": pages.epoch_bars(content)}
    assert drawn["panels"]["small"][0] == [YARDSTICK, False, 1.0, 1.0]
    figures.epoch_bars(tmp_path, "epoch", drawn)
    assert figures.shows(tmp_path, "epoch", drawn)


def test_without_a_result_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "newest_epochs", lambda: None)
    assert pages.epochs() == "Not measured yet."
    assert "epoch" not in [drawing.name for drawing in pages.drawings()]
