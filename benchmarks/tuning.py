"""Which sizes of a program are the fastest on this GPU: ``python -m benchmarks.tuning``.

Runs whole steps of the Triton backend with every candidate, all in turns, on the device's clock, and prints their times as
multiples of those of the sizes in the table (looksam_kernels/backends/triton/tuning.py), and the line for it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import STEPS, Arena, Case, Run
from benchmarks.shapes import LISTS, Shape
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.tuning import Tuning, tuning_of, use_tuning

CASES = ("AdamW", "LookSAM refresh", "LAMB")
CANDIDATES = tuple(
    Tuning(threads * width, threads, registers)
    for threads in (128, 256, 512)
    for width in (4, 8, 16)
    for registers in (None, 128)
)


def with_tuning(case: Case, arena: Arena, tuning: Tuning) -> Run:
    """What is compiled, and how tables are cut into chunks, is settled in the first run of each step."""

    def inside(part: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with use_tuning(tuning):
                part()

        return run

    with use_tuning(tuning):
        run = case.build(arena)
    return Run(inside(run.prepare), inside(run.step))


def medians(
    shapes: Sequence[Shape], device: str, candidates: Sequence[Tuning], clock: timing.Clock, seconds: float
) -> dict[str, dict[Tuning, float]]:
    """Milliseconds by case and candidate."""
    arena = Arena(shapes, device, "triton")
    found = {}
    for case in (case for case in STEPS if case.name in CASES):
        runs = {str(i): with_tuning(case, arena, tuning) for i, tuning in enumerate(candidates)}
        measured = timing.measure(runs, clock, seconds, at_least=5)
        found[case.name] = {tuning: measured[str(i)].median_ms for i, tuning in enumerate(candidates)}
    return found


def relative(found: Mapping[str, Mapping[Tuning, float]], table: Tuning) -> dict[Tuning, list[float]]:
    """The times of each candidate over those of the table's sizes, case by case, and their geometric mean."""
    candidates = next(iter(found.values()))
    ratios = {x: [of_case[x] / of_case[table] for of_case in found.values()] for x in candidates}
    return {x: [*r, math.exp(sum(map(math.log, r)) / len(r))] for x, r in ratios.items()}


def lines(ratios: Mapping[Tuning, Sequence[float]], target: Any) -> Iterator[str]:
    yield f"{'chunk':>6}{'threads':>9}{'registers':>11}" + "".join(f"{name:>17}" for name in (*CASES, "mean"))
    for tuning, values in sorted(ratios.items(), key=lambda item: item[1][-1]):
        sizes = f"{tuning.chunk:6}{tuning.threads:9}{tuning.registers or '-':>11}"
        yield sizes + "".join(f"{x:17.3f}" for x in values)
    best = min(ratios, key=lambda x: ratios[x][-1])
    key = ("interpreter", "") if target is None else (target.backend, target.arch)
    yield f"    {key!r}: {best!r},"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("--device", default="cuda", help="of torch, with an index if need be (%(default)s)")
    parser.add_argument(
        "--shapes",
        default="vit-s",
        choices=LISTS,
        help="parameter list; every candidate holds state of its own (%(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of each step (%(default)s)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        parser.error("this measures on a GPU that torch calls cuda (NVIDIA's and AMD's), and there is none")
    target = gpu.target(device)
    table = tuning_of(target)
    candidates = list(dict.fromkeys((table, *CANDIDATES)))
    found = medians(LISTS[args.shapes](), args.device, candidates, timing.DeviceClock(), args.seconds)
    for line in lines(relative(found, table), target):
        print(line)


if __name__ == "__main__":
    main()
