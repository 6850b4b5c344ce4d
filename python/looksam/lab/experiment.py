"""An experiment: methods x seeds, trained, measured, recorded and reported. The body of every command that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .claims import claims
from .console import make_console
from .design import Design
from .display import Display
from .document import Block
from .options import METHOD_HELP, training_options, with_presets
from .parallel import describe, run_here, run_jobs
from .plan import Plan, make_plan, resume_command
from .pretrained import with_weights
from .processes import World, joined
from .records import ResultsWriter, read_experiment
from .report import REPORT, console_table, write_report
from .tuning import plan_comparison, plan_tuning


class ExperimentCommand(click.Command):
    """A command that remembers its arguments as typed, for the report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["looksam.arguments"] = list(args)  # parsing empties the list
        return super().parse_args(ctx, args)


def command_of(design: Design) -> click.Command:
    """The command that runs a design and reports it."""

    @click.pass_context
    def callback(ctx: click.Context, /, **values: Any) -> None:
        values = with_weights(ctx, with_presets(ctx, design, values))
        if design.measure or design.watch:
            values |= {"study": design.name, "study_settings": {name: values[name] for name in design.settings}}
        try:
            methods = design.expand(values["methods"], values)
        except ValueError as error:  # of a method that does not parse
            raise click.UsageError(str(error)) from error
        run_experiment(ctx, methods, values["seeds"], values)

    function: Callable[..., Any] = training_options(callback)
    for option in (*reversed(design.options), click.argument("methods", nargs=-1, metavar="[METHOD]...")):
        function = option(function)
    return click.command(design.name, cls=ExperimentCommand, help=f"{design.summary}\n{METHOD_HELP}")(function)


def run_experiment(ctx: click.Context, methods: Sequence[str], seeds: int, values: dict[str, Any]) -> None:
    """Train all methods with all seeds and report; ``values`` holds the options. Exits 1 if a run failed, 130 if
    interrupted; what was measured until then is on disk and reported in both cases."""
    with joined() as world:
        if values.get("tune"):
            methods, values = _tuned(ctx, methods, values, world)
        plan = world.from_first(partial(make_plan, ctx, methods, seeds, values, world))
        status = _carry_out(plan, world)
    if status:
        ctx.exit(status)


def _carry_out(plan: Plan, world: World) -> int:
    """Train, record, report; the exit status."""
    if world.rank > 0:  # the first process writes and prints for all
        for config in plan.configs:
            run_here(config, lambda event: None, plan.checkpoints, world)
        return 0
    console = make_console()
    status = 0
    try:
        try:
            status = 1 if _train(plan, world, ResultsWriter(plan.folder, plan.header), console) else 0
        except KeyboardInterrupt:
            status = 130
            console.print("[yellow]interrupted: reporting what was measured so far[/]")
        report(plan.folder, console)
    except OSError as error:  # a full disk; each record is on it before the next run begins
        raise click.ClickException(
            f"{describe(error)}; what was measured before is kept. Go on with: {resume_command(plan.header)}"
        ) from error
    return status


def _tuned(
    ctx: click.Context, methods: Sequence[str], values: dict[str, Any], world: World
) -> tuple[Sequence[str], dict[str, Any]]:
    """Choose the settings of each method, in DIR/tune; the methods and values of the comparison that follows."""
    plan, tuning = world.from_first(partial(plan_tuning, ctx, methods, values, world))
    if status := _carry_out(plan, world):
        ctx.exit(status)
    return world.from_first(partial(plan_comparison, tuning, values))


def report(folder: Path, console: Console) -> list[Block]:
    """Write the report, and return it; print the table and, as the last line, where the report is."""
    blocks = write_report(folder)
    experiment = read_experiment(folder)
    if experiment.runs:
        console.print(console_table(experiment, console))
    for sentence in claims(experiment):
        console.print(sentence, markup=False, highlight=False)
    click.echo(folder / REPORT)  # not wrapped to the width of the terminal: scripts read this line
    return blocks


def _train(plan: Plan, world: World, writer: ResultsWriter, console: Console) -> int:
    """Run everything under one progress display; the number of failed runs."""
    bar = BarColumn(bar_width=min(40, console.width // 4))
    times = TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), bar, TextColumn("{task.fields[count]}"), *times)
    with Progress(
        *columns, TextColumn("{task.fields[news]}"), console=console, disable=not console.is_terminal
    ) as progress:
        display = Display(progress, console, writer, len(plan.configs))
        if world.started_by_torchrun:
            for config in plan.configs:  # one that fails ends all: the other processes wait for this one
                run_here(config, display.show, plan.checkpoints, world)
        else:
            with closing(run_jobs(plan.configs, plan.jobs, plan.checkpoints)) as events:  # its processes end with it
                for event in events:
                    display.show(event)
    return display.failures
