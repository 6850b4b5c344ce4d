"""``looksam sensitivity``: accuracy over alpha and rho. Liu et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..design import Design, Figures, Numbers, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import dress, row_of_axes, style
from ..methods import parse_method, with_settings
from ..records import Experiment, mean_and_error

METHODS = ("looksam-5", "looklayersam-5+lamb")
NOISY = {"methods": METHODS, "label_noise": 0.4}


def expand(methods: Sequence[str], values: Values) -> list[str]:
    """Each method with each alpha and rho, of those that it takes."""
    found = []
    for text in methods:
        method = parse_method(text, values["base"])
        if "rho" not in method.parameters():
            raise click.UsageError(f"sensitivity: {text} has no radius rho; give a sharpness-aware METHOD")
        alphas = values["alphas"] if "alpha" in method.parameters() else (None,)
        for alpha in alphas:
            for rho in values["rhos"]:
                found.append(with_settings(text, ({} if alpha is None else {"alpha": alpha}) | {"rho": rho}))
    return found


def grids(experiment: Experiment) -> dict[str, dict[tuple[float, float], tuple[float, float]]]:
    """A method without alpha and rho -> {(alpha, rho): (mean accuracy, its error)}; alpha is NaN where there is none."""
    found: dict[str, dict[tuple[float, float], tuple[float, float]]] = {}
    for name in experiment.contenders:
        settings = dict(parse_method(name).settings)
        point = float(settings.pop("alpha", math.nan)), float(settings.pop("rho"))
        family = with_settings(name.partition(":")[0], settings)
        accuracies = experiment.accuracies(name)
        found.setdefault(family, {})[point] = mean_and_error(accuracies) if accuracies else (math.nan, math.nan)
    return found


def figures(experiment: Experiment) -> Figures:
    found: Figures = {}
    for index, (family, grid) in enumerate(grids(experiment).items()):
        if all(math.isnan(mean) for mean, _ in grid.values()):
            continue
        found[f"Accuracy over alpha and rho: {family}"] = f"sensitivity_{index}", _figure(family, grid)
    return found


def _figure(family: str, grid: dict[tuple[float, float], tuple[float, float]]) -> Figure:
    alphas, rhos = (sorted({point[axis] for point in grid}) for axis in (0, 1))
    if len(alphas) == 1:
        figure, (axes,) = row_of_axes(1)
        _lines(axes, f"{family}: over ρ", "ρ", {"": [(rho, *grid[alphas[0], rho]) for rho in rhos]})
        return figure
    figure, (left, middle, right) = row_of_axes(3, width_ratios=(1, 1, 1.1))
    _lines(left, "Over α", "α", {f"ρ = {rho:g}": [(alpha, *grid[alpha, rho]) for alpha in alphas] for rho in rhos})
    _lines(middle, "Over ρ", "ρ", {f"α = {alpha:g}": [(rho, *grid[alpha, rho]) for rho in rhos] for alpha in alphas})
    middle.set_xscale("log")
    middle.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    middle.minorticks_off()
    means = np.array([[grid[alpha, rho][0] for rho in rhos] for alpha in alphas])
    _heat_map(right, means, alphas, rhos)
    figure.suptitle(f"{family}: test accuracy over α and ρ", x=0.01, ha="left", fontsize=13)
    return figure


def _lines(axes: Axes, title: str, xlabel: str, lines: dict[str, list[tuple[float, float, float]]]) -> None:
    dress(axes, title, xlabel, "test accuracy (%)")
    for index, (label, points) in enumerate(lines.items()):
        x, mean, error = np.array(points).T
        axes.errorbar(
            x,
            mean,
            np.nan_to_num(error),
            label=label,
            marker="o",
            ms=4,
            capsize=2,
            **style(index),
        )
    if len(lines) > 1:
        # Below the axes: inside, it would cover an error bar.
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _heat_map(axes: Axes, means: np.ndarray, alphas: Sequence[float], rhos: Sequence[float]) -> None:
    axes.imshow(means, cmap="cividis", aspect="auto", origin="lower")
    axes.set_title("Mean (%)", loc="left", fontsize=13)
    axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
    axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_xlabel("ρ")
    axes.set_ylabel("α")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), mean in np.ndenumerate(means):
        text = "-" if math.isnan(mean) else f"{mean:.1f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if mean < middle else "black", fontsize=9)


def sections(experiment: Experiment) -> list[Block]:
    """The best point of each grid, and how far one may be off."""
    rows = []
    for family, grid in grids(experiment).items():
        points = {point: value for point, value in grid.items() if not math.isnan(value[0])}
        if not points:
            continue
        best, (mean, error) = max(points.items(), key=lambda item: item[1][0])
        near = sum(value[0] >= mean - 1 for value in points.values())
        spread = "" if math.isnan(error) else f" ± {error:.2f}"
        alpha = "" if math.isnan(best[0]) else f"α = {best[0]:g}, "
        rows.append((family, f"{alpha}ρ = {best[1]:g}", f"{mean:.2f}{spread}", f"{near} of {len(grid)}"))
    note = (
        "The best point is chosen on the test images, so that its accuracy is too high by what chance adds; "
        "`looksam compare --tune` chooses on images of its own."
    )
    columns = ("method", "best point", "accuracy (%)", "points within 1 % of it")
    return [Heading("Sensitivity"), Text(note), Rows(columns, rows)]


DESIGN = Design(
    name="sensitivity",
    summary="Accuracy of each METHOD over alpha and rho.",
    scales={
        "smoke": NOISY | {"seeds": 1, "epochs": 1, "alphas": (0.3, 0.7), "rhos": (0.05, 0.2), "train_size": 200},
        "laptop": NOISY | {"seeds": 3, "epochs": 30, "warmup": 3.0},
        "gpu": {"methods": METHODS, "data": None, "epochs": 15, "seeds": 2, "amp": "bf16"},
    },
    figures=figures,
    sections=sections,
    options=(
        click.option("--alphas", type=Numbers(), default="0.1,0.3,0.5,0.7,1", help="The values of alpha."),
        click.option("--rhos", type=Numbers(), default="0.05,0.1,0.2,0.4", help="The values of rho."),
    ),
    expand=expand,
)
command = command_of(DESIGN)
