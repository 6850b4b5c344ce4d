"""How the benchmarks' figures look, and the files that they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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


def line_panels(
    folder: Path,
    name: str,
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    ylabel: str,
) -> list[Path]:
    """A panel for each title, with a line for each label, over powers of two."""
    figure, rows = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6), layout="constrained")
    for axes, (title, lines) in zip(rows, panels.items(), strict=True):
        dress(axes, title, xlabel, ylabel if axes is rows[0] else "")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{v:,}" for v in x])
        for i, (label, y) in enumerate(lines.items()):
            axes.plot(x, y, color=COLOURS[i], linestyle=STYLES[i], marker=MARKERS[i], markersize=5, label=label)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines), frameon=False)
    return save(folder, name, figure, [[*x], panels])
