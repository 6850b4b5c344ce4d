"""Tables and figures of the documentation, made from the result files alone.

``python -m benchmarks.pages`` writes the marked sections of the pages in :data:`PAGES` and the figures in ``docs/figures`` anew,
from the newest result of each machine in ``benchmarks/results``. tests/benchmarks/test_pages.py fails while they are older than
the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import communication, epoch, figures, memory
from benchmarks.cases import OPS, STEPS
from benchmarks.peers import YARDSTICK
from benchmarks.report import facts
from benchmarks.shapes import ON_DEMAND
from benchmarks.targets import Verdict, verdicts

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FIGURES = ROOT / "docs/figures"
Record = dict[str, Any]

LISTS = {"vit-s": "ViT-S/16", "vit-b": "ViT-B/16"}
"""The lists that the pages show."""
WORDS = {
    "AdamW": "AdamW alone",
    "SAM": "SAM",
    "LookSAM refresh": "LookSAM, sharp step",
    "LookSAM reuse": "LookSAM, reuse step",
    "LAMB": "LAMB",
    "Look-LayerSAM refresh + LAMB": "Look-LayerSAM + LAMB, sharp step",
    "Look-LayerSAM reuse + LAMB": "Look-LayerSAM + LAMB, reuse step",
}
"""The cases as the documentation calls them."""
PO = "pytorch_optimizer"
RIVALS = {
    "torch AdamW, foreach": ("torch foreach AdamW",),
    f"{PO}, foreach": (f"{PO} SAM", f"{PO} LookSAM refresh", f"{PO} LookSAM reuse", f"{PO} Lamb"),
    f"{PO}, over fused AdamW": tuple(f"{PO} {x}, fused base" for x in ("SAM", "LookSAM refresh", "LookSAM reuse")),
    "SAM as a loop over tensors": ("davda54-style SAM",),
    "timm": ("timm Lamb",),
    "torch.compile": ("torch.compile AdamW",),
}
"""Who is a bar in the figure -> peers that it stands for, one a step."""


# Results --------------------------------------------------------------------------------------------------------------


def newest(folder: Path = RESULTS) -> list[Record]:
    """The newest timing of each machine, the newest of all first."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:]):
        result = json.loads(path.read_text())
        if "measured" in result:
            found[result["machine"]["slug"]] = {**result, "file": path.stem}
    return sorted(found.values(), key=lambda result: result["date"], reverse=True)


def newest_memory(folder: Path = RESULTS) -> Record:
    last: Record = json.loads(max(folder.glob("memory-*.json")).read_text())
    return last


def newest_epochs(folder: Path = RESULTS) -> Record | None:
    """``None``: no machine has measured them."""
    found = sorted(folder.glob("epoch-*.json"), key=lambda path: path.stem[-10:])
    return json.loads(found[-1].read_text()) if found else None


def record(result: Record, shapes: str, case: str) -> Record | None:
    return next((r for r in result["measured"] if (r["shapes"], r["case"]) == (shapes, case)), None)


def fused(r: Record | None) -> float | None:
    """Our time over that of torch's fused AdamW in the same run."""
    return None if r is None or YARDSTICK not in r["peers"] else 1 / r["peers"][YARDSTICK]["ratio"]


def machine_of(result: Record) -> str:
    name = result["machine"].get("gpu") or result["machine"]["cpu"]
    return re.sub(r"\s+", " ", re.sub(r"\([RT]M?\)|Processor|CPU|@.*", "", name)).strip()


