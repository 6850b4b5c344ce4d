"""``looksam compare``: several methods on the same task with the same seeds."""

from __future__ import annotations

from typing import Any

import click

from ..experiment import ExperimentCommand, run_experiment
from ..options import METHOD_HELP, SHARE, training_options


@click.command("compare", cls=ExperimentCommand, help="Train with each METHOD and compare.\n" + METHOD_HELP)
@click.argument("methods", nargs=-1, required=True, metavar="METHOD...")
@click.option("--seeds", type=click.IntRange(1), default=4, help="Number of seeds, counted from --seed.")
@click.option(
    "--tune",
    type=click.IntRange(1),
    metavar="N",
    help="First try N settings of lr, weight decay, rho and alpha for each method, on seeds and a validation part of "
    "their own; then compare the best of each on --seeds and the test part.",
)
@click.option("--tune-seeds", type=click.IntRange(1), default=2, help="Seeds of each setting that --tune tries.")
@click.option("--validation", type=SHARE, default=0.2, help="Part of the training images that --tune holds out.")
@click.option("--controls/--no-controls", default=True, help="After --tune: add what LookSAM has to be better than.")
@training_options
@click.pass_context
def command(ctx: click.Context, /, methods: tuple[str, ...], seeds: int, **values: Any) -> None:
    run_experiment(ctx, methods, seeds, values)
