"""The final table and report.md, made from results.jsonl alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .figures import draw_figures
from .records import Experiment, Summary, read_experiment, summaries

COLUMNS = (
    "method", "accuracy (%)", "runs", "passes /step", "seconds /epoch", "optimizer ms/step", "share (%)", "backend"
)  # fmt: skip
NOTES = """\
Accuracy: final epoch, clean test labels, mean ± standard error over seeds, runs that finished only. Passes: forward
and backward together, counted. Times: median over epochs, training only, with {jobs} run(s) at a time of
{processes} process(es) x {threads} thread(s). Optimizer: time inside `step` outside the passes (ESAM runs its backward
passes there; its second is of fewer samples); share: its part of an epoch's time."""


def row(summary: Summary) -> tuple[str, ...]:
    """The cells of a summary, in the order of COLUMNS."""
    accuracy = f"{summary.accuracy:.2f}"
    if math.isnan(summary.accuracy):
        accuracy = "-"
    elif not math.isnan(summary.accuracy_error):
        accuracy += f" ± {summary.accuracy_error:.2f}"
    runs = f"{summary.finished}/{summary.started}" + (f", {summary.diverged} diverged" if summary.diverged else "")
    return (
        summary.method,
        accuracy,
        runs,
        f"{summary.passes_per_step:.2f}",
        f"{summary.seconds_per_epoch:.3f}",
        f"{summary.optimizer_ms:.3f}",
        f"{summary.optimizer_share:.1f}",
        summary.backend,
    )


def console_table(experiment: Experiment) -> Table:
    table = Table(title=title(experiment), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(COLUMNS):
        heading = column.replace(" ", "\n")  # two lines, so that the table fits into 80 columns
        table.add_column(heading, justify="right" if 0 < index < len(COLUMNS) - 1 else "left")
    for summary in summaries(experiment):
        table.add_row(*row(summary))
    return table


def title(experiment: Experiment) -> str:
    config = experiment.header["config"]
    noise = f", {100 * config['data']['label_noise']:g} % label noise" if config["data"]["label_noise"] else ""
    return f"{Path(config['data']['source']).name}{noise}, {config['epochs']} epochs"


def write_report(folder: Path) -> Path:
    """Draw the figures and write DIR/report.md; returns its path. Raises FileNotFoundError without results."""
    experiment = read_experiment(folder)
    header = experiment.header
    figures = draw_figures(experiment, folder)
    lines = [f"# looksam {header['command']}: {title(experiment)}", ""]
    lines += markdown_table(COLUMNS, [row(summary) for summary in summaries(experiment)])
    lines += ["", NOTES.format(**{"processes": 1} | header["parallel"]), ""]
    for failure in experiment.failures:
        last = failure["error"].strip().splitlines()[-1]
        lines += [f"**Failed: {failure['method']}, seed {failure['seed']}**: {last}", ""]
    for name, path in figures.items():
        lines += [f"## {name}", "", f"![{name}]({path.name})", ""]
    lines += ["## Configuration", "", "```", header["command_line"], "```", ""]
    lines += markdown_table(("option", "value"), [(k, _text(v)) for k, v in _flatten(header["config"])])
    lines += ["", "Seeds: " + ", ".join(map(str, header["seeds"])) + ".", ""]
    lines += ["Options of the optimizers, where not their defaults:", ""]
    lines += markdown_table(("method", "options"), [(m, _text(o)) for m, o in header["methods"].items()])
    lines += ["", "## Environment", ""]
    lines += markdown_table(("", ""), list(header["environment"].items()))
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), line(("---",) * len(columns)), *map(line, rows)]


def _flatten(config: dict[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in config.items():
        items += [(f"{key}.{k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    return items


def _text(value: Any) -> str:
    if value is None:
        return "default"
    return value if isinstance(value, str) else json.dumps(value)
