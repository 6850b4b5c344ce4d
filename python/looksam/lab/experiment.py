"""An experiment: methods x seeds, trained, recorded and reported. The body of ``train`` and ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .console import make_console
from .display import Display
from .parallel import run_here, run_jobs
from .plan import Plan, make_plan
from .processes import World, joined
from .records import ResultsWriter, read_experiment
from .report import console_table, write_report


class ExperimentCommand(click.Command):
    """A command that remembers its arguments as typed, for the report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["looksam.arguments"] = list(args)  # parsing empties the list
        return super().parse_args(ctx, args)


def run_experiment(ctx: click.Context, methods: Sequence[str], seeds: int, values: dict[str, Any]) -> None:
    """Train all methods with all seeds and report; ``values`` holds the options. Exits 1 if a run failed, 130 if
    interrupted; what was measured until then is on disk and reported in both cases."""
    with joined() as world:
        plan = world.from_first(partial(make_plan, ctx, methods, seeds, values, world))
        if world.rank > 0:  # the first process writes and prints for all
            for config in plan.configs:
                run_here(config, lambda event: None, plan.checkpoints, world)
            return
        writer = ResultsWriter(plan.folder, plan.header)
        console = make_console()
        failures, interrupted = 0, False
        try:
            failures = _train(plan, world, writer, console)
        except KeyboardInterrupt:
            interrupted = True
            console.print("[yellow]interrupted: reporting what was measured so far[/]")
        report(plan.folder, console)
    if failures or interrupted:
        ctx.exit(130 if interrupted else 1)


def report(folder: Path, console: Console) -> None:
    """Write the report; print the table and, as the last line, where the report is."""
    path = write_report(folder)
    console.print(console_table(read_experiment(folder)))
    click.echo(path)  # not wrapped to the width of the terminal: scripts read this line


def _train(plan: Plan, world: World, writer: ResultsWriter, console: Console) -> int:
    """Run everything under one progress display; the number of failed runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console) as progress:
        display = Display(progress, console, writer, len(plan.configs))
        if world.started_by_torchrun:
            for config in plan.configs:  # one that fails ends all: the other processes wait for this one
                run_here(config, display.show, plan.checkpoints, world)
        else:
            for event in run_jobs(plan.configs, plan.jobs, plan.checkpoints):
                display.show(event)
    return display.failures
