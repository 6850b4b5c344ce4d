"""How the benchmarks' figures look, and the files that they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart with any colour vision. Markers and hatches repeat the distinction in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "-", "-", (0, (3, 2)), "-.", ":", "-")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 8.0
"""Inches: at the README's width of 720 pixels, 10 points of type are 12 pixels high."""


def digest(drawn: Any) -> str:
    """Of the numbers in a figure, which stands in its files: what they show can be compared with what they should show,
    whatever version of matplotlib drew them."""
    rounded = json.loads(json.dumps(drawn), parse_float=lambda x: f"{float(x):.6g}")
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()


def save(folder: Path, name: str, figure: Figure, drawn: Any) -> list[Path]:
    """As PNG and SVG, each with the :func:`digest` of what is ``drawn``."""
    folder.mkdir(parents=True, exist_ok=True)
    made_of = digest(drawn)
    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(png := folder / f"{name}.png", dpi=180, metadata={"Software": None, "Description": made_of})
        figure.savefig(svg := folder / f"{name}.svg", metadata={"Date": None, "Creator": None, "Description": made_of})
    plt.close(figure)
    return [png, svg]


def shows(folder: Path, name: str, drawn: Any) -> bool:
    """Are the figure's files made of this?"""
    files = (folder / f"{name}.{kind}" for kind in ("png", "svg"))
    return all(path.exists() and digest(drawn).encode() in path.read_bytes() for path in files)


def dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def scaling(folder: Path, name: str, drawn: Any) -> list[Path]:
    """Milliseconds over the number of GPUs: ``drawn`` has the numbers, and panel -> method -> milliseconds."""
    ranks, panels = drawn
    figure, rows = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6), layout="constrained")
    for axes, (title, lines) in zip(rows, panels.items(), strict=True):
        dress(axes, title, "GPUs", "ms per step, mean of a cycle (model)" if axes is rows[0] else "")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{v:,}" for v in ranks])
        for i, (label, y) in enumerate(lines.items()):
            axes.plot(ranks, y, color=COLOURS[i], linestyle=STYLES[i], marker=MARKERS[i], markersize=5, label=label)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines), frameon=False)
    return save(folder, name, figure, drawn)


def ratio_bars(folder: Path, name: str, drawn: Any) -> list[Path]:
    """Bars for each step, ours first: ``drawn["panels"]`` is list -> step -> who -> multiple of torch's fused AdamW."""
    panels = drawn["panels"]
    who = list(dict.fromkeys(x for steps in panels.values() for bars in steps.values() for x in bars))
    figure, rows = plt.subplots(1, len(panels), figsize=(WIDTH, 5.4), layout="constrained", sharey=True, squeeze=False)
    for axes, (title, steps) in zip(rows[0], panels.items(), strict=True):
        dress(axes, title, "multiples of torch's fused AdamW step", "")
        at = 0.0
        for bars in steps.values():
            for x, value in bars.items():
                i = who.index(x)
                axes.barh(at, value, height=0.85, facecolor=COLOURS[i], hatch=HATCHES[i], edgecolor="white")
                weight = "normal" if i else "bold"
                axes.annotate(
                    f"{value:.1f}",
                    (value, at),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    fontweight=weight,
                )
                at += 1
            at += 0.7
        _label_groups(axes, steps)
        axes.axvline(1, color="black", linewidth=1, linestyle=":")
        axes.margins(x=0.1, y=0.01)
    rows[0][0].invert_yaxis()
    keys = [plt.Rectangle((0, 0), 1, 1, fc=COLOURS[i], hatch=HATCHES[i], ec="white") for i in range(len(who))]
    figure.legend(keys, who, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"One step without the passes; shorter is faster. {drawn['where']}", x=0.01, ha="left", fontsize=9)
    return save(folder, name, figure, drawn)


