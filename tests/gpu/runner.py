"""Runs the parts of a list one after the other, each for itself, and sums up what became of them in few lines."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.gpu import tally
from tests.gpu.parts import LISTS, SECONDS, Part
from tests.gpu.toolchain import ROOT, Toolchain

LINES = 60
"""Of a summary, at most."""
SHOWN = 12
"""Lines of the logs of parts that went well, at most."""
KEPT = 3 * 2**20
"""Bytes of the end of each log that the collected one has."""
GRACE = 5.0
"""Seconds between asking a part to end and ending it."""
FAILED = ("failed", "out of time")


class Done(NamedTuple):
    part: Part
    state: str
    """``ok``, ``failed``, ``out of time`` or ``skipped``."""
    seconds: float
    said: str
    """Counts, or why."""
    details: Sequence[str] = ()
    """First failures, the end of the log, or what it has to show."""


class Run:
    """One list of parts.

    Args:
        name: of the list.
        toolchain: what is on this machine.
        folder: of the logs.
        out: a folder that takes the summary, one log of everything and the benchmark's results, or ``None``.
        patience: what all limits are multiplied by.
    """

    def __init__(
        self, name: str, toolchain: Toolchain, folder: Path, out: Path | None = None, patience: float = 1.0
    ) -> None:
        self.name, self.toolchain, self.out, self.patience = name, toolchain, out, patience
        self.folder = folder.absolute() / name
        self.deadline = time.monotonic() + patience * SECONDS
        self.done: list[Done] = []
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def run(self, parts: Sequence[Part] | None = None, say: Callable[[str], None] = print) -> bool:
        """Did all go well? Whatever ends this, what was found so far is written down."""
        try:
            for part in LISTS[self.name] if parts is None else parts:
                say(f"== {part.name}")
                self.done.append(self.one(part))
                say(_line(self.done[-1]))
                self.collect()
        finally:
            self.collect()
        return all(done.state not in FAILED for done in self.done)

    def one(self, part: Part) -> Done:
        if missing := self.toolchain.missing(part.packages, part.tools):
            return Done(part, "skipped", 0, f"{', '.join(missing)} is not here")
        left = self.deadline - time.monotonic()
        if left < 1:
            return Done(part, "out of time", 0, "nothing was left of it")
        before = time.monotonic()
        with self.log(part).open("wb") as log:
            limit = left if part.limit is None else min(left, self.patience * part.limit)
            status = _attend(self.command(part), self.environment(part), log, limit)
        return self.judge(part, status, time.monotonic() - before)

    def command(self, part: Part) -> list[str]:
        known = {"{python}": sys.executable, "{folder}": str(self.folder)}
        arguments = [known.get(x, x) for x in part.arguments]
        if "pytest" in part.arguments:
            arguments += self.options_of_pytest()
        return [part.tools[0] if part.tools and part.arguments[0] != "-m" else sys.executable, *arguments]

    def options_of_pytest(self) -> list[str]:
        """Several processes, and a limit for each test, where the plugins for it are there."""
        options = ["-q", "-p", "tests.gpu.tally", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(self.toolchain.processes)]
        if importlib.util.find_spec("pytest_timeout") is not None:
            options += ["--timeout=60", "--timeout-method=thread"]
        return options

    def environment(self, part: Part) -> dict[str, str]:
        return {**self.toolchain.environment, **dict(part.environment), tally.VARIABLE: str(self.tally(part))}

    def log(self, part: Part) -> Path:
        return self.folder / f"{part.name.replace(' ', '-')}.log"

    def tally(self, part: Part) -> Path:
        return self.log(part).with_suffix(".jsonl")

    def judge(self, part: Part, status: int | None, seconds: float) -> Done:
        counted = tally.read(self.tally(part))
        lines = [x for x in self.log(part).read_text(errors="replace").splitlines() if x.strip()]
        shown = [x.strip() for x in lines if part.shows and re.search(part.shows, x)]
        if status == 0 and not counted.failures:
            return Done(part, "ok", seconds, str(counted), shown)
        ended = "" if status is None else _ending(status)
        said = ", ".join(filter(None, (str(counted), ended)))
        details = counted.failures or [*shown, "its log ends:", *lines[-8:]]
        return Done(part, "out of time" if status is None else "failed", seconds, said, details)

    def collect(self) -> None:
        """The summary, and in ``out`` one log of all, so that few files have to travel."""
        text = self.summary() + "\n"
        (self.folder / "summary.txt").write_text(text)
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"gpu-{self.name}.txt").write_text(text)
        with (self.out / f"gpu-{self.name}.log").open("wb") as whole:
            for done in self.done:
                whole.write(f"\n==== {done.part.name}: {done.state}, {done.said}\n".encode())
                if self.log(done.part).exists():
                    whole.write(_end_of(self.log(done.part)))
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.md")):
            shutil.copy(path, self.out / path.name)

    def summary(self) -> str:
        """At most :data:`LINES` lines: each part, and the first failures of each that failed, fairly shared."""
        head = [f"gpu-{self.name}", *str(self.toolchain).splitlines()]
        foot = [f"logs: {self.folder.relative_to(ROOT) if self.folder.is_relative_to(ROOT) else self.folder}"]
        room = LINES - len(head) - len(foot) - len(self.done)
        failed = [done for done in self.done if done.state in FAILED]
        share = (room - min(SHOWN, sum(len(d.details) for d in self.done if d.state == "ok"))) // max(1, len(failed))
        shown = SHOWN
        body = []
        for done in self.done:
            body.append(_line(done))
            if done.state in FAILED:
                details = list(done.details[:share])
                if len(done.details) > share > 0:
                    details[-1] = f"... and {len(done.details) - share + 1} more"
            else:
                details, shown = list(done.details[:shown]), shown - len(done.details[:shown])
            body += [f"    {x[:150]}" for x in details]
        return "\n".join([*head, *body, *foot])


def _line(done: Done) -> str:
    state = done.state.upper() if done.state in FAILED else done.state
    return f"{state:<11} {done.part.name:<16} {done.seconds:5.0f} s  {done.said}".rstrip()


def _ending(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return {0: "", 5: "no test was run"}.get(status, f"exit status {status}")


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - KEPT))
        return file.read()


def _attend(command: Sequence[str], environment: dict[str, str], log: object, limit: float) -> int | None:
    """Runs a command in a process group of its own, none of which outlives it. Its exit status; ``None``: out of time."""
    try:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        os.write(log.fileno(), f"{command[0]}: {error}\n".encode())
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
