"""The documentation's tables and figures are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, pages
from benchmarks.peers import PEERS, YARDSTICK
from benchmarks.report import Record


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.name)
def test_a_page_has_the_tables_of_now(path: Path) -> None:
    text = path.read_text()
    assert pages.SECTION.search(text)
    assert text.count("<!-- generated:") == text.count("<!-- end -->") == len(pages.SECTION.findall(text))
    assert pages.page(text) == text, "older than the results: python -m benchmarks.pages"


def test_every_section_is_somewhere() -> None:
    used = [name for path in pages.PAGES for name in pages.SECTION.findall(path.read_text())]
    assert sorted(used) == sorted(pages.SECTIONS)


@pytest.mark.parametrize("drawing", list(pages.drawings()), ids=lambda drawing: drawing.name)
def test_a_figure_shows_the_numbers_of_now(drawing: pages.Drawing) -> None:
    assert figures.shows(pages.FIGURES, drawing.name, drawing.drawn), (
        "older than the results: python -m benchmarks.pages"
    )


def test_a_figure_of_other_numbers_is_told_apart(tmp_path: Path) -> None:
    drawing = next(pages.drawings())
    drawing.draw(tmp_path, "x", drawing.drawn)
    assert figures.shows(tmp_path, "x", drawing.drawn)
    other = json.loads(json.dumps(drawing.drawn))
    next(iter(next(iter(other["panels"].values())).values()))["looksam"] *= 1.01
    assert not figures.shows(tmp_path, "x", other)
    (tmp_path / "x.svg").unlink()
    assert not figures.shows(tmp_path, "x", drawing.drawn)


def test_rivals_are_peers_and_every_peer_with_a_bar_has_one() -> None:
    shown = [peer for peers in pages.RIVALS.values() for peer in peers]
    assert set(shown) <= set(PEERS)
    assert set(PEERS) - set(shown) == {YARDSTICK, "apex FusedLAMB"}, "which is on GPUs only"


def result(date: str, slug: str, ratio: float, case: str = "AdamW") -> Record:
    peers = {YARDSTICK: {"ratio": 1 / ratio}, "torch foreach AdamW": {"ratio": 4.0}}
    measured = [
        {"shapes": "vit-s", "case": case, "peers": peers, "bytes_per_param": 28, "gb_s": 30.0, "copy_gb_s": 20.0}
    ]
    machine = {"slug": slug, "cpu": f"Maker(R) {slug}(TM) CPU @ 2 GHz"}
    return {"date": date, "machine": machine, "options": {"device": "cpu", "threads": 2}, "measured": measured}


def test_the_newest_of_each_machine_counts(tmp_path: Path) -> None:
    for date, slug, ratio in (("2026-01-01", "b", 2.0), ("2026-01-03", "b", 1.5), ("2026-01-02", "a", 1.1)):
        (tmp_path / f"cpu-{slug}-{date}.json").write_text(json.dumps(result(date, slug, ratio)))
    (tmp_path / "memory-2026-01-09.json").write_text(json.dumps({"memory": []}))
    found = pages.newest(tmp_path)
    assert [(x["machine"]["slug"], x["date"]) for x in found] == [("b", "2026-01-03"), ("a", "2026-01-02")]
    assert pages.machine_of(found[0]) == "Maker b"


def test_tables_follow_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    two: list[Any] = [result("2026-01-03", "b", 1.5), result("2026-01-02", "a", 1.04)]
    two[0]["measured"] += result("", "b", 1.25, "AdamW, unchecked")["measured"]
    monkeypatch.setattr(pages, "newest", lambda folder=None: two)
    assert "| AdamW ≤ 1.05 × torch fused AdamW | 1.50: missed | 1.04: met |" in pages.goals()
    assert "| AdamW alone | 1.50 → 1.25 | not measured |" in pages.finite_check()
    assert "| AdamW alone | 1.50 |  |  |" in pages.steps()
    assert pages.speed(two[0]) == {"ViT-S/16": {"AdamW alone": {"looksam": 1.5, "torch AdamW, foreach": 6.0}}}
    assert pages.bandwidth(two[1]) == {"ViT-S/16: whole steps": {"AdamW": [28, 30.0, 20.0]}}
