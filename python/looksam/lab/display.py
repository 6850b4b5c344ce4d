"""The events of an experiment: written to its results file and shown on the console as they come."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import Progress, TaskID

from .config import TrainConfig
from .measure import EpochRecord
from .parallel import Event
from .records import ResultsWriter

SECONDS_OF_SILENCE = 30.0


class Display:
    """Writes down and shows the events of the runs: a row for each run under way, above them the count of all. Where the
    console is no terminal, a line for each run that ends, and of an epoch where nothing was said for half a minute."""

    def __init__(self, progress: Progress, console: Console, writer: ResultsWriter, runs: int) -> None:
        self.progress, self.console, self.writer, self.runs = progress, console, writer, runs
        self.failures = self.ended = 0
        self.spoke = self.began = time.monotonic()
        self.last: dict[TrainConfig, EpochRecord] = {}
        self.rows: dict[TrainConfig, TaskID] = {}
        self.overall = progress.add_task("all runs", total=runs, news="", count=f"0/{runs}")

    def show(self, event: Event) -> None:
        config, row = event.config, self.row(event.config)
        if event.part is not None:
            epochs = math.floor(self.progress.tasks[self.progress.task_ids.index(row)].completed)
            self.progress.update(row, completed=epochs + event.part)
        elif event.measurement is not None:
            self.writer.measurement(config.method, config.seed, event.measurement)
        elif event.record is not None:
            record = self.last[config] = event.record
            self.writer.epoch(record)
            count, news = f"{record.epoch}/{config.epochs}", f"{100 * record.test_accuracy:.1f} %"
            self.progress.update(row, completed=record.epoch, count=count, news=news)
            if time.monotonic() - self.spoke > SECONDS_OF_SILENCE:
                self.say(config)
            if record.diverged:
                self.console.print(f"[yellow]{_name(config)} diverged in epoch {record.epoch}[/]")
        else:
            if event.error is not None:
                self.failures += 1
                self.writer.failure(config.method, config.seed, event.error)
                _report_failure(event, self.console)
            self.ended += 1
            self.say(config)
            self.progress.update(self.rows.pop(config), visible=False)
            self.progress.update(self.overall, completed=self.ended, count=f"{self.ended}/{self.runs}")

    def say(self, config: TrainConfig) -> None:
        """A line of how far the run is, where no bar shows it."""
        if self.console.is_terminal:
            return
        self.spoke = time.monotonic()
        record = self.last.get(config)
        news = "" if record is None else f"epoch {record.epoch}/{config.epochs}, {100 * record.test_accuracy:.1f} %, "
        self.console.print(
            f"{_name(config)}: {news}{self.ended}/{self.runs} runs, {self.spoke - self.began:.0f} s{self.time_left()}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    def time_left(self) -> str:
        """Judged by what is done, runs under way included; nothing where that is too little or all."""
        under_way = sum(
            self.last[x].epoch / x.epochs for x in self.rows if x in self.last and self.last[x].epoch < x.epochs
        )
        done = (self.ended + under_way) / self.runs
        if not 0.02 < done < 1:
            return ""
        seconds = (self.spoke - self.began) * (1 / done - 1)
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"

    def row(self, config: TrainConfig) -> TaskID:
        if config not in self.rows:
            self.rows[config] = self.progress.add_task(
                _name(config), total=config.epochs, news="", count=f"0/{config.epochs}"
            )
        return self.rows[config]


def _report_failure(event: Event, console: Console) -> None:
    assert event.error is not None
    console.print(f"[red]{_name(event.config)} failed:[/]")
    console.print(event.error.rstrip(), markup=False, highlight=False)


def _name(config: TrainConfig) -> str:
    return f"{config.method}, seed {config.seed}"
