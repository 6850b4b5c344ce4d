"""The file results.jsonl: one JSON object a line, appended as results come, and all that a report is made from.

Lines have a ``kind``: "header" (first line: command, methods, configuration, environment), "epoch" (an EpochRecord),
"measurement" (method, seed, and values that the experiment's design names) or "failure" (method, seed, error).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .files import replacing
from .measure import EpochRecord

RESULTS = "results.jsonl"


class ResultsWriter:
    """Begins DIR/results.jsonl anew with the header, then appends each line as it comes: an interrupted experiment keeps
    what it measured."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.path = folder / RESULTS
        with replacing(self.path) as file:
            file.write(json.dumps({"kind": "header"} | header).encode() + b"\n")

    def epoch(self, record: EpochRecord) -> None:
        self._append({"kind": "epoch"} | asdict(record))

    def measurement(self, method: str, seed: int, values: dict[str, Any]) -> None:
        self._append({"kind": "measurement", "method": method, "seed": seed, "values": values})

    def failure(self, method: str, seed: int, error: str) -> None:
        self._append({"kind": "failure", "method": method, "seed": seed, "error": error})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class Run:
    """The epochs of one method and seed, and what its study measured."""

    method: str
    seed: int
    epochs: list[EpochRecord] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return self.epochs[-1].diverged


@dataclass
class Experiment:
    """A results file read back. ``runs`` keeps the methods in the order in which the user named them."""

    header: dict[str, Any]
    runs: list[Run]
    failures: list[dict[str, Any]]

    @property
    def methods(self) -> list[str]:
        return list(self.header["methods"])

    @property
    def task(self) -> str:
        """What was trained on, in a few words."""
        config = self.header["config"]
        noise = f", {100 * config['data']['label_noise']:g} % label noise" if config["data"]["label_noise"] else ""
        length = f", {config['epochs']} epochs" if config.get("train", True) else ""
        return f"{Path(config['data']['source']).name}{noise}{length}"

    @property
    def controls(self) -> dict[str, str]:
        """METHOD -> what it controls for, of those that ``--tune`` added."""
        return dict(self.header.get("controls", {}))

    @property
    def contenders(self) -> list[str]:
        """The methods that the user asked for: no controls."""
        return [method for method in self.methods if method not in self.controls]

    def finished(self, method: str) -> list[Run]:
        """The runs of a method that reached the last epoch with a finite loss."""
        epochs = self.header["config"]["epochs"]
        return [r for r in self.runs if r.method == method and len(r.epochs) == epochs and not r.diverged]

    def started(self, method: str) -> list[Run]:
        return [r for r in self.runs if r.method == method]

    def accuracies(self, method: str) -> list[float]:
        """Of the last epoch, in percent, of the runs that finished."""
        return [100 * run.epochs[-1].test_accuracy for run in self.finished(method)]

    def measured(self, method: str) -> list[dict[str, Any]]:
        """What was measured in the runs that finished, run after run."""
        return [values for run in self.finished(method) for values in run.measurements]

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the experiment's design."""
        return dict(self.header["config"].get("settings", {}))


def read_header(folder: Path) -> dict[str, Any]:
    """The first line alone: the others can be had again from the checkpoints. Raises DamagedResults."""
    with (folder / RESULTS).open("rb") as file:
        try:
            header: dict[str, Any] = json.loads(file.readline())
            if header.pop("kind") != "header":
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedResults(
                f"{folder / RESULTS} does not begin with a header line; nothing can go on from it"
            ) from error
    return header


class DamagedResults(ValueError):
    """A results file that is not what :class:`ResultsWriter` writes; the message says where and what helps."""


def read_experiment(folder: Path) -> Experiment:
    """Read DIR/results.jsonl; a last line cut short by a crash is left out.

    Raises:
        DamagedResults: another line cannot be read, or the first one is not a header.
    """
    path = folder / RESULTS
    lines = path.read_bytes().splitlines()
    header: dict[str, Any] = {}
    runs: dict[tuple[str, int], Run] = {}
    failures = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            kind = line.pop("kind")
            if (number == 1) != (kind == "header"):
                raise ValueError(kind)
            if kind == "header":
                header = {
                    "seeds": line["seeds"],
                    "methods": dict(line["methods"]),
                    "config": dict(line["config"]),
                } | line
            elif kind == "epoch":
                record = EpochRecord(**line)
                if record.method not in header["methods"]:
                    raise ValueError(record.method)
                runs.setdefault((record.method, record.seed), Run(record.method, record.seed)).epochs.append(record)
            elif kind == "measurement":
                runs[line["method"], line["seed"]].measurements.append(dict(line["values"]))
            else:
                failures.append({name: line[name] for name in ("method", "seed", "error")})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if 1 < number == len(lines):
                break
            raise DamagedResults(
                f"{path}: line {number} is damaged; remove the line, or let the command go on with --resume, "
                "which has all records in its checkpoints"
                if number > 1
                else f"{path} does not begin with a header line; no report can be made of it"
            ) from error
    if not header:
        raise DamagedResults(f"{path} is empty; start the experiment again with --overwrite")
    methods = list(header["methods"])
    ordered = sorted(runs.values(), key=lambda run: (methods.index(run.method), run.seed))
    return Experiment(header, ordered, failures)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the error is NaN for fewer than two values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


@dataclass(frozen=True)
class Summary:
    """A line of the final table. Accuracies in percent, of the final epoch, over the runs that finished.

    Times are medians over all epochs of all runs: the first epoch's allocations do not count.
    """

    method: str
    finished: int
    started: int
    diverged: int
    accuracy: float
    accuracy_error: float
    passes_per_step: float
    seconds_per_epoch: float
    optimizer_ms: float
    optimizer_share: float
    backend: str


def summarize(experiment: Experiment, method: str) -> Summary | None:
    """The summary of a method, None if none of its runs got through an epoch."""
    runs = experiment.started(method)
    if not runs:
        return None
    finished = experiment.finished(method)
    accuracies = experiment.accuracies(method)
    accuracy, error = mean_and_error(accuracies) if accuracies else (math.nan, math.nan)
    epochs = [epoch for run in runs for epoch in run.epochs]
    return Summary(
        method,
        len(finished),
        len(runs),
        sum(run.diverged for run in runs),
        accuracy,
        error,
        sum(e.passes for e in epochs) / max(1, sum(e.steps for e in epochs)),
        statistics.median(e.seconds for e in epochs),
        statistics.median(1000 * e.optimizer_seconds / max(1, e.steps) for e in epochs),
        statistics.median(100 * e.optimizer_seconds / e.seconds if e.seconds else 0.0 for e in epochs),
        epochs[-1].backend,
    )


def summaries(experiment: Experiment) -> list[Summary]:
    return [s for s in (summarize(experiment, m) for m in experiment.methods) if s is not None]
