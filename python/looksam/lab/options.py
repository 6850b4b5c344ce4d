"""The options shared by the commands that train, and the configurations they stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from .augment import AUGMENTATIONS
from .config import DataConfig, TrainConfig
from .design import SCALES, Design
from .methods import (
    BASES,
    FORM,
    RUN_OPTIONS,
    VARIANTS,
    canonical_name,
    check_options,
    parse_method,
    parse_value,
    select_options,
)
from .models import MODELS
from .precision import PRECISIONS
from .processes import TORCHRUN, World
from .recipes import RECIPES
from .schedule import SCHEDULES

F = TypeVar("F", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A float range without NaN and infinity, which pass every comparison or none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Count(click.IntRange):
    """A whole number from 1 to ``most``. One that is larger would exhaust the memory or overflow when the run is under way."""

    def __init__(self, most: int = 2**31 - 1) -> None:
        super().__init__(1)
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if number > self.most:
            self.fail(f"{value} is more than {self.most}.", param, ctx)
        return number


FRACTION = Finite(0, 1, max_open=True)
SHARE = Finite(0, 1, min_open=True, max_open=True)
POSITIVE = Finite(0, min_open=True)
NOT_NEGATIVE = Finite(0)
COUNT = Count()
SEEDS = Count(10_000)
SEED = click.IntRange(0, 2**63 - 1)

METHOD_HELP = f"""
METHOD is {FORM}, for example sgd, sam, sam-5 (SAM on every 5th step),
looksam-5:rho=0.1,alpha=0.7, looklayersam-5+lamb, sgd:weight_decay=0.01,nesterov=true.
A method may also have its own {", ".join(RUN_OPTIONS)}.
Base optimizers: {", ".join(BASES)}. Variants: {", ".join(VARIANTS)}.

Several processes share each run under: {TORCHRUN} ...
"""

OPTIONS = (
    click.option(
        "--scale",
        type=click.Choice(SCALES),
        default="laptop",
        help="Values of the options that are left out: for a minute, for half an hour, for a data-centre GPU.",
    ),
    click.option(
        "--recipe", type=click.Choice(list(RECIPES)), help="Methods and usual values for a task of the literature."
    ),
    click.option("--seeds", type=SEEDS, default=4, help="Number of seeds, counted from --seed."),
    click.option("--base", type=click.Choice(list(BASES)), default="sgd", help="Base of methods that name none."),
    click.option(
        "--data",
        default="digits",
        help="digits, fashion-mnist, or a folder or tar file with train/<class>/*.jpg|png and test/<class>/*.jpg|png.",
    ),
    click.option("--data-dir", help="Where Fashion-MNIST lies: the folder that holds FashionMNIST/raw."),
    click.option("--image-size", type=COUNT, help="Resize images of a folder or tar to this many pixels."),
    click.option("--train-size", type=COUNT, help="Train on a fixed random subset of this many images."),
    click.option("--test-size", type=COUNT, help="Test on a fixed random subset of this many images."),
    click.option("--stream", is_flag=True, help="Decode a folder's images as they are needed, not all at the start."),
    click.option("--label-noise", type=FRACTION, default=0.0, help="Part of the training labels made wrong."),
    click.option(
        "--model", type=click.Choice(MODELS), help="Default: cnn for digits and Fashion-MNIST, else resnet18."
    ),
    click.option("--width", type=POSITIVE, default=1.0, help="Factor on the channels of the convolutional models."),
    click.option("--patch", type=COUNT, help="Patch size of the transformers, in pixels."),
    click.option("--epochs", type=COUNT, default=50),
    click.option("--batch-size", type=COUNT, help="Default: 50 for digits, else 128."),
    click.option("--lr", type=POSITIVE, help="Peak learning rate; default by base optimizer (SGD 0.05)."),
    click.option("--momentum", type=FRACTION, default=0.9, help="Of SGD."),
    click.option("--weight-decay", type=NOT_NEGATIVE, help="Default by base optimizer (SGD 5e-4)."),
    click.option("--rho", type=NOT_NEGATIVE, help="Radius of the ascent step; default by method."),
    click.option("--alpha", type=NOT_NEGATIVE, help="Weight of the reused component; default by method."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="[NAME.]OPTION=VALUE",
        help="Any option of the variants and bases, or of one NAME alone: --set looksam.rho=0.1, --set betas=[0.9,0.98].",
    ),
    click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine"),
    click.option("--warmup", type=NOT_NEGATIVE, default=0.0, help="Epochs of linear warm-up."),
    click.option("--rho-warmup", type=NOT_NEGATIVE, default=0.0, help="Epochs in which the radius grows to its value."),
    click.option("--clip", type=POSITIVE, help="Clip the global norm of the update's direction."),
    click.option("--augment", type=click.Choice(AUGMENTATIONS), help="Default: none for digits, else basic."),
    click.option(
        "--randaugment",
        type=(COUNT, Finite(0, 30)),
        default=(2, 9.0),
        metavar="N M",
        help="Operations, strength of 30.",
    ),
    click.option("--mixup", type=NOT_NEGATIVE, default=0.0, help="Parameter of the Beta distribution; 0 is off."),
    click.option(
        "--adversarial", type=FRACTION, default=0.0, help="Train on images attacked within this radius (of 0..1)."
    ),
    click.option("--amp", type=click.Choice(list(PRECISIONS)), help="Mixed precision: autocast; fp16 scales the loss."),
    click.option("--accumulate", type=COUNT, default=1, help="Micro-batches per step; --batch-size is their sum."),
    click.option("--m-sharpness", is_flag=True, help="Under torchrun: each process perturbs along its own gradient."),
    click.option("--fsdp", is_flag=True, help="Under torchrun: shard the parameters (FSDP2) instead of DDP."),
    click.option("--backend", help="Force a backend of looksam_kernels; see looksam info."),
    click.option("--seed", type=SEED, default=0, help="First seed."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    click.option("--threads", type=Count(4096), help="Threads of torch per run; default: cores / jobs."),
    click.option("--jobs", type=COUNT, help="Runs at a time; default: one per core, or 1 on CUDA."),
    click.option("--out", type=click.Path(file_okay=False), help="Results; default: runs/<command>-<time>."),
    click.option("--overwrite", is_flag=True, help="Replace the results in --out."),
    click.option("--checkpoint-every", type=COUNT, metavar="STEPS", help="Checkpoints within epochs too."),
    click.option("--resume", is_flag=True, help="Go on with the experiment in --out, from its checkpoints."),
)


def training_options(function: F) -> F:
    """Add OPTIONS, in their order, to a command."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def parse_options(rho: float | None, alpha: float | None, settings: Sequence[str]) -> dict[str, Any]:
    """``--rho``, ``--alpha`` and ``--set`` as one dict."""
    chosen: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not re.fullmatch(r"(\w+\.)?\w+", key):
            raise click.UsageError(f"--set {setting}: write OPTION=VALUE or NAME.OPTION=VALUE")
        if key in chosen:
            raise click.UsageError(f"--set {setting}: {key} is given twice")
        try:
            chosen[key] = parse_value(text)
        except ValueError as error:
            raise click.UsageError(f"--set {setting}: {error}") from error
    return {k: v for k, v in {"rho": rho, "alpha": alpha}.items() if v is not None} | chosen


