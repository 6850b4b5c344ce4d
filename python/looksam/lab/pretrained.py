"""``--weights FILE``: experiments that measure trained models can take files in place of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .design import Numbers
from .methods import parse_method
from .records import Experiment

OPTIONS = (
    click.option(
        "--weights",
        multiple=True,
        metavar="FILE",
        help="Measure the model of --model with the weights in FILE, a state_dict (.pt, .pth or .safetensors), in place of "
        "training METHODs. May be given several times.",
    ),
    click.option(
        "--pixel-mean", type=Numbers(), help="With --weights: what was subtracted from pixels of 0..1 in training."
    ),
    click.option(
        "--pixel-std", type=Numbers(), help="And what they were divided by; default: those of the training images."
    ),
)
TRAINING = (
    *("methods", "recipe", "base", "epochs", "lr", "momentum", "weight_decay", "rho", "alpha", "settings", "schedule"),
    *(
        "warmup",
        "rho_warmup",
        "clip",
        "augment",
        "randaugment",
        "mixup",
        "adversarial",
        "accumulate",
        "m_sharpness",
        "fsdp",
    ),
)
"""What has no effect where nothing is trained."""


def with_weights(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """``values``; if they name files of weights, these in place of the methods, clean labels and one seed unless the user
    gives others. Raises click.UsageError."""

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)

    mean, std = values.get("pixel_mean"), values.get("pixel_std")
    if not values.get("weights"):
        if mean is not None or std is not None:
            raise click.UsageError("--pixel-mean, --pixel-std: only with --weights; models trained here have their own")
        return values
    if idle := [name for name in TRAINING if given(name)]:
        names = ", ".join("METHOD" if name == "methods" else f"--{name.replace('_', '-')}" for name in idle)
        raise click.UsageError(f"{names}: no effect with --weights, which trains nothing; leave it out")
    if (mean is None) != (std is None):
        raise click.UsageError("--pixel-mean and --pixel-std: give both or none")
    if std is not None and not all(std):
        raise click.UsageError("--pixel-std 0: pixels cannot be divided by it")
    unlike = {name: default for name, default in (("label_noise", 0.0), ("seeds", 1)) if not given(name)}
    return values | unlike | {
        "methods": tuple(f"sgd:weights={file}" for file in values["weights"]),
        "epochs": 1, "warmup": 0.0, "train": False, "pixels": None if mean is None else (mean, std),
    }  # fmt: skip


def label(experiment: Experiment, method: str) -> str:
    """How figures call a contender: its file, if it was not trained here."""
    if experiment.header["config"].get("train", True):
        return method
    return Path(parse_method(method).of_the_run["weights"]).name
