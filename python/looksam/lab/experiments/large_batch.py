"""``looksam large-batch``: LAMB and the variants over it, over growing batches. Liu et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from matplotlib.axes import Axes

from ..claims import difference_of
from ..design import Design, Figures, Numbers, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import dress, row_of_axes, style
from ..methods import BASES, parse_method, with_settings
from ..records import Experiment, mean_and_error

METHODS = ("lamb", "sam+lamb", "looksam-5+lamb", "layersam+lamb", "looklayersam-5+lamb")
TUNED = (
    "lamb:lr=0.0025,weight_decay=0.01",
    "sam+lamb:lr=0.0025,rho=0.05,weight_decay=0.01",
    "looksam-5+lamb:lr=0.01,weight_decay=0.01,rho=0.2,alpha=0.5",
    "layersam+lamb:lr=0.00125,weight_decay=0.0,rho=0.5",
    "looklayersam-5+lamb:lr=0.005,weight_decay=0.0,rho=0.05,alpha=0.5",
    "looklayersam-5+lamb:layer_scale=trust,lr=0.000625,weight_decay=0.0,rho=0.2,alpha=0.3",
    "looklayersam-5+lamb:layer_scale=trust_global,lr=0.005,weight_decay=0.2,rho=0.05,alpha=0.3",
    "looklayersam-5+lamb:layer_scale=unit,lr=0.000625,weight_decay=0.0,rho=0.35,alpha=0.3",
)
"""With the settings that ``looksam compare --tune 12`` chose for each on the task of the laptop scale with batches of 200, on
seeds and a validation part of their own (docs/results.md). The learning rates are those of batches of 50."""
STRONG: dict[str, Any] = {"augment": "randaugment", "mixup": 0.2}
AUGMENTED: dict[str, tuple[dict[str, Any], ...]] = {"plain": ({},), "strong": (STRONG,), "both": ({}, STRONG)}
POWERS = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
MOVING = ("batch_size", "lr", "warmup", *STRONG)
"""The settings that differ along a line of the figure, and between its panels."""


def expand(methods: Sequence[str], values: Values) -> list[str]:
    """Each method with each batch size, with the learning rate scaled and the warm-up longer as the batch grows."""
    batches = values["batches"]
    found = []
    for augmentation in AUGMENTED[values["augmentation"]]:
        for text in methods:
            method = parse_method(text, values["base"])
            settings = dict(method.settings)
            base_lr = settings.pop("lr", None) or values["lr"] or BASES[method.base].lr
            for batch in batches:
                times = batch / batches[0]
                warmup = min(values["warmup"] * times, values["epochs"] / 2)
                new: dict[str, Any] = {
                    "batch_size": batch, "lr": float(f"{base_lr * times ** POWERS[values['lr_scaling']]:.4g}"),
                    "warmup": float(f"{warmup:.4g}"),
                }  # fmt: skip
                new |= augmentation
                if twice := [name for name in new if name in settings]:
                    raise click.UsageError(f"large-batch chooses {', '.join(twice)} of {text}; leave it out there")
                found.append(with_settings(text.partition(":")[0], settings | new))
    return found


def lines(experiment: Experiment) -> dict[bool, dict[str, dict[int, str]]]:
    """Strong augmentation? -> family, a method over all batches -> batch -> its contender, of those that finished a run.

    The contenders stand in the order of :func:`expand`: where the batches begin anew, there begins another family.
    """
    found: dict[bool, dict[str, dict[int, str]]] = {}
    batch, family = math.inf, ""
    for name in experiment.contenders:
        settings = dict(parse_method(name).settings)
        panel = found.setdefault("mixup" in settings, {})
        if settings["batch_size"] <= batch:
            kept = {key: value for key, value in settings.items() if key not in MOVING}
            family = with_settings(name.partition(":")[0], kept)
            if family in panel:  # they differ in their learning rate alone
                family = with_settings(name.partition(":")[0], kept | {"lr": settings["lr"]})
        batch = settings["batch_size"]
        families = panel.setdefault(family, {})
        if experiment.finished(name):
            families[batch] = name
    return {
        strong: kept
        for strong, panel in found.items()
        if (kept := {family: batches for family, batches in panel.items() if batches})
    }


def figures(experiment: Experiment) -> Figures:
    panels = lines(experiment)
    if not panels:
        return {}
    figure, axes = row_of_axes(len(panels), 4.5, sharey=True)
    for panel, (strong, families) in zip(axes, panels.items(), strict=True):
        _panel(experiment, panel, "With RandAugment and Mixup" if strong else "Without RandAugment and Mixup", families)
    axes[0].set_ylabel("test accuracy (%), mean ± standard error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2, fontsize=9)
    return {"Accuracy against the batch size": ("large_batch", figure)}


def _panel(experiment: Experiment, axes: Axes, title: str, families: dict[str, dict[int, str]]) -> None:
    dress(axes, title, "batch size", "")
    labels = _labels(list(families))
    for index, (family, batches) in enumerate(families.items()):
        means, errors = zip(*(mean_and_error(experiment.accuracies(name)) for name in batches.values()), strict=True)
        axes.errorbar(
            list(batches), means, np.nan_to_num(errors), marker="o", ms=4, capsize=2, label=labels[family],
            **style(index),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = sorted({batch for batches in families.values() for batch in batches})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _labels(families: list[str]) -> dict[str, str]:
    """What the legend calls them: their settings, which the table has, are left out if they do not tell them apart."""
    short = {}
    for family in families:
        scale = dict(parse_method(family).settings).get("layer_scale")
        short[family] = family.partition(":")[0] + (f", {scale}" if scale else "")
    return short if len(set(short.values())) == len(short) else dict(zip(families, families, strict=True))


def sections(experiment: Experiment) -> list[Block]:
    """The table of the figure, and which reading of ``layer_scale`` is best."""
    blocks: list[Block] = [Heading("Batch sizes")]
    for strong, families in lines(experiment).items():
        batches = sorted({batch for found in families.values() for batch in found})
        rows = [
            (family, *(_cell(experiment.accuracies(found[batch])) if batch in found else "-" for batch in batches))
            for family, found in families.items()
        ]
        blocks.append(Text("With RandAugment and Mixup:" if strong else "Final accuracy (%):"))
        blocks.append(Rows(("method", *map(str, batches)), rows))
        blocks += [Text(text) for text in _best_scale(experiment, families)]
    return blocks


def _cell(accuracies: list[float]) -> str:
    mean, error = mean_and_error(accuracies)
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def _best_scale(experiment: Experiment, families: dict[str, dict[int, str]]) -> list[str]:
    """Where several readings of ``layer_scale`` were run with all batches and seeds: the mean of each over the batches, and
    whether the highest is shown to be above the others, seed by seed."""
    count = max(map(len, families.values()))
    found: dict[str, dict[int, float]] = {}
    for name, batches in families.items():
        method = parse_method(name)
        if method.variant == "looklayersam" and len(batches) == count:
            runs = [
                {run.seed: run.epochs[-1].test_accuracy for run in experiment.finished(m)} for m in batches.values()
            ]
            if all(len(of_seed) == len(experiment.header["seeds"]) for of_seed in runs):
                scale = dict(method.settings).get("layer_scale", method.default("layer_scale"))
                means = {seed: 100 * float(np.mean([of_seed[seed] for of_seed in runs])) for seed in runs[0]}
                found[scale] = max(found.get(scale, means), means, key=lambda values: sum(values.values()))
    if len(found) < 2:
        return []
    best, *others = sorted(found, key=lambda scale: -sum(found[scale].values()))
    level = _cell(list(found[best].values()))
    if len(experiment.header["seeds"]) < 2:
        return [f"`layer_scale`: `{best}` has the highest accuracy, {level} % over all batches, by a single seed."]
    differences = {s: difference_of([found[best][seed] - found[s][seed] for seed in found[s]]) for s in others}
    listed = "; ".join(f"from `{scale}` {difference}" for scale, difference in differences.items())
    if all(difference.low > 0 for difference in differences.values()):
        return [f"`layer_scale`: `{best}` is best, {level} % over all batches; {listed}."]
    return [
        f"`layer_scale`: `{best}` has the highest mean, {level} % over all batches, not shown to be best: {listed}."
    ]


DESIGN = Design(
    name="large-batch",
    summary="Each METHOD over growing batches, with warm-up and a scaled learning rate.",
    scales={
        "smoke": {
            "methods": ("lamb", "looklayersam-5+lamb", "looklayersam-5+lamb:layer_scale=trust"),
            "seeds": 1, "epochs": 2, "warmup": 0.25,
            "train_size": 200, "batches": (20, 50), "augmentation": "both",
        },
        "laptop": {
            "methods": TUNED, "label_noise": 0.4, "seeds": 5, "epochs": 30, "warmup": 1.25, "base": "lamb",
        },
        "gpu": {
            "methods": METHODS, "data": None, "model": "vit-tiny", "seeds": 1, "epochs": 20, "warmup": 1.0,
            "amp": "bf16", "batches": (256, 1024, 4096), "augmentation": "both",
        },
    },
    figures=figures,
    sections=sections,
    options=(
        click.option("--batches", type=Numbers(int, 1), default="50,100,200,500", help="The batch sizes."),
        click.option(
            "--lr-scaling", type=click.Choice(list(POWERS)), default="sqrt",
            help="How the learning rate grows with the batch; that of the smallest is --lr.",
        ),
        click.option(
            "--augmentation", type=click.Choice(list(AUGMENTED)), default="plain",
            help="strong: RandAugment and Mixup.",
        ),
    ),
    expand=expand,
)  # fmt: skip
command = command_of(DESIGN)
