"""Is it as fast as it was? Compares ratios with the committed results of the same kind of machine.

``make bench-check`` (``python -m benchmarks.check``) measures ViT-S/16 beside torch's fused AdamW, one or two minutes, and
compares with the newest result in ``benchmarks/results`` that has this processor, as many cores and threads, and the same
SIMD. ``python -m benchmarks.check NEW.json`` compares a result that is there already. A ratio is our time over that of torch's
fused AdamW in the same run. The exit status is 1 if one has grown by more than :data:`MARGINS` allow.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import machine, run
from benchmarks.cases import STEPS
from benchmarks.peers import YARDSTICK

RESULTS = Path(__file__).parent / "results"
MARGINS = {"step": 15.0, "op": 25.0}
"""Percent: between runs of one revision, ratios of whole steps differ by a few, those of single ops, which are shorter, by up to
ten."""
QUIET = 10.0
"""Percent of the processors' time; a record that others disturbed more is not compared."""
THREADS = 2
Record = dict[str, Any]


class Change(NamedTuple):
    shapes: str
    case: str
    before: float
    now: float

    @property
    def percent(self) -> float:
        return 100 * (self.now / self.before - 1)

    @property
    def margin(self) -> float:
        return MARGINS["step" if self.case in {case.name for case in STEPS} else "op"]

    @property
    def verdict(self) -> str:
        if self.percent > self.margin:
            return "SLOWER"
        return "faster" if self.percent < -self.margin else "as before"


def kind(result: Record) -> tuple[Any, ...]:
    """What two results must have in common."""
    options = result["options"]
    hardware = tuple(result["machine"].get(name) for name in ("cpu", "cores", "simd", "gpu"))
    return (*hardware, options["device"], options["threads"] if options["device"] == "cpu" else None)


def committed(result: Record, folder: Path = RESULTS) -> Path:
    """The newest result of the same kind of machine.

    Raises:
        LookupError: there is none.
    """
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    same = [path for path, other in found.items() if "measured" in other and kind(other) == kind(result)]
    if not same:
        known = sorted({str(kind(x)) for x in found.values() if "measured" in x})
        raise LookupError(
            f"no committed result of this kind of machine, {kind(result)}; there are {', '.join(known) or 'none'}. "
            "`make bench` on a quiet machine makes one"
        )
    return max(same, key=lambda path: found[path]["date"])


def ratios(result: Record) -> dict[tuple[str, str], float]:
    """(list, case) -> our time over the yardstick's, of lists that are about bandwidth and records that were not disturbed."""
    return {
        (r["shapes"], r["case"]): 1 / r["peers"][YARDSTICK]["ratio"]
        for r in result["measured"]
        if YARDSTICK in r["peers"] and r["params"] > run.LARGE and (r["others_percent"] or 0) <= QUIET
    }


def changes(before: Record, now: Record) -> list[Change]:
    """Of the cases that both have.

    Raises:
        LookupError: there are none.
    """
    old, new = ratios(before), ratios(now)
    found = [Change(*key, old[key], new[key]) for key in old if key in new]
    if not found:
        raise LookupError(
            "nothing to compare: the results have no case in common that was measured while other processes took at most "
            f"{QUIET:g} % of the processors' time; wait until the machine is quiet"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="a result file; default: one that is measured now")
    parser.add_argument("--against", type=Path, help="the result to compare with; default: the newest of this machine")
    parser.add_argument("--shapes", default="vit-s", help="lists that are measured (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", default="6", help="measuring time of each case (%(default)s)")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        if args.result is None and args.against is None:  # an error before minutes of measuring
            committed(
                {"machine": machine.describe(args.device), "options": {"device": args.device, "threads": THREADS}}
            )
        now = json.loads((args.result or _measured(args)).read_text())
        path = args.against or committed(now)
        found = changes(json.loads(path.read_text()), now)
    except LookupError as error:
        console.print(str(error), markup=False)
        return 2
    console.print(f"against {path.name}; margins: whole steps {MARGINS['step']:g} %, ops {MARGINS['op']:g} %")
    for x in found:
        console.print(f"{x.shapes:10} {x.case:32} {x.before:5.2f} → {x.now:5.2f}  {x.percent:+4.0f} %  {x.verdict}")
    return int(any(x.verdict == "SLOWER" for x in found))


def _measured(args: argparse.Namespace) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="bench-check-"))
    options = {"shapes": args.shapes, "seconds": args.seconds, "device": args.device, "threads": str(THREADS)}
    run.main([*(x for name, value in options.items() for x in (f"--{name}", value)), "--alone", "--out", str(folder)])
    return next(folder.glob("*.json"))


if __name__ == "__main__":
    sys.exit(main())
