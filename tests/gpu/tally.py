"""A pytest plugin, and what it leaves: one line a test, written when the test is done, so that a run that is stopped counts too.

A process whose CUDA context an error has spoilt fails every test from then on. It ends itself, and pytest-xdist starts
another: what else fails has reasons of its own.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

VARIABLE = "LOOKSAM_GPU_TALLY"
"""Names the file."""


class Tally(NamedTuple):
    counts: Counter[str]
    """Of passed, failed, skipped."""
    failures: list[str]
    """Each a test and the first line of the reason, in the order in which they failed."""

    def __str__(self) -> str:
        return ", ".join(
            f"{self.counts[name]:,} {name}" for name in ("passed", "failed", "skipped") if self.counts[name]
        )


def read(path: Path) -> Tally:
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        test, outcome, why = json.loads(line)
        if outcome == "failed":
            failures.setdefault(test, why)
        if outcomes.get(test) != "failed":
            outcomes[test] = outcome
    return Tally(Counter(outcomes.values()), [f"{test}: {why}" for test, why in failures.items()])


class Plugin:
    """Of one process. xdist's environment variable does not tell a worker: whatever runs in a worker inherits it."""

    def __init__(self, worker: bool) -> None:
        self.worker = worker

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.worker:
            if report.when == "call" or not report.passed:
                _write(report.nodeid, report.outcome, report.longrepr)
        elif report.failed and context_is_spoilt():
            os._exit(3)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not self.worker and report.failed:
            _write(report.nodeid, report.outcome, report.longrepr)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(worker=hasattr(config, "workerinput")))


def _write(test: str, outcome: str, why: Any) -> None:
    crash = getattr(why, "reprcrash", None)
    text = crash.message if crash is not None else str(why or "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps([test, outcome, lines[0 if crash is not None else -1][:300] if lines else ""]) + "\n")


def context_is_spoilt() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # the second: torch has no CUDA at all
        return torch.cuda.is_available()
    return False
