"""``looksam train``: one method."""

from __future__ import annotations

from typing import Any

import click

from ..experiment import ExperimentCommand, run_experiment
from ..options import METHOD_HELP, training_options


@click.command("train", cls=ExperimentCommand, help="Train a model with METHOD.\n" + METHOD_HELP)
@click.argument("method")
@click.option("--seeds", type=click.IntRange(1), default=1, help="Number of seeds, counted from --seed.")
@training_options
@click.pass_context
def command(ctx: click.Context, /, method: str, seeds: int, **values: Any) -> None:
    run_experiment(ctx, [method], seeds, values)
