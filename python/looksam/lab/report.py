"""The final table and the report, made from results.jsonl alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .claims import claims, contender
from .design import Design, design_of
from .document import Block, Bullets, Code, Heading, Picture, Rows, Text, to_html, to_markdown
from .figures import save
from .methods import parse_method
from .records import DamagedResults, Experiment, Summary, read_experiment, summaries

COLUMNS = (
    "method", "accuracy (%)", "passes /step", "runs", "seconds /epoch", "optimizer ms/step", "share (%)", "backend"
)  # fmt: skip
NOTES = """\
Accuracy: final epoch, clean test labels, mean ± standard error over seeds, runs that finished only. Passes: forward
and backward together, counted. Times: median over epochs, training only, with {jobs} run(s) at a time of
{processes} process(es) x {threads} thread(s). Optimizer: time inside `step` outside the passes (ESAM runs its backward
passes there; its second is of fewer samples); share: its part of an epoch's time."""


REPORT = "report.md"


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
        f"{summary.passes_per_step:.2f}",
        runs,
        f"{summary.seconds_per_epoch:.3f}",
        f"{summary.optimizer_ms:.3f}",
        f"{summary.optimizer_share:.1f}",
        summary.backend,
    )


WIDE = Console(width=1000)
"""Measures what a table would like to have."""


def console_table(experiment: Experiment, console: Console) -> Table:
    """The table; where the console is too narrow for it, without the last columns, which the report has."""
    for count in range(len(COLUMNS), 3, -1):
        table = _table(experiment, count)
        if WIDE.measure(table).maximum <= console.width:
            return table
    return _table(experiment, 3)


def _table(experiment: Experiment, count: int) -> Table:
    table = Table(title=experiment.task, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(COLUMNS[:count]):
        heading = column.replace(" ", "\n")  # two lines, so that the table fits into 80 columns
        table.add_column(
            heading, justify="right" if 0 < index < len(COLUMNS) - 1 else "left",
            overflow="fold" if index == 0 else "ellipsis", no_wrap=index > 0,
        )  # fmt: skip
    for summary in summaries(experiment):
        method, *cells = row(summary)
        table.add_row(method.replace(":", ":\n").replace(",", ",\n"), *cells[: count - 1])
    return table


def write_report(folder: Path) -> list[Block]:
    """Draw the figures and write DIR/report.md and DIR/report.html; returns what is in both.

    Raises FileNotFoundError without results.
    """
    experiment = read_experiment(folder)
    blocks = report_blocks(experiment, folder)
    (folder / REPORT).write_text(to_markdown(blocks), encoding="utf-8")
    write_page(folder / "report.html", [(folder, blocks)])
    return blocks


def write_page(path: Path, parts: Sequence[tuple[Path, list[Block]]]) -> None:
    """The reports of several folders as one HTML page."""
    title = next((block.text for block in parts[0][1] if isinstance(block, Heading)), path.name)
    path.write_text(to_html(title, parts), encoding="utf-8")


def report_blocks(experiment: Experiment, folder: Path) -> list[Block]:
    """The report; the figures that it shows are written into the folder."""
    header = experiment.header
    design = _design(header["command"])
    figures = design.figures(experiment)
    save(figures, folder)
    blocks: list[Block] = [Heading(f"looksam {header['command']}: {experiment.task}", 1)]
    blocks.append(Rows(COLUMNS, [row(summary) for summary in summaries(experiment)]))
    if sentences := claims(experiment):
        blocks.append(Bullets(sentences))
    blocks += design.sections(experiment)
    blocks += paired_differences(experiment) + tuning(experiment) + controls(experiment)
    blocks.append(Text(NOTES.format(**{"processes": 1} | header["parallel"])))
    for failure in experiment.failures:
        last = failure["error"].strip().splitlines()[-1]
        blocks.append(Text(f"**Failed: {failure['method']}, seed {failure['seed']}**: {last}"))
    for name, (stem, _) in figures.items():
        blocks += [Heading(name), Picture(name, stem)]
    return blocks + configuration(header)


def _design(command: str) -> Design:
    try:
        return design_of(command)
    except KeyError:
        raise DamagedResults(f"the results are of {command!r}, which is no experiment of this version") from None


def configuration(header: dict[str, Any]) -> list[Block]:
    """All that is needed to do it again."""
    used = header.get("used", {"run": {}, "methods": header["methods"]})
    values = dict(_flatten(header["config"])) | used["run"]
    values = {name: value for name, value in values.items() if value is not None}  # those are the methods', or nobody's
    return [
        Heading("Configuration"),
        Code(header["command_line"]),
        Rows(("option", "value"), [(k, _text(v)) for k, v in values.items()]),
        Text("Seeds: " + ", ".join(map(str, header["seeds"])) + "."),
        Text("The values that each optimizer stepped with, `lr` and `rho` at their peak:"),
        Rows(("method", "values"), [(m, _values(o)) for m, o in used["methods"].items()]),
        Heading("Environment"),
        Rows(("", ""), list(header["environment"].items())),
    ]


def paired_differences(experiment: Experiment) -> list[Block]:
    """Of every two methods, seed by seed. Not for more than eight: nobody reads so many rows."""
    several = [c for method in experiment.contenders if (c := contender(experiment, method)) is not None]
    if not 2 <= len(several) <= 8 or len(several) < len(experiment.contenders):
        return []
    rows = [(a.name, b.name, str(a.minus(b))) for index, a in enumerate(several) for b in several[index + 1 :]]
    return [
        Heading("Differences in accuracy"),
        Text("Paired over the seeds, Student's t; not corrected for their number:"),
        Rows(("first", "second", "first - second"), rows),
    ]


def tuning(experiment: Experiment) -> list[Block]:
    """What ``--tune`` tried and chose."""
    about = experiment.header.get("tuning")
    if not about:
        return []
    rows = [
        (name, _grid(choice["grid"]), _values(choice["settings"]), f"{choice['validation']:.2f}")
        for name, choice in about["chosen"].items()
    ]
    text = (
        f"{about['count']} settings of each method's grid: the defaults, which stand first, and others drawn at random. "
        f"Trained on {100 * (1 - about['holdout']):g} % of the training images with seeds {about['seeds'][0]} to "
        f"{about['seeds'][-1]}; chosen by the accuracy (%) on the rest, with clean labels, after the last epoch. "
        "The accuracies above are of other seeds, on the test images. All that was tried: `tune/report.md`."
    )
    return [Heading("Tuning"), Text(text), Rows(("method", "grid", "chosen", "validation"), rows)]


def controls(experiment: Experiment) -> list[Block]:
    """What the methods that ``--tune`` added say about how LookSAM works."""
    rows = []
    for method, text in experiment.controls.items():
        control = contender(experiment, method)
        for name in experiment.contenders:
            looksam = contender(experiment, name)
            if control and looksam and parse_method(name).variant == "looksam":
                rows.append((text, control.level, str(control.minus(looksam)), name))
    if not rows:
        return []
    return [Heading("Controls"), Rows(("control", "accuracy", "control - LookSAM", "LookSAM"), rows)]


def _grid(grid: dict[str, list[float]]) -> str:
    return "; ".join(f"{name}: {', '.join(f'{value:g}' for value in values)}" for name, values in grid.items())


def _flatten(config: dict[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in config.items():
        items += [(f"{key}.{k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    return items


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _values(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_text(value)}" for name, value in options.items()) or "no options"
