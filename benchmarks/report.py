"""Tables from a result file alone: ``python -m benchmarks.report benchmarks/results/NAME.json`` prints them as markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.peers import YARDSTICK
from benchmarks.targets import verdicts

Record = dict[str, Any]


class Sheet(NamedTuple):
    """One table: a title, column names (a leading ``>`` aligns to the right) and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def sheets(result: Record) -> Iterator[Sheet]:
    """All tables of a result, for paper and for the terminal alike."""
    for shapes in dict.fromkeys(r["shapes"] for r in result["measured"]):
        records = [r for r in result["measured"] if r["shapes"] == shapes]
        yield Sheet(_title(records[0]), OWN, [_own(r, result) for r in records])
        rows = [row for r in records for row in _peers(r)]
        if rows:
            yield Sheet(f"{shapes}: the same steps by others", PEERS, rows)
    goals = [
        (v.shapes, v.goal, v.measured, "met" if v.met else f"missed by {v.missed_by:.0f} %") for v in verdicts(result)
    ]
    if goals:
        yield Sheet("Targets", ("list", "target", ">measured", "verdict"), goals)
    if result["missing"]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for m in result["missing"]:
            reasons.setdefault((m["peer"], m["reason"]), []).append(m["shapes"])
        rows = [(peer, ", ".join(lists), reason) for (peer, reason), lists in reasons.items()]
        yield Sheet("Not measured", ("peer", "lists", "reason"), rows)


OWN = ("step", ">B/param", ">ms", ">IQR", ">GB/s", ">% copy", ">launches", ">host µs", ">× fused")
PEERS = ("step", "peer", ">ms", ">IQR", ">our speed-up")


def _title(r: Record) -> str:
    return f"{r['shapes']}: {r['tensors']:,} tensors, {r['params'] / 1e6:.1f} M parameters, {r['backend']} backend"


def _own(r: Record, result: Record) -> tuple[str, ...]:
    launches = str(r["launches"]) + (" + sync" if r["synchronises"] else "") if "launches" in r else "n/a"
    host = next((o["host_us"] for o in result["measured"] if o["case"] == r["case"] and "host_us" in o), None)
    yardstick = r["peers"].get(YARDSTICK)
    return (
        r["case"],
        str(r["bytes_per_param"]),
        _ms(r["median_ms"]),
        _ms(r["q3_ms"] - r["q1_ms"]),
        "" if r["gb_s"] is None else f"{r['gb_s']:.1f}",
        "" if r["percent_of_copy"] is None else f"{r['percent_of_copy']:.0f}",
        launches,
        "" if host is None else f"{host:.0f}",
        "" if yardstick is None else f"{1 / yardstick['ratio']:.2f}",
    )


def _peers(r: Record) -> Iterator[tuple[str, ...]]:
    for name, peer in r["peers"].items():
        if name != YARDSTICK:
            spread = peer["q3_ms"] - peer["q1_ms"]
            yield r["case"], name, _ms(peer["median_ms"]), _ms(spread), f"{peer['ratio']:.2f} ×"


def _ms(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def facts(result: Record) -> str:
    """Where, when and how, in one paragraph."""
    m, o, v = result["machine"], result["options"], result["versions"]
    where = (
        f"{m['gpu']}, driver {m['driver']}" if "gpu" in m else f"{m['cpu']}, {m['cores']} cores, {o['threads']} threads"
    )
    packages = ", ".join(f"{name} {version}" for name, version in v.items() if version)
    copies = ", ".join(f"{gb_s:.1f} GB/s ({label})" for label, gb_s in result["copy_gb_s"].items())
    others = [r["others_percent"] for r in result["measured"] if r["others_percent"] is not None]
    busy = f" Other processes took {min(others):.0f} to {max(others):.0f} % of the CPU time." if others else ""
    return f"{where}. {packages}. Revision {result['revision']}, {result['date']}. Copy of 256 MiB: {copies}.{busy}"


NOTES = """\
Medians of contenders in turns, each with caches flushed before; IQR is the distance of the quartiles. GB/s counts the bytes
that a streaming implementation must move (B/param); a copy counts 8 bytes an element, and its rate is that of the same round.
On a CPU a copy may also read what it overwrites, which is not counted: a step that updates in place can then reach 150 %.
× fused is our time over that of torch's fused AdamW. Host µs is measured on 152 tiny tensors, caches warm. Times are the
optimizers' alone: gradients are handed over ready-made, so the second pass that pytorch_optimizer's LookSAM runs in a reuse
step costs it nothing here.
"""


def markdown(result: Record) -> str:
    parts = ["<!-- made by benchmarks/report.py from the .json of the same name -->", facts(result), NOTES.strip()]
    for sheet in sheets(result):
        rule = ("---:" if c.startswith(">") else "---" for c in sheet.columns)
        lines = [_row(c.removeprefix(">") for c in sheet.columns), _row(rule), *map(_row, sheet.rows)]
        parts += [f"### {sheet.title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def show(result: Record, console: Console) -> None:
    console.print(facts(result), highlight=False)
    for sheet in sheets(result):
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for column in sheet.columns:
            numeric = column.startswith(">")
            table.add_column(column.removeprefix(">"), justify="right" if numeric else "left", no_wrap=numeric)
        for row in sheet.rows:
            style = None if not sheet.title.startswith("Targets") else "green" if row[-1] == "met" else "red"
            table.add_row(*row, style=style)
        console.print(table)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(markdown(json.loads(Path(path).read_text())), end="")
