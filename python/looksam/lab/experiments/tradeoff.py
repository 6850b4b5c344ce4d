"""``looksam tradeoff``: accuracy against cost over the period k. Liu et al. 2022."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..design import Design, Figures, Numbers, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import COLOURS, curves, label_points, new_figure
from ..methods import parse_method, with_period
from ..records import Experiment, Run, mean_and_error

METHODS = ("sgd", "sgd:weight_decay=0.08", "sam:rho=0.4", "looksam:rho=0.1,alpha=0.7")
"""rho, alpha and the second weight decay were chosen on the task of the laptop scale, on other seeds, for LookSAM with k = 5."""
NOISY = {"methods": METHODS, "label_noise": 0.4, "warmup": 5.0}
MARKERS = "os^Dvp*X"


def expand(methods: Sequence[str], values: Values) -> list[str]:
    """A SAM or another variant with a period that names none gets every one of ``--periods``; LookSAM not 1, which is SAM."""
    found = []
    for text in methods:
        method = parse_method(text, values["base"])
        named = method.k is not None or "k" in dict(method.settings)
        if method.variant is None or named or "k" not in method.parameters():
            found.append(text)
            continue
        least = 2 if "alpha" in method.parameters() else 1
        found += [with_period(text, k) for k in values["periods"] if k >= least]
    return found


def families(experiment: Experiment) -> dict[str, list[str]]:
    """A method without its period -> its rows, by rising period."""
    found: dict[str, list[str]] = {}
    for name in experiment.contenders:
        if experiment.finished(name):
            method = parse_method(name)
            settings = ", ".join(f"{key} = {value}" for key, value in method.settings)
            family = f"{method.name}{'' if method.base in ('sgd', method.name) else f' over {method.base}'}"
            found.setdefault(f"{family}, {settings}" if settings else family, []).append(name)
    return {family: sorted(names, key=lambda n: parse_method(n).period) for family, names in found.items()}


def passes_per_step(runs: Sequence[Run]) -> float:
    epochs = [epoch for run in runs for epoch in run.epochs]
    return sum(epoch.passes for epoch in epochs) / sum(epoch.steps for epoch in epochs)


def fastest_epoch(runs: Sequence[Run]) -> float:
    """Seconds; other programs on the machine make epochs slower, never faster."""
    return min(epoch.seconds for run in runs for epoch in run.epochs)


def figures(experiment: Experiment) -> Figures:
    if not families(experiment):
        return {}
    images = experiment.header["used"]["run"]["train_images"]
    passes = _figure(experiment, "Accuracy against passes a step", "forward+backward passes a step", passes_per_step)
    speed = _figure(
        experiment, "Accuracy against throughput", "training images a second, in thousands",
        lambda runs: images / fastest_epoch(runs) / 1000,
    )  # fmt: skip
    found: Figures = {
        "Accuracy against passes a step": ("tradeoff_passes", passes),
        "Accuracy against throughput": ("tradeoff_throughput", speed),
    }
    return found | curves(experiment)


def _figure(experiment: Experiment, title: str, xlabel: str, position: Callable[[Sequence[Run]], float]) -> Figure:
    figure, axes = new_figure(f"{title}: {experiment.task}", xlabel, "test accuracy (%), mean ± standard error")
    labels = []
    for index, (family, names) in enumerate(families(experiment).items()):
        labels += _family(axes, experiment, index, family, names, position)
    axes.margins(0.06)
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    label_points(figure, axes, labels)
    return figure


def _family(
    axes: Axes,
    experiment: Experiment,
    index: int,
    family: str,
    names: list[str],
    position: Callable[[Sequence[Run]], float],
) -> list[tuple[float, float, str, str]]:
    """Draws a method over its periods; returns the labels of its points, see :func:`label_points`."""
    colour = COLOURS[index % len(COLOURS)]
    x = [position(experiment.finished(name)) for name in names]
    y, errors = zip(*(mean_and_error(experiment.accuracies(name)) for name in names), strict=True)
    errors = tuple(0.0 if math.isnan(error) else error for error in errors)
    axes.errorbar(
        x, y, errors, color=colour, marker=MARKERS[index % len(MARKERS)], ms=8, lw=1.6, capsize=3, label=family
    )
    if len(names) == 1:
        return []
    return [(px, py, f"k = {parse_method(name).period}", colour) for px, py, name in zip(x, y, names, strict=True)]


def sections(experiment: Experiment) -> list[Block]:
    """What a period costs and saves, beside the base."""
    bases = {
        parse_method(name).base: fastest_epoch(experiment.finished(name))
        for name in reversed(experiment.contenders)
        if parse_method(name).variant is None and experiment.finished(name)
    }
    rows = []
    for names in families(experiment).values():
        for name in names:
            runs = experiment.finished(name)
            base = bases.get(parse_method(name).base)
            rows.append(
                (
                    name, f"{passes_per_step(runs):.2f}", f"{fastest_epoch(runs):.3f}",
                    f"{fastest_epoch(runs) / base:.2f}" if base else "-",
                    f"{statistics.fmean(experiment.accuracies(name)):.2f}",
                )
            )  # fmt: skip
    columns = ("method", "passes /step", "fastest epoch (s)", "times the base's", "accuracy (%)")
    note = "The fastest of all epochs of all seeds: what else the machine does makes epochs slower, never faster."
    return [Heading("Cost"), Text(note), Rows(columns, rows)]


DESIGN = Design(
    name="tradeoff",
    summary="Accuracy against passes and throughput, for every METHOD with each period.",
    scales={
        "smoke": NOISY | {"seeds": 2, "epochs": 2, "warmup": 0.0, "periods": (1, 5), "train_size": 200},
        "laptop": NOISY | {"seeds": 5, "epochs": 50},
        "gpu": {
            "methods": ("sgd", "sam:rho=0.1", "looksam:rho=0.1,alpha=0.7"),
            "data": None, "epochs": 30, "seeds": 3, "amp": "bf16",
        },
    },
    figures=figures,
    sections=sections,
    options=(
        click.option("--periods", type=Numbers(int, 1), default="1,2,5,10,20", help="Of the methods that name none."),
    ),
    expand=expand,
)  # fmt: skip
command = command_of(DESIGN)
