"""The goals, as data, and how far a result is from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.cases import OPS
from benchmarks.peers import YARDSTICK

VITS = ("vit-s", "vit-b")
PO = "pytorch_optimizer LookSAM"


class Target(NamedTuple):
    """``measure`` says what is held against ``limit``:

    ============  =====================================================  ========
    ``slower``    our time over the peer's                               at most
    ``faster``    the peer's time over ours                              at least
    ``copy``      percent of the copy's bandwidth                        at least
    ``host``      microseconds that the host is busy with a step         at most
    ``launches``  on the device, for a step                              at most
    ============  =====================================================  ========
    """

    case: str
    measure: str
    limit: float
    shapes: tuple[str, ...] = VITS
    peer: str = YARDSTICK


def _host(limit: float) -> tuple[Target, ...]:
    cases = ("AdamW", "SAM", "LookSAM refresh", "LookSAM reuse", "LAMB")
    return tuple(Target(case, "host", limit, ("tiny",)) for case in cases)


CPU = (
    Target("step AdamW", "slower", 1.05),
    Target("AdamW", "slower", 1.05),
    Target("SAM", "slower", 2.0),
    Target("LookSAM refresh", "slower", 2.7),
    Target("LookSAM reuse", "slower", 1.45),
    Target("LAMB", "slower", 1.5),
    Target("MSAM", "slower", 1.6),
    Target("S2-SAM", "slower", 1.6),
    Target("LookSAM refresh", "faster", 4.0, VITS, f"{PO} refresh"),
    Target("LookSAM refresh", "faster", 4.0, VITS, f"{PO} refresh, fused base"),
    Target("LookSAM reuse", "faster", 3.5, VITS, f"{PO} reuse"),
    Target("LookSAM reuse", "faster", 3.5, VITS, f"{PO} reuse, fused base"),
    *_host(150),
)
GPU = (
    *(Target(case.name, "copy", 85, ("vit-b",)) for case in OPS),
    Target("LookSAM reuse", "slower", 1.35),
    Target("LAMB", "slower", 1.5),
    *_host(60),
    Target("LookSAM refresh", "launches", 4),
    Target("LookSAM reuse", "launches", 2),
    Target("Look-LayerSAM refresh + LAMB", "launches", 5),
    Target("Look-LayerSAM reuse + LAMB", "launches", 3),
)

WORDS = {
    "slower": ("{case} ≤ {limit:g} × {peer}", "{value:.2f}"),
    "faster": ("{case} ≥ {limit:g} × faster than {peer}", "{value:.2f}"),
    "copy": ("{case} ≥ {limit:g} % of copy", "{value:.0f} %"),
    "host": ("{case} ≤ {limit:g} µs host time", "{value:.0f} µs"),
    "launches": ("{case} ≤ {limit:g} launches", "{value:g}"),
}


class Verdict(NamedTuple):
    shapes: str
    goal: str
    measured: str
    met: bool
    missed_by: float
    """In percent of the limit; 0 where the goal is met."""


def verdicts(result: dict[str, Any]) -> Iterator[Verdict]:
    """One for each goal whose case and peer were measured."""
    records = {(r["shapes"], r["case"]): r for r in result["measured"]}
    for target in CPU if result["options"]["device"] == "cpu" else GPU:
        for shapes in target.shapes:
            value = _value(records.get((shapes, target.case)), target)
            if value is not None:
                excess = value / target.limit if target.measure not in ("faster", "copy") else target.limit / value
                goal, measured = (words.format(**target._asdict(), value=value) for words in WORDS[target.measure])
                yield Verdict(shapes, goal, measured, excess <= 1, max(0.0, 100 * (excess - 1)))


def _value(record: dict[str, Any] | None, target: Target) -> float | None:
    if record is None:
        return None
    if target.measure in ("slower", "faster"):
        peer = record["peers"].get(target.peer)
        return peer and (peer["ratio"] if target.measure == "faster" else 1 / peer["ratio"])
    return record.get({"copy": "percent_of_copy", "host": "host_us", "launches": "launches"}[target.measure])
