"""``python -m benchmarks``: measures, prints, and writes one result file and the table made from it."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine, peers, report, timing
from benchmarks.cases import OPS, STEPS, Arena, Case, Run
from benchmarks.peers import PEERS, YARDSTICK, Missing
from benchmarks.shapes import LISTS, ON_DEMAND

COPY = "copy"
COMPILED = "torch.compile AdamW"
LARGE = 2**20
"""Parameters above which a list is about bandwidth and measured with cold caches; below, about overhead, with warm ones."""
Record = dict[str, Any]


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    usual = ",".join(name for name in LISTS if name not in ON_DEMAND)
    add("--shapes", default=usual, help=f"parameter lists (%(default)s; also: {', '.join(ON_DEMAND)})")
    add("--only", default="", help="cases whose name contains this, such as 'LookSAM' or 'step'")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--backend", help="native, triton or reference; default: the fastest that is there")
    add("--threads", type=int, default=2, help="CPU threads, the same for all contenders (%(default)s)")
    add("--minutes", type=float, default=9.0, help="time for everything, divided among the rounds (%(default)s)")
    add("--seconds", type=float, help="measuring time of each round of contenders, in place of --minutes")
    add("--repeat", type=int, default=5, help="turns of each round at least (%(default)s)")
    add("--compile", default="vit-s", help="lists where torch.compile competes: a minute or two each (%(default)s)")
    add("--memory", type=float, default=6.0, help="GB that the contenders of one round may hold (%(default)s)")
    add("--alone", action="store_true", help="no peers but torch's fused AdamW")
    add("--out", type=Path, help="folder of the result file and its table (benchmarks/results)")
    add("--quick", action="store_true", help="ResNet-18 and the overhead only, few turns, no torch.compile, no file")
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds, args.repeat, args.compile = 0.5, 3, ""
        args.shapes = "resnet-18,tiny" if args.shapes == parser.get_default("shapes") else args.shapes
    args.shapes, args.compile = ([s for s in x.split(",") if s] for x in (args.shapes, args.compile))
    if unknown := sorted({*args.shapes, *args.compile} - set(LISTS)):
        parser.error(f"no such list: {', '.join(unknown)}; choose from {', '.join(LISTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    begin = time.monotonic()
    bench = Bench(args, console)
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(args.device),
        "versions": machine.versions(),
        "revision": machine.revision(),
        "options": {
            name: getattr(args, name) for name in ("device", "threads", "minutes", "seconds", "repeat", "compile")
        },
        "copy_gb_s": bench.copy_bandwidth(),
        "measured": [record for name in args.shapes for record in bench.measure_list(name)],
        "missing": bench.missing,
    }
    report.show(result, console)
    console.print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    if args.out or not args.quick:
        for path in write(result, args.out or Path(__file__).parent / "results"):
            console.print(f"wrote {path.name}")


def write(result: Record, folder: Path) -> tuple[Path, Path]:
    """The figures as JSON, and the table that report makes from it alone.

    A file of the same day, revision and machine keeps what was not measured again: a long run may come in pieces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result['machine']['slug']}-{result['date']}"
    data, table = folder / f"{stem}.json", folder / f"{stem}.md"
    if data.exists():
        result = together(json.loads(data.read_text()), result)
    data.write_text(json.dumps(result, indent=1) + "\n")
    table.write_text(report.markdown(json.loads(data.read_text())))
    return data, table


def together(earlier: Record, now: Record) -> Record:
    """The earlier result with the records of now in place of its own, if both measured the same thing."""
    if any(earlier[key] != now[key] for key in ("machine", "versions", "revision")):
        return now
    if earlier["options"]["threads"] != now["options"]["threads"]:
        return now
    done = {(r["shapes"], r["case"]) for r in now["measured"]}
    lists = {shapes for shapes, _ in done}
    return now | {
        "measured": [r for r in earlier["measured"] if (r["shapes"], r["case"]) not in done] + now["measured"],
        "missing": [m for m in earlier["missing"] if m["shapes"] not in lists] + now["missing"],
    }


SHORTEST = 0.5
"""Seconds of measuring, whatever the budget."""


