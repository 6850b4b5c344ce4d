"""An experiment: methods x seeds, trained, recorded and reported. The body of ``train`` and ``compare``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .config import TrainConfig
from .console import make_console
from .data import load_dataset
from .environment import cpu_count, environment
from .options import build_configs
from .parallel import Event, run_jobs
from .records import RESULTS, ResultsWriter, read_experiment
from .report import console_table, write_report
from .train import resolve_device


class ExperimentCommand(click.Command):
    """A command that remembers its arguments as typed, for the report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["looksam.arguments"] = list(args)  # parsing empties the list
        return super().parse_args(ctx, args)


def run_experiment(ctx: click.Context, methods: Sequence[str], seeds: int, values: dict[str, Any]) -> None:
    """Train all methods with all seeds and report; ``values`` holds the options. Exits 1 if a run failed, 130 if
    interrupted; what was measured until then is on disk and reported in both cases."""
    command = str(ctx.info_name)
    configs = build_configs(methods, seeds, values)
    folder = output_folder(values["out"], command, values["overwrite"])
    try:
        cuda = resolve_device(values["device"]).type == "cuda"
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    load_dataset(configs[0].data, configs[0].seed)  # decodes and caches here, and fails here if it must
    jobs = min(len(configs), values["jobs"] or (1 if cuda else cpu_count()))
    threads = values["threads"] or max(1, cpu_count() // jobs)
    configs = [replace(config, threads=threads) for config in configs]

    writer = ResultsWriter(folder, header(ctx, configs, jobs, threads))
    console = make_console()
    failures, interrupted = 0, False
    try:
        failures = _train(configs, jobs, writer, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[yellow]interrupted: reporting what was measured so far[/]")
    report(folder, console)
    if failures or interrupted:
        ctx.exit(130 if interrupted else 1)


def report(folder: Path, console: Console) -> None:
    """Write the report; print the table and, as the last line, where the report is."""
    path = write_report(folder)
    console.print(console_table(read_experiment(folder)))
    click.echo(path)  # not wrapped to the width of the terminal: scripts read this line


def output_folder(out: str | None, command: str, overwrite: bool) -> Path:
    folder = Path(out or f"runs/{command}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / RESULTS).exists() and not overwrite:
        raise click.UsageError(f"--out {folder} already holds results; choose another folder or add --overwrite")
    return folder


def header(ctx: click.Context, configs: Sequence[TrainConfig], jobs: int, threads: int) -> dict[str, Any]:
    """The first line of results.jsonl: everything about the experiment that is known before it starts."""
    common = configs[0].to_json()
    for name in ("method", "seed", "options", "threads"):
        del common[name]
    return {
        "command": ctx.info_name,
        "command_line": shlex.join(["looksam", str(ctx.info_name), *ctx.meta["looksam.arguments"]]),
        "methods": {config.method: dict(config.options) for config in configs},
        "seeds": sorted({config.seed for config in configs}),
        "config": common,
        "parallel": {"jobs": jobs, "threads": threads},
        "environment": environment(),
    }


def _train(configs: Sequence[TrainConfig], jobs: int, writer: ResultsWriter, console: Console) -> int:
    """Run everything under one progress display; the number of failed runs."""
    failures = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console) as progress:
        overall = progress.add_task("all runs", total=len(configs), news="")
        rows: dict[TrainConfig, TaskID] = {}
        for event in run_jobs(configs, jobs):
            config = event.config
            if config not in rows:
                rows[config] = progress.add_task(_name(config), total=config.epochs, news="")
            if event.record is not None:
                writer.epoch(event.record)
                progress.update(rows[config], advance=1, news=f"{100 * event.record.test_accuracy:.1f} %")
                if event.record.diverged:
                    console.print(f"[yellow]{_name(config)} diverged in epoch {event.record.epoch}[/]")
                continue
            if event.error is not None:
                failures += 1
                writer.failure(config.method, config.seed, event.error)
                _report_failure(event, console)
            progress.update(rows.pop(config), visible=False)
            progress.advance(overall)
    return failures


def _report_failure(event: Event, console: Console) -> None:
    assert event.error is not None
    console.print(f"[red]{_name(event.config)} failed:[/]")
    console.print(event.error.rstrip(), markup=False, highlight=False)


def _name(config: TrainConfig) -> str:
    return f"{config.method}, seed {config.seed}"
