"""The same tuning budget for every method: settings from small grids, tried on seeds and a validation part of their own."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .controls import controls_of
from .methods import BASES, Method, canonical_name, parse_method, select_options, with_settings
from .options import parse_options
from .plan import Plan, make_plan, output_folder
from .processes import World
from .records import RESULTS, Experiment, read_experiment

LR_FACTORS = (1.0, 0.25, 0.5, 2.0, 4.0)
"""Of the base's default."""
COUPLED_DECAYS = (5e-4, 5e-3, 0.02, 0.05, 0.08)
DECOUPLED_DECAYS = (0.0, 0.01, 0.05, 0.2, 0.5)
DECOUPLED = ("adamw", "adan", "lamb", "lion")
RHO_FACTORS = (1.0, 2.0, 4.0, 7.0, 10.0)
"""Of the variant's default: 0.05 to 0.5 for SAM."""
ALPHAS = (0.1, 0.2, 0.4, 0.7)
"""The smallest acts less than SAM: a grid without such values leaves LookSAM no weak setting, which the others have."""
FOLDER = "tune"
FIRST_SEED = 1_000_000
"""Tuning runs on seeds from here on, which no experiment with less than a million of them uses."""

Settings = dict[str, Any]


def grid_of(method: Method, given: Settings) -> dict[str, tuple[float, ...]]:
    """The values to try of each option; those that the user gave stay as they are. The first of each is the default."""
    base = BASES[method.base]
    decays = DECOUPLED_DECAYS if method.base in DECOUPLED else COUPLED_DECAYS
    grid = {
        "lr": [round(base.lr * factor, 12) for factor in LR_FACTORS],
        "weight_decay": [base.weight_decay, *decays],
    }
    if "rho" in method.parameters():
        grid["rho"] = [round(method.default("rho") * factor, 12) for factor in RHO_FACTORS]
    if "alpha" in method.parameters():
        grid["alpha"] = [method.default("alpha"), *ALPHAS]
    return {name: tuple(dict.fromkeys(values)) for name, values in grid.items() if name not in given}


def candidates(name: str, given: Settings, count: int, seed: int) -> list[str]:
    """``count`` methods: ``name`` with settings from its grid, the defaults first, the others drawn at random.

    Raises:
        ValueError: the grid has fewer points, so that the methods would not get the same budget.
    """
    method = parse_method(name)
    grid = grid_of(method, given)
    points = list(itertools.product(*grid.values()))
    if count > len(points):
        raise ValueError(f"--tune {count}: {name} has a grid of {len(points)} settings only; give at most that many")
    drawn = [points[0], *random.Random(f"{name} {seed}").sample(points[1:], count - 1)]
    return [with_settings(name, dict(zip(grid, point, strict=True))) for point in drawn]


@dataclass(frozen=True)
class Tuning:
    """Where a tuning runs, for which methods, and what is tried: METHOD -> its candidates."""

    folder: Path
    tried: dict[str, list[str]]
    grids: dict[str, dict[str, tuple[float, ...]]]


def plan_tuning(
    ctx: click.Context, methods: Sequence[str], values: dict[str, Any], world: World
) -> tuple[Plan, Tuning]:
    """The tuning as an experiment of its own in DIR/tune: every candidate is a method, a held-out part is its test part.

    Raises click.UsageError, as for the comparison that follows.
    """
    going_on = values["resume"] and values["out"] is not None and (Path(values["out"]) / FOLDER / RESULTS).exists()
    folder = Path(values["out"]) if going_on else output_folder(
        values["out"], str(ctx.info_name), values["overwrite"], values["resume"]
    )  # fmt: skip
    options = parse_options(values["rho"], values["alpha"], values["settings"])
    fixed = {name: values[name] for name in ("lr", "weight_decay") if values[name] is not None}
    try:
        names = [canonical_name(method, values["base"]) for method in methods]
        if len(set(names)) < len(names):
            raise ValueError("a method is given twice; --tune tries each one's settings by itself")
        given = {name: fixed | dict(select_options(name, options)) for name in names}
        tried = {name: candidates(name, given[name], values["tune"], values["seed"]) for name in names}
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    grids = {name: grid_of(parse_method(name), given[name]) for name in names}
    all_of_them = list(dict.fromkeys(itertools.chain(*tried.values())))
    of_the_tuning = {"out": str(folder / FOLDER), "seed": FIRST_SEED + values["seed"], "holdout": values["validation"]}
    plan = make_plan(ctx, all_of_them, values["tune_seeds"], values | of_the_tuning | {"resume": going_on}, world)
    return plan, Tuning(folder, tried, grids)


def plan_comparison(tuning: Tuning, values: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The chosen methods and their controls, and the values to compare them with on fresh seeds and the test part."""
    experiment = read_experiment(tuning.folder / FOLDER)
    chosen = {name: choice | {"grid": tuning.grids[name]} for name, choice in choose(experiment, tuning.tried).items()}
    methods = list(dict.fromkeys(choice["method"] for choice in chosen.values()))
    for name, choice in chosen.items():
        click.echo(f"{name}: chose {choice['method']}, validation {choice['validation']:.2f} %")
    added = controls(methods, experiment.header["used"]["methods"]) if values["controls"] else {}
    about = {
        "tuning": {
            "count": values["tune"], "seeds": experiment.header["seeds"], "holdout": values["validation"],
            "chosen": chosen,
        },
        "controls": added,
    }  # fmt: skip
    resume = values["resume"] and (tuning.folder / RESULTS).exists()
    return [*methods, *added], values | {"out": str(tuning.folder), "resume": resume, "about": about}


def choose(experiment: Experiment, tried: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Method -> what was chosen among its candidates: the best mean validation accuracy (%) of those of which every run
    finished; the earlier one of equals."""
    chosen = {}
    for name, methods in tried.items():
        scores = {method: _score(experiment, method) for method in methods}
        best = max(methods, key=scores.__getitem__)
        chosen[name] = {
            "method": best,
            "settings": dict(parse_method(best).settings),
            "validation": scores[best],
            "tried": scores,
        }
    return chosen


def _score(experiment: Experiment, method: str) -> float:
    runs = experiment.finished(method)
    if len(runs) < len(experiment.header["seeds"]):
        return -1.0
    return statistics.fmean(100 * run.epochs[-1].test_accuracy for run in runs)


def controls(chosen: Sequence[str], used: dict[str, Settings]) -> dict[str, str]:
    """The controls of the LookSAMs among the chosen methods, but for those that are chosen methods themselves."""
    found: dict[str, str] = {}
    for name in chosen:
        method = parse_method(name)
        if method.variant == "looksam":
            radii = grid_of(Method("sam", method.base), {})["rho"]
            names = controls_of(used[name], method.base, used[name]["k"], radii)
            found |= {with_settings(control, method.of_the_run): text for control, text in names.items()}
    return {canonical_name(name): text for name, text in found.items() if canonical_name(name) not in chosen}