class Budget:
    """Divides the time that is left among the rounds that are left: where one takes longer than its share, the others get less.

    Three quarters of a share are measured; the first steps of all contenders, which allocate and compile, take the rest.
    """

    def __init__(self, minutes: float, rounds: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end, self._rounds = now, now() + 60 * minutes, rounds

    def seconds(self) -> float:
        """To measure in the round that begins."""
        share = (self._end - self._now()) / max(self._rounds, 1)
        self._rounds -= 1
        return max(SHORTEST, 0.75 * share)


class Bench:
    """Measures lists, case by case; remembers who could not take part."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.missing: list[Record] = []
        self.copy = peers.copy(args.device)
        self.clock: timing.Clock = timing.wall_clock if args.device == "cpu" else timing.DeviceClock()
        planned = (self.rounds(name, cases) for name in args.shapes for cases in self.chosen())
        self.budget = Budget(args.minutes, sum(map(len, planned)))

    def copy_bandwidth(self) -> dict[str, float]:
        """GB/s of a large copy by itself; on the CPU with one thread too."""
        alone = (
            {"1 thread": 1, f"{self.args.threads} threads": self.args.threads}
            if self.args.device == "cpu"
            else {"GPU": 0}
        )
        found = {}
        for label, threads in alone.items():
            torch.set_num_threads(threads or self.args.threads)
            timed = timing.measure({COPY: self.copy}, self.clock, 1.0, 5)[COPY]
            found[label] = 8 * peers.COPIED / timed.median_ms / 1e6
        return found

    def measure_list(self, name: str) -> Iterator[Record]:
        arena = Arena(LISTS[name](), self.args.device, self.args.backend)
        if not self.args.alone and name not in self.args.compile:
            self.leave_out(name, COMPILED, "compiling takes a minute or two for each list; --compile names the lists")
        for cases in self.chosen():
            yield from self.measure_cases(name, arena, cases)

    def chosen(self) -> list[list[Case]]:
        """The cases that are measured together: each whole step by itself, and all ops."""
        steps, ops = ([c for c in cases if self.args.only.lower() in c.name.lower()] for cases in (STEPS, OPS))
        return [*([case] for case in steps), *([ops] if ops else [])]

    def rounds(self, name: str, cases: list[Case]) -> list[list[str]]:
        """The peers of these cases: those of each round, as many as fit into memory at once."""
        numel = sum(map(math.prod, LISTS[name]()))
        held = 3 + PEERS[YARDSTICK].columns + max(case.columns for case in cases)
        free = (self.args.memory * 1e9 - 8 * peers.COPIED) / (4 * numel) - held
        return rounds([p for p in cases[0].peers if self.invited(p, name)], free)

    def measure_cases(self, name: str, arena: Arena, cases: list[Case]) -> list[Record]:
        """Cases that share one round with their peers; several rounds where the peers do not fit into memory at once.

        Every ratio is one within a round. Our own time and the copy's are those of the first.
        """
        records: dict[str, Record] = {}
        for guests in self.rounds(name, cases):
            seconds = self.args.seconds or self.budget.seconds()
            self.console.print(f"[dim]{name}: {cases[0].name if len(cases) == 1 else 'ops'}[/]", highlight=False)
            runs = self.contenders(name, arena, cases, guests)
            others = machine.Others()
            flush = self.copy.step if COPY in runs or self.args.alone else None
            times = timing.measure(runs, self.clock, seconds, self.args.repeat, flush)
            disturbed = others.percent()
            extra = self.extra(name, runs, times, seconds)
            for case in cases:
                first = {"shapes": name, **summary(case, arena, times), **extra[case.name], "others_percent": disturbed}
                record = records.setdefault(case.name, {**first, "peers": {}})
                for peer in [YARDSTICK, *guests]:
                    if peer in times:
                        ratio = times[peer].median_ms / times[case.name].median_ms
                        record["peers"].setdefault(peer, {**times[peer]._asdict(), **extra[peer], "ratio": ratio})
            runs.clear()
            gc.collect()
        return list(records.values())

    def invited(self, peer: str, name: str) -> bool:
        return not self.args.alone and (peer != COMPILED or name in self.args.compile)

    def leave_out(self, name: str, peer: str, reason: str) -> None:
        self.missing.append({"shapes": name, "peer": peer, "reason": reason})

    def contenders(self, name: str, arena: Arena, cases: list[Case], guests: list[str]) -> dict[str, Run]:
        """Everyone after a first step, which allocates or compiles. Ours must run; a peer may fail, with a reason."""
        runs = {COPY: self.copy} if arena.numel > LARGE else {}
        runs |= {case.name: first_step(case.build(arena)) for case in cases}
        for peer in [YARDSTICK, *guests]:
            try:
                runs[peer] = first_step(PEERS[peer].build(arena))
            except Exception as error:  # whatever a peer raises is the reason why it is not in the table
                reason = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"
                self.leave_out(name, peer, reason.partition("\n")[0])
        return runs

    def extra(
        self, name: str, runs: dict[str, Run], times: dict[str, timing.Timing], seconds: float
    ) -> dict[str, Record]:
        """Host time where there is little else; launches, synchronisations and exposed runs on a GPU."""
        extra: dict[str, Record] = {label: {} for label in runs}
        host = times
        if isinstance(self.clock, timing.DeviceClock):
            for label, run in runs.items():
                extra[label] |= {"launches": timing.launches(run), "synchronises": timing.synchronises(run)}
                extra[label] |= {"exposed_runs": self.clock.exposed[run.step]}
            if name == "tiny":
                host = timing.measure(runs, timing.host_clock, seconds, self.args.repeat)
        if name == "tiny":
            for label in runs:
                extra[label]["host_us"] = 1e3 * host[label].median_ms
        return extra


def summary(case: Case, arena: Arena, times: dict[str, timing.Timing]) -> Record:
    """Our own side of a case."""
    timed = times[case.name]
    bandwidth: Record = {"gb_s": None, "copy_gb_s": None, "percent_of_copy": None}
    if COPY in times:
        gb_s = case.bytes_per_param * arena.numel / timed.median_ms / 1e6
        copy_gb_s = 8 * peers.COPIED / times[COPY].median_ms / 1e6
        bandwidth = {"gb_s": gb_s, "copy_gb_s": copy_gb_s, "percent_of_copy": 100 * gb_s / copy_gb_s}
    return {
        "tensors": len(arena.shapes),
        "params": arena.numel,
        "backend": arena.table.backend_name,
        "case": case.name,
        "passes": case.passes,
        "bytes_per_param": case.bytes_per_param,
        **timed._asdict(),
        **bandwidth,
    }


def first_step(run: Run) -> Run:
    run.prepare()
    run.step()
    return run


def rounds(names: list[str], free: float) -> list[list[str]]:
    """Distributes peers, in order, over rounds that hold at most ``free`` columns; at least one round, one a round."""
    found: list[list[str]] = [[]]
    for name in names:
        if found[-1] and sum(PEERS[n].columns for n in (*found[-1], name)) > free:
            found.append([])
        found[-1].append(name)
    return found
