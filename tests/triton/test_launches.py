"""How many launches and copies a step takes on the device: of the kernels, of torch operations, of numbers sent there.

Counted on CPU tensors, with nothing launched: whatever torch operation computes or copies is a kernel on a GPU.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import looksam
from looksam.plans import Plan
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.layout import Layout
from looksam_kernels.formulas import ASCENTS, DESCENTS, KEEP_NORM, is_scale, kept_norm

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts on CPU tensors"),
]

OPTIONS: dict[str, dict[str, Any]] = {"aesam": {"total_steps": 100}, "aelooksam": {"total_steps": 100}}
DECIDES = ("aesam", "aelooksam")
"""They evaluate "at_w" first, and read ||g||^2 on the host: a total, and the read."""
VIEWS = """alias as_strided detach empty empty_like empty_strided expand lift_fresh new_empty permute reshape select slice
split_with_sizes squeeze t unbind unsqueeze view _unsafe_view"""
NO_LAUNCH = frozenset(f"aten::{name}" for name in re.findall(r"\w+", VIEWS))


class Counting(TorchDispatchMode):
    """Counts launches, torch operations that would launch, and copies to the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        monkeypatch.setattr(Launch, "__call__", lambda launch, *arguments: self.launch(launch, *arguments))
        send = Layout.send

        def counted_send(layout: Layout, x: Any) -> Any:
            self.counts["copy to the device"] += 1
            return send(layout, x)

        monkeypatch.setattr(Layout, "send", counted_send)

    def launch(self, prepared: Any, grid: Any, device: Any, *arguments: Any) -> None:
        self.counts[prepared.kernel.__name__] += 1
        written = {"add_partials": (0, 1.0), "evaluate": (6, 0.0)}.get(prepared.kernel.__name__)
        if written is not None:  # sums and found_inf, which are read on the CPU
            place, value = written
            arguments[place].fill_(value)
            self.counts["aten::fill_"] -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func._schema.name) not in NO_LAUNCH and name.startswith("aten::"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpu.kernels()
    return Counting(monkeypatch)


def expected(plan: Plan, base: str, decides: bool = False) -> int:
    """A rule is one launch. New sums of it are one more, and one where columns must be read for them. A copy for the first
    rule and for those that read new gradients. A perturbation is one; the update counts the step and steps; then it keeps
    norms or makes LAMB's ratios, and applies these. The numbers that say how far the weights rest are read together and written
    together."""
    descent = DESCENTS[plan.descent]
    ascents = [ASCENTS[x.ascent].pairs for x in plan.passes if x.ascent is not None]
    last = (*descent.pairs, *(descent.clip_pairs if base == "lamb" else ()))
    known: set[tuple[str, str]] = set()
    seen: set[str] = set()
    total = len(ascents)
    for i, pairs in enumerate([*([DESCENTS["at_w"].pairs] if decides else []), *ascents, last]):
        new = {pair for pair in set(pairs) - known if not is_scale(pair[0])}
        read = {pair for pair in new if kept_norm(pair) is None}
        gradients = {x for pair in read for x in pair} & {x.column for x in plan.passes}
        total += 1 + bool(new) + bool(read) + (i == 0 or not gradients <= seen)
        known, seen = known | new, seen | gradients
    finishes = descent.writes in KEEP_NORM or base == "lamb"
    return total + 2 + finishes + (base == "lamb") + 2 * (descent.along is not None)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        (name, base)
        for name, cls in looksam.VARIANTS.items()
        for base in ("adamw", "lamb")
        if cls.bases is None or base in cls.bases
    ],
)
def test_launches_of_every_variant(name: str, base: str, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """New gradients in new memory and another lr in every step. What the passes do is not counted."""
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    optimizer = looksam.VARIANTS[name](params, base, lr=0.1, backend="triton", **OPTIONS.get(name, {}))
    run, advance = optimizer._pass, optimizer._advance
    alive: list[Any] = []
    done: list[Plan] = []

    def closure(kept: Any = None, **_: Any) -> Any:
        optimizer.zero_grad()
        losses = torch.stack([(p**2).sum() for p in params])
        if optimizer.per_sample:
            return losses if kept is None else losses[kept]
        losses.sum().backward()
        return losses.sum()

    def uncounted(*arguments: Any) -> Any:
        before = counting.counts.copy()
        loss = run(*arguments)
        counting.counts = before
        alive.extend(p.grad for p in params)
        return loss

    monkeypatch.setattr(optimizer, "_pass", uncounted)
    monkeypatch.setattr(optimizer, "_advance", lambda plan: (done.append(plan), advance(plan)))
    counts: dict[Plan, Counter[str]] = {}
    for _ in range(2 * optimizer.param_groups[0].get("k", 1) + 3):
        optimizer.param_groups[0]["lr"] *= 0.9
        counting.counts = Counter()
        with counting:
            optimizer.step(closure)
        counts[done[-1]] = counting.counts
    assert counts.keys() == set(done)
    for plan, found in counts.items():
        assert found.total() == expected(plan, base, name in DECIDES) + 2 * (name in DECIDES), (plan, found)


def test_launches_of_looksam() -> None:
    """What :func:`expected` comes to."""
    looksam_plans = looksam.LookSAM([torch.nn.Parameter(torch.ones(2))], "adamw", lr=0.1).variant
    assert expected(looksam_plans.between, "adamw") == 6
    assert expected(looksam_plans.sharp, "adamw") == 12
    assert expected(looksam_plans.between, "lamb") == 8
    assert expected(looksam_plans.sharp, "lamb") == 13