def _label_groups(axes: Axes, groups: Mapping[str, Mapping[str, float]]) -> None:
    at, places = 0.0, []
    for bars in groups.values():
        places.append(at + (len(bars) - 1) / 2)
        at += len(bars) + 0.7
    axes.set_yticks(places, [label.replace(", ", ",\n") for label in groups], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def bandwidth(folder: Path, name: str, drawn: Any) -> list[Path]:
    """Achieved GB/s beside the copy's: ``drawn["panels"]`` is title -> case -> bytes for each parameter, GB/s, copy's GB/s."""
    panels = drawn["panels"]
    height = 0.27 * max(map(len, panels.values())) + 1.3
    figure, rows = plt.subplots(1, len(panels), figsize=(WIDTH, height), layout="constrained", squeeze=False)
    for axes, (title, cases) in zip(rows[0], panels.items(), strict=True):
        dress(axes, title, "GB/s", "")
        for i, (_, gb_s, copy) in enumerate(cases.values()):
            axes.barh(i, gb_s, height=0.62, color=COLOURS[0])
            axes.plot([copy, copy], [i - 0.42, i + 0.42], color=COLOURS[1], linewidth=2.5)
            axes.annotate(
                f"{100 * gb_s / copy:.0f} %",
                (max(gb_s, copy), i),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        labels = [f"{case.replace('refresh', 'sharp')} ({numbers[0]} B)" for case, numbers in cases.items()]
        axes.set_yticks(range(len(cases)), labels, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        axes.margins(x=0.16, y=0.02)
    keys = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[0]), plt.Line2D([], [], color=COLOURS[1], linewidth=2.5)]
    labels = ["bytes that must be moved (B for each parameter) over time", "a copy in the same run: 100 %"]
    figure.legend(keys, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Achieved bandwidth. {drawn['where']}", x=0.01, ha="left", fontsize=9)
    return save(folder, name, figure, drawn)


def epoch_bars(folder: Path, name: str, drawn: Any) -> list[Path]:
    """Seconds of an epoch: ``drawn["panels"]`` is model -> rows of name, whether it is ours, seconds, multiple of the first's."""
    panels = drawn["panels"]
    height = 0.36 * max(map(len, panels.values())) + 1.2
    figure, rows = plt.subplots(
        1, len(panels), figsize=(WIDTH, height), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (title, bars) in zip(rows[0], panels.items(), strict=True):
        dress(axes, title, "seconds an epoch", "")
        for i, (_, own, seconds, ratio) in enumerate(bars):
            axes.barh(i, seconds, height=0.7, color=COLOURS[0] if own else COLOURS[4])
            axes.annotate(f"{ratio:.2f} ×", (seconds, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), [("looksam: " if own else "") + who for who, own, *_ in bars], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.16, y=0.02)
    rows[0][0].invert_yaxis()
    figure.suptitle(
        f"An epoch, passes included; ×: multiples of the first. {drawn['where']}", x=0.01, ha="left", fontsize=9
    )
    return save(folder, name, figure, drawn)


def memory_bars(folder: Path, name: str, drawn: Any) -> list[Path]:
    """Bytes for each parameter, between steps and at the peak: rows of name, whether it is ours, kept, peak."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.34 * len(drawn) + 1.3), layout="constrained")
    dress(axes, "Memory over AdamW, float32: weights, gradients and all state", "bytes for each parameter", "")
    for i, (_, own, kept, peak) in enumerate(drawn):
        colour = COLOURS[0] if own else COLOURS[4]
        axes.barh(i, kept, height=0.7, color=colour)
        axes.barh(i, peak - kept, left=kept, height=0.7, color=colour, alpha=0.4, hatch="///", edgecolor="white")
        axes.annotate(f"{peak:g}", (peak, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(drawn)), [("looksam: " if own else "") + who for who, own, *_ in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.06, y=0.02)
    keys = [
        plt.Rectangle((0, 0), 1, 1, color="grey"),
        plt.Rectangle((0, 0), 1, 1, fc="grey", alpha=0.4, hatch="///", ec="white"),
    ]
    figure.legend(
        keys,
        ["kept between steps", "more at the peak of a step"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return save(folder, name, figure, drawn)
