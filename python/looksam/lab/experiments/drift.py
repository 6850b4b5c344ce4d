"""``looksam drift``: how fast the parts of SAM's gradient change. Liu et al. 2022."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..design import Design, Figures, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import dress, row_of_axes, style
from ..options import COUNT
from ..records import Experiment

if TYPE_CHECKING:
    from ..train import Trainer

PARTS = ("g_s", "g_h", "g_v")
LABELS = {"g_s": "$g_s$: SAM's gradient", "g_h": "$g_h$: along the gradient g", "g_v": "$g_v$: orthogonal to g"}


def split(g: Tensor, s: Tensor) -> dict[str, Tensor]:
    """SAM's gradient s and its parts along the gradient g and orthogonal to it; g_h is 0 where g is."""
    along = g * torch.where(g.dot(g) > 0, g.dot(s) / g.dot(g), 0)
    return {"g_s": s, "g_h": along, "g_v": s - along}


class Drift:
    """At every ``every``-th step the three vectors are kept, and compared with those of the ``lag`` steps after it."""

    def __init__(self, settings: Values) -> None:
        self.lag: int = settings["lag"]
        self.every = max(settings["every"], self.lag + 1)
        self.step = 0
        self.passes: list[Tensor] = []
        self.kept: dict[str, Tensor] = {}
        self.distances: list[Tensor] = []  # [step, lag, part, absolute | relative] of this epoch, one row at a time

    def after_pass(self, trainer: Trainer) -> None:
        scale = trainer.precision.scaler.get_scale()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trainer.model.parameters()]
        self.passes.append(torch.cat([g.detach().float().flatten() for g in gradients]) / scale)

    def after_step(self, trainer: Trainer) -> None:
        passes, self.passes = self.passes, []
        lag = self.step % self.every
        self.step += 1
        if len(passes) != 2 or lag > self.lag:
            return  # no sharp step, or none that is looked at
        parts = split(*passes)
        if lag == 0:
            self.kept = parts
        elif self.kept:
            moved = torch.stack([(parts[part] - self.kept[part]).norm() for part in PARTS])
            lengths = torch.stack([self.kept[part].norm() for part in PARTS])
            self.distances.append(torch.cat([torch.tensor([float(lag)]).to(moved), moved, moved / lengths]).cpu())

    def after_epoch(self, trainer: Trainer) -> Iterable[dict[str, Any]]:
        """For each lag the median distance, absolute and relative to the length of the vector that was kept: a mean of
        ratios would be that of the few smallest gradients."""
        epoch = len(trainer.records)
        for lag in range(1, self.lag + 1):
            rows = [row[1:].tolist() for row in self.distances if row[0] == lag]
            if rows:
                medians = [statistics.median(column) for column in zip(*rows, strict=True)]
                finite = [value if math.isfinite(value) else None for value in medians]
                yield {
                    "epoch": epoch, "lag": lag, "samples": len(rows),
                    "absolute": dict(zip(PARTS, finite[:3], strict=True)),
                    "relative": dict(zip(PARTS, finite[3:], strict=True)),
                }  # fmt: skip
        self.distances = []

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "kept": self.kept, "distances": self.distances}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.kept, self.distances = state["step"], state["kept"], state["distances"]


def table(experiment: Experiment, method: str, kind: str, key: str) -> dict[int, dict[str, float]]:
    """lag or epoch (``key``) -> part -> mean over the rest, which for epochs is the longest lag alone."""
    found: dict[int, dict[str, list[float]]] = {}
    lag = experiment.settings["lag"]
    for values in experiment.measured(method):
        if key == "epoch" and values["lag"] != lag:
            continue
        for part, value in values[kind].items():
            if value is not None:
                found.setdefault(values[key], {}).setdefault(part, []).append(value)
    return {k: {part: statistics.fmean(values) for part, values in parts.items()} for k, parts in sorted(found.items())}


def figures(experiment: Experiment) -> Figures:
    found: Figures = {}
    for number, method in enumerate(experiment.contenders):
        by_epoch = {kind: table(experiment, method, kind, "epoch") for kind in ("absolute", "relative")}
        by_lag = table(experiment, method, "relative", "lag")
        if not by_lag or not by_epoch["absolute"]:
            continue
        lag = experiment.settings["lag"]
        figure, (left, middle, right) = row_of_axes(3)
        panels = (
            (left, f"‖x(t) - x(t+{lag})‖", "epoch", "distance", by_epoch["absolute"]),
            (middle, f"... / ‖x(t)‖, {lag} steps", "epoch", "relative distance", by_epoch["relative"]),
            (right, "... by steps between", "steps", "relative distance", by_lag),
        )
        for axes, title, xlabel, ylabel, values in panels:
            dress(axes, title, xlabel, ylabel)
            for index, part in enumerate(PARTS):
                x = [key for key, parts in values.items() if part in parts]
                y = np.array([values[key][part] for key in x])
                axes.plot(x, y, label=LABELS[part], marker="o", ms=3, **style(index))
            axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        figure.suptitle(f"{method}: how far the parts of the gradient move", x=0.01, ha="left", fontsize=13)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=3)
        found[f"Drift: {method}"] = f"drift_{number}", figure
    return found


def sections(experiment: Experiment) -> list[Block]:
    """Whether the part that LookSAM reuses is the one that changes least."""
    rows = []
    lag = experiment.settings["lag"]
    for method in experiment.contenders:
        for kind in ("absolute", "relative"):
            values = table(experiment, method, kind, "lag").get(lag)
            if values is None or len(values) < len(PARTS):
                continue
            least = min(values, key=values.__getitem__)
            rows.append((method, kind, *(f"{values[part]:.4g}" for part in PARTS), least))
    note = (
        f"‖x(t) - x(t+{lag})‖, and the same over ‖x(t)‖: the median within each epoch, its mean over epochs and seeds. "
        "g is the gradient at w, g_s that at w + e, g_h its part along g, and g_v the rest, which LookSAM reuses. Vectors "
        "of equal length that have nothing in common are at the relative distance 1.41."
    )
    return [Heading("Drift"), Text(note), Rows(("method", "distance", *PARTS, "moves least"), rows)]


DESIGN = Design(
    name="drift",
    summary="How far SAM's gradient and its parts along and orthogonal to g move in a few steps.",
    scales={
        "smoke": {"methods": ("sam",), "seeds": 1, "epochs": 2, "train_size": 400, "every": 6},
        "laptop": {"methods": ("sam:rho=0.1",), "seeds": 3, "epochs": 20, "every": 6},
        "gpu": {"methods": ("sam:rho=0.1",), "data": None, "seeds": 1, "epochs": 15},
    },
    figures=figures,
    sections=sections,
    options=(
        click.option("--lag", type=COUNT, default=5, help="Steps between the vectors that are compared."),
        click.option("--every", type=COUNT, default=20, help="Steps from one measurement to the next."),
    ),
    settings=("lag", "every"),
    watch=Drift,
)
command = command_of(DESIGN)
