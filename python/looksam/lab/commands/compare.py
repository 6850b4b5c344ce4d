"""``looksam compare``: several methods on the same task with the same seeds."""

from __future__ import annotations

from typing import Any

import click

from ..experiment import ExperimentCommand, run_experiment
from ..options import METHOD_HELP, training_options


@click.command("compare", cls=ExperimentCommand, help="Train with each METHOD and compare.\n" + METHOD_HELP)
@click.argument("methods", nargs=-1, required=True, metavar="METHOD...")
@click.option("--seeds", type=click.IntRange(1), default=4, help="Number of seeds, counted from --seed.")
@training_options
@click.pass_context
def command(ctx: click.Context, /, methods: tuple[str, ...], seeds: int, **values: Any) -> None:
    run_experiment(ctx, methods, seeds, values)
