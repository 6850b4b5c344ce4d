"""``looksam landscape``: how flat the minima are that the methods find."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import pretrained
from ..config import make_generator
from ..design import Design, Figures, Numbers, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import COLOURS, new_figure, style
from ..options import COUNT, POSITIVE
from ..records import Experiment, mean_and_error
from ..streaming import in_memory

if TYPE_CHECKING:
    from ..train import Trainer

METHODS = ("sgd", "sgd:weight_decay=0.08", "sam:rho=0.4", "looksam-5:rho=0.1,alpha=0.7")


def measure(trainer: Trainer, settings: Values) -> Iterable[dict[str, Any]]:
    """On the first training images, with the labels that were trained on. The directions depend on the seed alone."""
    from ..sharpness import (
        filter_normalised,
        hessian_product,
        line,
        loss_of,
        mean_on_sphere,
        plane,
        top_eigenvalues,
        worst_in_ball,
    )

    count = settings["images"]
    x = (in_memory(trainer.train_x[:count]).to(trainer.device).float() / 255 - trainer.mean) / trainer.std
    generator = make_generator(trainer.config.seed, "landscape")
    radii = settings["radii"]
    with loss_of(trainer.model, x, trainer.train_y[:count]) as (loss, weights):
        directions = filter_normalised(weights, generator), filter_normalised(weights, generator)
        positions = np.linspace(-settings["extent"], settings["extent"], settings["points"]).tolist()
        yield {"kind": "line", "positions": positions, "loss": _finite(line(loss, weights, directions[0], positions))}
        rows = plane(loss, weights, directions, positions)
        yield {"kind": "plane", "positions": positions, "loss": [_finite(row) for row in rows]}
        yield {
            "kind": "ball", "radii": list(radii), "loss": _finite([float(loss(weights).detach())])[0],
            "worst": _finite([worst_in_ball(loss, weights, rho) for rho in radii]),
            "mean": _finite([mean_on_sphere(loss, weights, rho, generator) for rho in radii]),
        }  # fmt: skip
        product = hessian_product(loss, weights)
        values = top_eigenvalues(product, weights, settings["eigenvalues"], settings["iterations"], generator)
        yield {"kind": "eigenvalues", "values": _finite(values)}


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=float)  # None becomes NaN


def found(experiment: Experiment, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Method -> the measurements of this kind, one of each run."""
    all_of_them = {m: [v for v in experiment.measured(m) if v["kind"] == kind] for m in experiment.contenders}
    return {method: values for method, values in all_of_them.items() if values}


def figures(experiment: Experiment) -> Figures:
    if not found(experiment, "line"):
        return {}
    figures: Figures = {
        "Loss along a random direction": ("landscape_line", _lines(experiment)),
        "Loss over a plane, contours": ("landscape_contour", _contours(experiment)),
        "Loss over a plane": ("landscape_surface", _surfaces(experiment)),
        "Rise of the loss in the ρ-ball": ("landscape_ball", _balls(experiment)),
        "Largest eigenvalues of the Hessian": ("landscape_eigenvalues", _eigenvalues(experiment)),
    }
    return figures


def _lines(experiment: Experiment) -> Figure:
    figure, axes = new_figure(
        "Loss along a filter-normalised direction", "distance, in lengths of the filters", "training loss (nats)"
    )
    for index, (method, values) in enumerate(found(experiment, "line").items()):
        losses = _array([value["loss"] for value in values])
        axes.plot(values[0]["positions"], losses.mean(0), label=pretrained.label(experiment, method), **style(index))
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    return figure


def _planes(experiment: Experiment) -> tuple[dict[str, dict[str, Any]], np.ndarray]:
    """The plane of each method's first run; levels for all of them, each half as high again as the one before."""
    planes = {method: values[0] for method, values in found(experiment, "plane").items()}
    losses = np.concatenate([_array(value["loss"]).ravel() for value in planes.values()])
    low, high = max(1e-3, np.nanmin(losses)), max(2e-3, np.nanmax(losses))
    return planes, np.geomspace(low, high * 1.001, 12)


def _title(experiment: Experiment, method: str) -> str:
    return pretrained.label(experiment, method).replace(":", "\n", 1)


