"""The memory that the documentation promises is what the allocator hands out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import looksam
from benchmarks import memory
from looksam_kernels import backend_info

SHAPES = [(256, 256)] * 4
"""Enough elements that a number for each tensor does not count."""
DOCS = Path(__file__).parents[2] / "docs"
ADAMW = 12
"""w, m and v."""
BACKENDS = [name for name in ("native", "reference") if backend_info("cpu")[name].available]
CLASSES = {name: cls.__name__ for name, cls in looksam.VARIANTS.items()}


def promised() -> dict[str, tuple[int, int]]:
    """Class -> bytes always, and during a sharp step, beside parameters, gradients and the base's state: the table of
    docs/costs.md."""
    text = (DOCS / "costs.md").read_text().partition("## Memory")[2].partition("Measured:")[0]
    rows = re.findall(r"^\| ([^|]+) \| (\d+)[^|]*\| (\d+)[^|]*\|$", text, re.MULTILINE)
    found = {}
    for names, always, during in rows:
        for name in re.sub(r"\([^)]*\)", "", names).split(","):
            found[re.sub(r"[ -]", "", name)] = int(always), int(during)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_variant_keeps_and_needs_what_the_documentation_says(name: str, backend: str) -> None:
    """Between steps the weights, the base's state, the backup and what the variant reuses: nothing else. At the peak also the
    gradients. The reference works with temporaries."""
    always, during = promised()[CLASSES[name]]
    found = memory.usage(memory.variant(name, backend=backend), SHAPES)
    assert found.grown == 0
    assert found.kept == pytest.approx(ADAMW + always, abs=0.01)
    if backend == "native":
        assert found.peak == pytest.approx(ADAMW + 4 + always + during, abs=0.01)


@pytest.mark.parametrize(("name", "kept"), [("LAMB", 12), ("LARS", 8), ("Lion", 8)])
def test_an_optimizer_by_itself_keeps_its_state_alone(name: str, kept: int) -> None:
    found = memory.usage(memory.OURS[name], SHAPES)
    assert (found.kept, found.grown) == (pytest.approx(kept, abs=0.01), 0)
    if "native" in BACKENDS:
        assert found.peak == pytest.approx(kept + 4, abs=0.01)


def test_the_count_sees_what_is_allocated_given_back_and_kept() -> None:
    kept: list[Any] = []

    def some() -> None:
        first = torch.empty(1000)
        kept.append(torch.empty(500, dtype=torch.float64))
        del first
        torch.empty(10)

    found = memory.allocated(some)
    assert (found.peak, found.left) == (8000, 4000)


def test_a_leak_is_seen() -> None:
    kept: list[Any] = []

    def build(params: Any) -> memory.Step:
        step = memory.OURS["SAM"](params)

        def leaking() -> None:
            step()
            kept.append(torch.empty(1024))

        return leaking

    found = memory.usage(build, SHAPES)
    assert found.grown == pytest.approx(4 * 1024 * memory.K / (4 * 256 * 256))


@pytest.mark.parametrize("name", memory.PEERS)
def test_peers_can_be_measured(name: str) -> None:
    try:
        found = memory.usage(memory.PEERS[name], [(64, 64)])
    except memory.Missing as reason:
        pytest.skip(str(reason))
    assert found.grown == 0
    assert 12 <= found.kept < found.peak