def common_config(values: dict[str, Any]) -> TrainConfig:
    """What the runs have in common, but for what a method has for itself."""
    data = DataConfig(
        values["data"], values["data_dir"], values["image_size"], values["train_size"], values["test_size"],
        values["label_noise"], values.get("holdout", 0.0), values["stream"],
    )  # fmt: skip
    same = (
        *("model", "width", "patch", "epochs", "batch_size", "lr", "momentum", "weight_decay", "backend"),
        *("schedule", "warmup", "rho_warmup", "clip", "augment", "randaugment", "mixup", "adversarial", "device"),
        *("amp", "accumulate", "m_sharpness", "fsdp"),
    )
    settings = tuple(values.get("study_settings", {}).items())
    chosen = {name: values[name] for name in same}
    chosen |= {name: values[name] for name in ("pixels", "train") if name in values}
    return TrainConfig("", data=data, study=values.get("study"), settings=settings, **chosen)


def build_configs(methods: Sequence[str], seeds: int, values: dict[str, Any]) -> list[TrainConfig]:
    """One configuration per method and seed, seed by seed, from the values of OPTIONS.

    Raises click.UsageError for a method that does not parse, or is given twice, or an option that nobody takes.
    """
    options = parse_options(values["rho"], values["alpha"], values["settings"])
    try:
        names = [canonical_name(method, values["base"]) for method in methods]
        check_options(names, options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if twice := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"method given twice: {', '.join(sorted(twice))}")
    common = common_config(values)
    return [
        replace(common, method=name, seed=seed, options=select_options(name, options), **parse_method(name).of_the_run)
        for seed in range(values["seed"], values["seed"] + seeds)
        for name in names
    ]


def with_presets(ctx: click.Context, design: Design, values: dict[str, Any]) -> dict[str, Any]:
    """``values``; what the user left out as the recipe has it, else the scale. Raises click.UsageError."""
    recipe = RECIPES[values["recipe"]] if values["recipe"] else {}
    preset = {**design.scales[values["scale"]], **recipe}
    given = {
        name for name in values
        if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    }  # fmt: skip
    for name in given & {"rho", "alpha", "lr", "momentum", "weight_decay"}:
        if any(setting.startswith(f"{name}=") for setting in values["settings"]):
            raise click.UsageError(f"--{name.replace('_', '-')} and --set {name}: give one of them")
    values = values | {name: value for name, value in preset.items() if name not in given}
    if values["data"] is None:
        raise click.UsageError(
            f"--{'recipe ' + values['recipe'] if recipe else 'scale ' + values['scale']} needs images: give --data a "
            "folder or tar file with train/<class>/ and test/<class>/, or --data digits"
        )
    if not values["methods"]:
        raise click.UsageError("Missing argument 'METHOD'.")
    return values


def check_processes(values: dict[str, Any], methods: Sequence[str], world: World) -> None:
    """Raise click.UsageError for options that do not go together with the way the command was started."""
    if not world.started_by_torchrun:
        for name in ("fsdp", "m_sharpness"):
            if values[name]:
                raise click.UsageError(f"--{name.replace('_', '-')} needs several processes; start: {TORCHRUN} ...")
        return
    if values["jobs"] is not None:
        raise click.UsageError("--jobs: under torchrun all processes share one run after the other; leave it out")
    adversarial = values.get("adversarial") or any(parse_method(m).of_the_run.get("adversarial") for m in methods)
    if values["fsdp"] and (values.get("study") or adversarial):
        raise click.UsageError(
            "--fsdp: no process has the whole model, which this experiment and adversarial training need; leave it out"
        )
    if values["m_sharpness"] and values["fsdp"]:
        raise click.UsageError("--m-sharpness needs each process's own gradient, which --fsdp never has; drop one")
    if values["m_sharpness"] and all(parse_method(method).variant is None for method in methods):
        raise click.UsageError(f"--m-sharpness: no method given perturbs; use one of {', '.join(VARIANTS)}")