def _contours(experiment: Experiment) -> Figure:
    planes, levels = _planes(experiment)
    figure, panels = plt.subplots(
        1, len(planes), figsize=(max(8, 3 * len(planes)), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (method, value) in zip(panels[0], planes.items(), strict=True):
        losses = _array(value["loss"]).clip(levels[0], levels[-1])
        shown = axes.contourf(value["positions"], value["positions"], losses, levels, norm="log", cmap="cividis")
        axes.contour(value["positions"], value["positions"], losses, levels, colors="white", linewidths=0.5)
        axes.plot(0, 0, "+", color="white", ms=9)
        axes.set_title(_title(experiment, method), loc="left", fontsize=10)
        axes.set_aspect("equal")
        axes.set_xlabel("first direction")
    panels[0][0].set_ylabel("second direction")
    bar = figure.colorbar(shown, ax=panels, label="training loss (nats)", shrink=0.8)
    bar.set_ticks(levels[::2].tolist(), labels=[f"{level:.2g}" for level in levels[::2]])
    bar.minorticks_off()
    return figure


def _surfaces(experiment: Experiment) -> Figure:
    planes, levels = _planes(experiment)
    figure, panels = plt.subplots(
        1, len(planes), figsize=(max(8, 3 * len(planes)), 3.8), layout="constrained",
        subplot_kw={"projection": "3d"}, squeeze=False,
    )  # fmt: skip
    for axes, (method, value) in zip(panels[0], planes.items(), strict=True):
        a, b = np.meshgrid(value["positions"], value["positions"])
        axes.plot_surface(a, b, _array(value["loss"]), cmap="cividis", vmin=levels[0], vmax=levels[-1])
        axes.set_zlim(0, levels[-1])
        axes.set_title(_title(experiment, method), fontsize=10)
        extent = value["positions"][-1]
        axes.set_xticks([-extent, 0, extent])
        axes.set_yticks([-extent, 0, extent])
        axes.tick_params(labelsize=8)
    figure.suptitle("Training loss (nats) over two filter-normalised directions", x=0.01, ha="left", fontsize=13)
    return figure


def _balls(experiment: Experiment) -> Figure:
    figure, axes = new_figure("Rise of the training loss in the ρ-ball", "radius ρ", "loss - loss at the centre (nats)")
    for index, (method, values) in enumerate(found(experiment, "ball").items()):
        centre = _array([value["loss"] for value in values])[:, None]
        for kind, opacity in (("worst", 1.0), ("mean", 0.45)):
            rise = (_array([value[kind] for value in values]) - centre).mean(0)
            axes.plot(
                values[0]["radii"], rise, marker="o", ms=4, alpha=opacity,
                label=f"{pretrained.label(experiment, method)}: {'worst' if kind == 'worst' else 'mean on the sphere'}",
                color=COLOURS[index % len(COLOURS)], linestyle="-" if kind == "worst" else "--",
            )  # fmt: skip
    axes.set_xscale("log")
    radii = experiment.settings["radii"]
    axes.set_xticks(radii, [f"{rho:g}" for rho in radii])
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=1e-2)
    axes.set_ylim(bottom=min(0.0, axes.dataLim.ymin))
    figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=9)
    return figure


def _eigenvalues(experiment: Experiment) -> Figure:
    figure, axes = new_figure("Largest eigenvalues of the Hessian", "number", "eigenvalue")
    for index, (method, values) in enumerate(found(experiment, "eigenvalues").items()):
        count = min(len(value["values"]) for value in values)
        means = _array([value["values"][:count] for value in values]).mean(0)
        axes.plot(
            range(1, count + 1), means, marker="o", ms=5, label=pretrained.label(experiment, method), **style(index)
        )
    axes.set_ylim(bottom=min(0.0, axes.dataLim.ymin))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    return figure


def sections(experiment: Experiment) -> list[Block]:
    balls, eigenvalues = found(experiment, "ball"), found(experiment, "eigenvalues")
    rho = experiment.settings["radii"]
    middle = len(rho) // 2
    rows = []
    for method, values in balls.items():
        values = [value for value in values if value["loss"] is not None]
        rise = [value["worst"][middle] - value["loss"] for value in values if value["worst"][middle] is not None]
        largest = [value["values"][0] for value in eigenvalues.get(method, []) if value["values"][0] is not None]
        rows.append(
            (
                pretrained.label(experiment, method),
                _spread([value["loss"] for value in values]),
                _spread(rise),
                _spread(largest),
            )
        )
    columns = ("method", "training loss", f"worst rise within ρ = {rho[middle]:g}", "largest eigenvalue")
    note = (
        "In evaluation mode, on training images with the labels that were trained on; mean ± standard error over seeds. "
        "Directions are filter-normalised (Li et al. 2018), the worst loss is found by ten projected ascent steps, "
        "eigenvalues by Lanczos."
    )
    return [Heading("Flatness"), Text(note), Rows(columns, rows)]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} ± {error:.2g}"


NOISY = {"methods": METHODS, "label_noise": 0.4}
DESIGN = Design(
    name="landscape",
    summary="Loss surfaces, sharpness in the rho-ball and Hessian eigenvalues of what each METHOD finds.",
    scales={
        "smoke": NOISY | {
            "methods": ("sgd", "sam:rho=0.1"), "seeds": 1, "epochs": 2, "train_size": 200, "points": 5, "images": 100,
            "radii": (0.05, 0.2), "iterations": 8, "eigenvalues": 3,
        },
        "laptop": NOISY | {"seeds": 3, "epochs": 50, "warmup": 5.0},
        "gpu": {
            "methods": ("sgd", "sam:rho=0.1", "looksam-5:rho=0.1,alpha=0.7"),
            "data": None, "seeds": 1, "epochs": 30, "amp": "bf16", "points": 25, "images": 5000,
        },
    },
    figures=figures,
    sections=sections,
    options=(
        *pretrained.OPTIONS,
        click.option("--points", type=click.IntRange(3, 1000), default=13, help="Of the surfaces, along each direction."),
        click.option("--extent", type=POSITIVE, default=1.0, help="How far they go."),
        click.option("--images", type=COUNT, default=1000, help="Training images that the loss is of."),
        click.option("--radii", type=Numbers(), default="0.05,0.1,0.2,0.5", help="Of the balls."),
        click.option("--eigenvalues", type=COUNT, default=10, help="How many of the Hessian."),
        click.option("--iterations", type=COUNT, default=40, help="Of Lanczos."),
    ),
    settings=("points", "extent", "images", "radii", "eigenvalues", "iterations"),
    measure=measure,
)  # fmt: skip
command = command_of(DESIGN)
