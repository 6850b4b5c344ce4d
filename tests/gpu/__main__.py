"""``python -m tests.gpu first second``: builds, tests, sanitizes and measures on a machine with a GPU."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from tests.gpu import rehearsal, toolchain
from tests.gpu.parts import LISTS
from tests.gpu.runner import Run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("lists", nargs="+", choices=LISTS, metavar="LIST", help=" or ".join(LISTS))
    parser.add_argument("--only", default="", help="parts whose names contain one of these, such as 'build,triton'")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies all time limits (%(default)s)")
    parser.add_argument("--folder", type=Path, default=toolchain.ROOT / "build" / "gpu", help="of the logs")
    rehearsal.add_options(parser)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was found so far is written down

    environment = rehearsal.environment(options) if options.rehearse else dict(os.environ)
    found = toolchain.find(environment)
    if options.processes:
        found = found._replace(processes=options.processes)
    print(found, flush=True)
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    well = []
    for name in options.lists:
        run = Run(name, found, options.folder, out, options.patience)
        parts = [part for part in LISTS[name] if any(x in part.name for x in options.only.split(","))]
        well.append(run.run(parts, say=lambda line: print(line, flush=True)))
        print(f"\n{run.summary()}", flush=True)
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
