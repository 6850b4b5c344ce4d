"""How figures look, and those of every experiment: drawn from the records alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from .design import Figures
from .measure import EpochRecord
from .records import Experiment, Run, mean_and_error

# Okabe and Ito 2008: told apart with any colour vision. Line styles repeat the distinction in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (1, 1)))


def style(index: int) -> dict[str, Any]:
    """Colour and line style of the method at ``index``; different for the first 28."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[(index % len(COLOURS) + index // len(COLOURS)) % len(STYLES)],
    }


def curves(experiment: Experiment) -> Figures:
    """Accuracy over epochs, passes and time, the training loss, and the final accuracies. Empty if no run finished, and
    for the many settings of a tuning."""
    if experiment.header["config"]["data"].get("holdout") or not any(map(experiment.finished, experiment.contenders)):
        return {}
    figures: Figures = {}
    for name, title, xlabel, ylabel, value, position in CURVES:
        figure, axes = new_figure(title, xlabel, ylabel)
        for index, method in enumerate(experiment.contenders):
            if runs := experiment.finished(method):
                _curve(axes, runs, value, position, method, index)
        finish(figure, axes)
        figures[title] = name, figure
    figures["Final test accuracy"] = "accuracy_final", _final_accuracy(experiment)
    return figures


def new_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    dress(axes, title, xlabel, ylabel)
    return figure, axes


def row_of_axes(count: int, height: float = 4.0, **options: Any) -> tuple[Figure, list[Axes]]:
    """``count`` axes beside each other."""
    figure, axes = plt.subplots(1, count, figsize=(max(8, 3.6 * count), height), layout="constrained", **options)
    return figure, list(np.atleast_1d(axes))


def dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure: Figure, axes: Axes) -> None:
    """A legend beside the axes: it never covers a curve."""
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=axes.get_xlabel() != "training time (s)"))
    figure.legend(loc="outside right upper", frameon=False, handlelength=3)


PLACES = tuple(
    (x * radius, y * radius, horizontal, vertical)
    for radius in (1.0, 1.7, 2.4)
    for x, y, horizontal, vertical in (
        *((6, -5, "left", "top"), (6, 5, "left", "bottom"), (-6, 5, "right", "bottom"), (-6, -5, "right", "top")),
        *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 10, "center", "bottom"), (0, -10, "center", "top")),
    )
)
"""Where the label of a point may stand: offset in typographic points, alignment; the first that is free is taken."""


def label_points(figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, text, colour) beside the points (x, y), clear of each other and of what has been drawn, as far as
    PLACES allow. The layout of the figure must be final but for the labels."""
    figure.draw_without_rendering()
    drawn = _drawn(axes, figure.dpi / 72)
    taken: list[Bbox] = []
    for x, y, text, colour in labels:
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=9)
        note.set_in_layout(False)
        costs = []
        for place in PLACES:
            _put(note, place)
            box = note.get_window_extent().padded(2)
            outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
            hidden = int(((drawn > box.min) & (drawn < box.max)).all(1).sum())
            costs.append(hidden + 1000 * sum(box.overlaps(other) for other in taken) + 1000 * outside)
        _put(note, PLACES[int(np.argmin(costs))])
        taken.append(note.get_window_extent())


def _put(note: Annotation, place: tuple[float, float, str, str]) -> None:
    note.xyann = place[:2]
    note.set(ha=place[2], va=place[3])


def _drawn(axes: Axes, pixels: float) -> np.ndarray:
    """Points on all lines, markers and error bars of the axes, [n, 2], in pixels; so many in a typographic point."""
    found = []
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        found += [corner + reach for corner in corners for reach in _SQUARE * line.get_markersize() * pixels]
        found += _between(corners) if line.get_linestyle() != "None" else []
    for bars in axes.collections:
        for path in bars.get_paths():
            found += _between(axes.transData.transform(path.vertices))
    return np.array(found).reshape(-1, 2)


_SQUARE = np.stack(np.meshgrid([-0.5, 0, 0.5], [-0.5, 0, 0.5]), -1).reshape(-1, 2)


def _between(corners: np.ndarray) -> list[np.ndarray]:
    """Points every two pixels along a line through the corners."""
    return [point for a, b in pairwise(corners) for point in np.linspace(a, b, 2 + int(np.linalg.norm(b - a) / 2))]


def save(figures: Figures, folder: Path) -> None:
    """As PNG and as SVG; equal figures give equal files."""
    with plt.rc_context({"svg.hashsalt": "looksam"}):
        for stem, figure in figures.values():
            figure.savefig(folder / f"{stem}.png", dpi=150, metadata={"Software": None})
            figure.savefig(folder / f"{stem}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


def _epochs(run: Run) -> list[float]:
    return [float(e.epoch) for e in run.epochs]


def _passes(run: Run) -> list[float]:
    return np.cumsum([e.passes for e in run.epochs]).tolist()


def _seconds(run: Run) -> list[float]:
    return np.cumsum([e.seconds for e in run.epochs]).tolist()


def _accuracy(epoch: EpochRecord) -> float:
    return 100 * epoch.test_accuracy


def _train_loss(epoch: EpochRecord) -> float:
    return math.nan if epoch.train_loss is None else epoch.train_loss


CURVES: tuple[
    tuple[str, str, str, str, Callable[[EpochRecord], float], Callable[[Run], list[float]]], ...
] = (
    ("accuracy_epochs", "Test accuracy by epoch", "epoch", "test accuracy (%)", _accuracy, _epochs),
    ("accuracy_passes", "Test accuracy by work", "forward+backward passes", "test accuracy (%)", _accuracy, _passes),
    ("accuracy_seconds", "Test accuracy by time", "training time (s)", "test accuracy (%)", _accuracy, _seconds),
    ("train_loss", "Training loss", "epoch", "training loss (nats)", _train_loss, _epochs),
)  # fmt: skip
"""File, title, axes, value of an epoch, where a run's epochs stand."""


def _curve(
    axes: Axes,
    runs: Sequence[Run],
    value: Callable[[EpochRecord], float],
    position: Callable[[Run], list[float]],
    method: str,
    index: int,
) -> None:
    """Mean over the seeds, with a band of one standard error where there are several."""
    values = np.array([[value(e) for e in run.epochs] for run in runs])
    x = np.mean([position(run) for run in runs], axis=0)
    look = style(index)
    axes.plot(x, values.mean(0), label=method, linewidth=1.8, marker="o" if len(x) == 1 else None, **look)
    if len(runs) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(runs))
        axes.fill_between(
            x,
            values.mean(0) - error,
            values.mean(0) + error,
            color=str(look["color"]),
            alpha=0.2,
            linewidth=0,
        )


def _final_accuracy(experiment: Experiment) -> Figure:
    methods = [m for m in experiment.contenders if experiment.finished(m)]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * len(methods)), layout="constrained")
    for row, method in enumerate(methods):
        values = experiment.accuracies(method)
        mean, error = mean_and_error(values)
        colour = COLOURS[experiment.contenders.index(method) % len(COLOURS)]
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markeredgewidth=0)
        axes.errorbar(
            mean,
            row,
            xerr=None if math.isnan(error) else error,
            fmt="|",
            color=colour,
            ms=14,
            capsize=4,
            lw=2,
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel("accuracy (%): each seed, mean ± standard error")
    axes.set_title("Final test accuracy", loc="left", fontsize=13)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
