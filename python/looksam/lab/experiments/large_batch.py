"""``looksam large-batch``: LAMB and the variants over it, over growing batches. Liu et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from matplotlib.axes import Axes

from ..design import Design, Figures, Numbers, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import dress, row_of_axes, style
from ..methods import BASES, parse_method, with_settings
from ..records import Experiment, mean_and_error

METHODS = ("lamb", "sam+lamb", "looksam-5+lamb", "layersam+lamb", "looklayersam-5+lamb")
SCALES_OF_LAYERS = tuple(f"looklayersam-5+lamb:layer_scale={scale}" for scale in ("trust", "trust_global", "unit"))
"""The other readings of Look-LayerSAM's perturbation; its default is "trust_normalized"."""
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


def lines(experiment: Experiment) -> dict[bool, dict[str, dict[int, list[float]]]]:
    """Strong augmentation? -> method -> batch -> final accuracies."""
    found: dict[bool, dict[str, dict[int, list[float]]]] = {}
    for name in experiment.contenders:
        settings = dict(parse_method(name).settings)
        kept = {key: value for key, value in settings.items() if key not in MOVING}
        family = with_settings(name.partition(":")[0], kept)
        panel = found.setdefault("mixup" in settings, {})
        if accuracies := experiment.accuracies(name):
            panel.setdefault(family, {})[settings["batch_size"]] = accuracies
    return {strong: families for strong, families in found.items() if families}


def figures(experiment: Experiment) -> Figures:
    panels = lines(experiment)
    if not panels:
        return {}
    figure, axes = row_of_axes(len(panels), 4.5, sharey=True)
    for panel, (strong, families) in zip(axes, panels.items(), strict=True):
        _panel(panel, "With RandAugment and Mixup" if strong else "Without RandAugment and Mixup", families)
    axes[0].set_ylabel("test accuracy (%), mean ± standard error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2, fontsize=9)
    return {"Accuracy against the batch size": ("large_batch", figure)}


def _panel(axes: Axes, title: str, families: dict[str, dict[int, list[float]]]) -> None:
    dress(axes, title, "batch size", "")
    for index, (family, batches) in enumerate(families.items()):
        means, errors = zip(*map(mean_and_error, batches.values()), strict=True)
        axes.errorbar(
            list(batches), means, np.nan_to_num(errors), marker="o", ms=4, capsize=2, label=family,
            **style(index),  # type: ignore[arg-type]
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = sorted({batch for batches in families.values() for batch in batches})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def sections(experiment: Experiment) -> list[Block]:
    """The table of the figure, and which reading of ``layer_scale`` is best."""
    blocks: list[Block] = [Heading("Batch sizes")]
    for strong, families in lines(experiment).items():
        batches = sorted({batch for found in families.values() for batch in found})
        rows = [(family, *(_cell(found.get(batch, [])) for batch in batches)) for family, found in families.items()]
        blocks.append(Text("With RandAugment and Mixup:" if strong else "Final accuracy (%):"))
        blocks.append(Rows(("method", *map(str, batches)), rows))
        blocks += [Text(text) for text in _best_scale(families)]
    return blocks


def _cell(accuracies: list[float]) -> str:
    if not accuracies:
        return "-"
    mean, error = mean_and_error(accuracies)
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def _best_scale(families: dict[str, dict[int, list[float]]]) -> list[str]:
    """One sentence, where several readings were run: the best mean over the batches and how far behind the others are."""
    means = {
        str(dict(parse_method(name).settings).get("layer_scale", parse_method(name).default("layer_scale"))): float(
            np.mean([np.mean(accuracies) for accuracies in batches.values()])
        )
        for name, batches in families.items()
        if parse_method(name).variant == "looklayersam"
    }
    if len(means) < 2:
        return []
    ranked = sorted(means.items(), key=lambda item: -item[1])
    others = ", ".join(f"`{scale}` {mean:.2f}" for scale, mean in ranked[1:])
    return [f"`layer_scale`: `{ranked[0][0]}` is best, {ranked[0][1]:.2f} % over all batches; {others}."]


DESIGN = Design(
    name="large-batch",
    summary="Each METHOD over growing batches, with warm-up and a scaled learning rate.",
    scales={
        "smoke": {
            "methods": ("lamb", "looklayersam-5+lamb", SCALES_OF_LAYERS[0]), "seeds": 1, "epochs": 2, "warmup": 0.25,
            "train_size": 200, "batches": (20, 50), "augmentation": "both",
        },
        "laptop": {"methods": METHODS + SCALES_OF_LAYERS, "seeds": 3, "epochs": 30, "warmup": 1.0, "base": "lamb"},
        "gpu": {
            "methods": METHODS, "data": None, "model": "vit-tiny", "seeds": 1, "epochs": 20, "warmup": 1.0,
            "amp": "bf16", "batches": (256, 1024, 4096), "augmentation": "both",
        },
    },
    figures=figures,
    sections=sections,
    options=(
        click.option("--batches", type=Numbers(int, 1), default="50,100,250,500", help="The batch sizes."),
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