# Sections -------------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns whose names begin with ``>`` are aligned to the right."""
    head = [c.removeprefix(">") for c in columns]
    rule = ["---:" if c.startswith(">") else "---" for c in columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def measured_on() -> str:
    parts = [f"* `{result['file']}`: {facts(result)}" for result in newest()]
    return "\n".join(parts)


def goals() -> str:
    """Every goal, and how far each machine's newest result is from it: ViT-S / ViT-B."""
    results = newest()
    told: dict[str, list[list[Verdict]]] = {}
    for i, result in enumerate(results):
        for verdict in verdicts(result):
            told.setdefault(verdict.goal, [[] for _ in results])[i].append(verdict)
    rows = [[_goal(goal), *(_verdict(of_machine) for of_machine in each)] for goal, each in told.items()]
    return table(["goal", *(f">{machine_of(result)}" for result in results)], rows)


def _goal(text: str) -> str:
    return text.replace("refresh", "sharp").replace(" ≤ 0", "")


def _verdict(of_lists: Sequence[Verdict]) -> str:
    if not of_lists:
        return "not measured"
    met = "met" if all(v.met for v in of_lists) else "missed"
    return f"{' / '.join(v.measured for v in of_lists)}: {met}"


def steps() -> str:
    """The README's: the newest result alone."""
    result = newest()[0]
    rows = []
    for case in list(WORDS)[:5]:
        found = [record(result, shapes, case) for shapes in LISTS]
        peers = [_rival(r, f"{PO}, foreach") for r in found]
        faster = " and ".join(f"{ratio:.1f}" for ratio in peers if ratio)
        rows.append([WORDS[case], *(_number(fused(r)) for r in found), f"{faster} times faster" if faster else ""])
    return table(["step", *(f">{name}" for name in LISTS.values()), f"against {PO} (foreach)"], rows)


def speed_figure() -> str:
    """With the numbers in words: a package index shows the README without the file."""
    result, shapes = newest()[0], list(LISTS)[-1]
    said = [f"{WORDS[case]} {_number(fused(record(result, shapes, case)))}" for case in list(WORDS)[:5]]
    text = (
        f"One step as a multiple of torch's fused AdamW, {LISTS[shapes]}: {', '.join(said)}; beside it other packages"
    )
    return f'<img src="docs/figures/speed.png" width="720" alt="{text}">'


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _rival(r: Record | None, rival: str) -> float | None:
    """The rival's time over ours."""
    found = [r["peers"][peer]["ratio"] for peer in RIVALS[rival] if r is not None and peer in r["peers"]]
    return found[0] if found else None


def finite_check() -> str:
    """What ``nonfinite="ignore"`` saves, where it was measured."""
    rows = []
    results = newest()
    for case in ("AdamW", "SAM", "LAMB"):
        cells = []
        for result in results:
            pairs = [[fused(record(result, shapes, name)) for name in (case, f"{case}, unchecked")] for shapes in LISTS]
            known = [f"{a:.2f} → {b:.2f}" for a, b in pairs if a is not None and b is not None]
            cells.append(" / ".join(known) or "not measured")
        rows.append([WORDS[case], *cells])
    return table(["step", *(f">{machine_of(result)}" for result in results)], rows)


def epochs() -> str:
    content = newest_epochs()
    if content is None:
        return "Not measured yet."
    figure = "![Time of an epoch by optimizer](figures/epoch.png)"
    return f"{where_of(content)}:\n\n{epoch.markdown(content)}\n{figure}"


def sizes() -> str:
    """Nanoseconds an element, and the same over torch's fused AdamW, from a million elements to a hundred."""
    result = next((r for r in newest() if all(record(r, shapes, "SAM") for shapes in ON_DEMAND)), None)
    if result is None:
        return "Not measured yet."
    rows = []
    for case in list(WORDS)[:5]:
        of_lists = [record(result, shapes, case) for shapes in ON_DEMAND]
        each = [1e6 * r["median_ms"] / r["params"] for r in of_lists if r is not None]
        if len(each) < len(ON_DEMAND):
            continue
        rows.append([WORDS[case], *(f"{x:.2f}" for x in each), f"{100 * (max(each) / min(each) - 1):.0f} %"])
        ratios = [fused(r) for r in of_lists]
        rows.append([f"{WORDS[case]}, ratio", *map(_number, ratios), ""])
    columns = ["step", *(f">{shapes} elements" for shapes in ON_DEMAND), ">largest over smallest"]
    return f"{where_of(result)}:\n\n{table(columns, rows)}"


SECTIONS: dict[str, Callable[[], str]] = {
    "steps": steps,
    "speed figure": speed_figure,
    "goals": goals,
    "measured on": measured_on,
    "finite check": finite_check,
    "epochs": epochs,
    "sizes": sizes,
    "memory": lambda: memory.markdown(newest_memory()).strip(),
    "communication": lambda: communication.table().strip(),
}
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md", ROOT / "docs/costs.md")


def page(text: str) -> str:
    """With its marked sections made anew.

    Raises:
        KeyError: a section that there is not.
    """
    return SECTION.sub(lambda m: f"<!-- generated: {m[1]} -->\n\n{SECTIONS[m[1]]()}\n\n<!-- end -->", text)


SECTION = re.compile(r"<!-- generated: ([a-z ]+) -->\n.*?<!-- end -->", re.DOTALL)


# Figures --------------------------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    name: str
    drawn: Any
    """The numbers in it."""
    draw: Callable[[Path, str, Any], list[Path]]


def where_of(result: Record) -> str:
    return f"{machine_of(result)}, {result['options']['threads']} threads, {result['date']}"


def drawings() -> Iterator[Drawing]:
    result = newest()[0]
    where = where_of(result)
    yield Drawing("speed", {"where": where, "panels": speed(result)}, figures.ratio_bars)
    yield Drawing("bandwidth", {"where": where, "panels": bandwidth(result)}, figures.bandwidth)
    if (content := newest_epochs()) is not None:
        yield Drawing("epoch", {"where": where_of(content), "panels": epoch_bars(content)}, figures.epoch_bars)
    yield Drawing("memory", memory_bars(newest_memory()), figures.memory_bars)
    drawn = [[*communication.RANKS], communication.panels(communication.Machine())]
    yield Drawing(communication.FIGURE, drawn, figures.scaling)


def speed(result: Record) -> dict[str, dict[str, dict[str, float]]]:
    """List -> step -> who -> multiple of torch's fused AdamW."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for shapes, title in LISTS.items():
        for case in list(WORDS)[:5]:
            r = record(result, shapes, case)
            if r is None or (own := fused(r)) is None:
                continue
            bars = {"looksam": own}
            for rival in RIVALS:
                if (ratio := _rival(r, rival)) is not None:
                    bars[rival] = own * ratio
            panels.setdefault(title, {})[WORDS[case]] = bars
    return panels


def bandwidth(result: Record) -> dict[str, dict[str, list[float]]]:
    """Steps and ops of the largest list -> case -> bytes for each parameter, GB/s, and the copy's GB/s in the same round."""
    panels: dict[str, dict[str, list[float]]] = {}
    shapes, title = [x for x in LISTS.items() if record(result, x[0], "AdamW") is not None][-1]
    for case in (*STEPS, *OPS):
        r = record(result, shapes, case.name)
        if r is not None and r["gb_s"] is not None:
            kind = "whole steps" if case in STEPS else "ops"
            numbers = [r["bytes_per_param"], r["gb_s"], r["copy_gb_s"]]
            panels.setdefault(f"{title}: {kind}", {})[case.name] = numbers
    return panels


def epoch_bars(content: Record) -> dict[str, list[list[Any]]]:
    """Model -> rows of name, whether it is ours, seconds, multiple of the yardstick's epoch."""
    panels: dict[str, list[list[Any]]] = {}
    for r in content["epochs"]:
        own = r["side"] == "ours"
        panels.setdefault(r["model"], []).append([r["optimizer"], own, r["median_s"], r["ratio"]])
    return panels


def memory_bars(result: Record) -> list[list[Any]]:
    """Name, ours or not, bytes kept, bytes at the peak: those that the figure shows."""
    shown = ("SAM", "LookSAM", "LookLayerSAM over LAMB", "LAMB")
    return [
        [r["name"], r["side"] == "ours", round(r["kept"], 1), round(r["peak"], 1)]
        for r in result["memory"]
        if r["side"] == "peer" or r["name"] in shown
    ]


def main() -> None:
    for path in PAGES:
        path.write_text(page(path.read_text()))
        print(f"wrote {path.name}")
    for drawing in drawings():
        for path in drawing.draw(FIGURES, drawing.name, drawing.drawn):
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
