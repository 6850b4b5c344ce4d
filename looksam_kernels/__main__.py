"""``python -m looksam_kernels``: which backends run here. ``python -m looksam_kernels build``: compiles the native one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

import torch

import looksam_kernels
from looksam_kernels import backends, extension
from looksam_kernels.build import BuildError, build, builder, cache, recipe

DESCRIPTION = """\
Compiles the native backend for the torch that is installed, from the sources in the package: for CPU tensors, and for
CUDA tensors where nvcc and a torch with CUDA are there. The result goes into LOOKSAM_CACHE_DIR, by default
~/.cache/looksam, and is found by every later run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m looksam_kernels", description="Which backends run here.")
    command = parser.add_subparsers(dest="command").add_parser(
        "build", help="compile the native backend", description=DESCRIPTION
    )
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="only say what is built; exit with 1 where it is not")
    instead.add_argument("--clean", action="store_true", help="remove every build from the cache")
    command.add_argument("--verbose", action="store_true", help="show the compilers' output")
    command.add_argument("--timeout", type=_seconds, metavar="S", help="seconds to wait for another process's build")
    options = parser.parse_args(arguments)
    if options.command is None:
        return show()
    try:
        recipe.setting("LOOKSAM_CUDA")
        if options.clean:
            print(f"removed {cache.clean()} builds from {cache.folder()}")
            return 0
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return check() if options.check else build_all(options.verbose, options.timeout)


def _seconds(text: str) -> float:
    try:
        return builder.seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def show() -> int:
    """1 where a backend was asked for that cannot run."""
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    asked_for = backends.forced()
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name, info in looksam_kernels.backend_info(device).items():
            state = "runs" if info.selected else "can run" if info.available else "no"
            print(f"{device:>5} {name:<10} {state:<8} {info.reason}".rstrip())
    if asked_for is not None and not any(info.selected for info in looksam_kernels.backend_info().values()):
        print(f"LOOKSAM_BACKEND={asked_for}: no such backend can run here", file=sys.stderr)
        return 1
    return 0


def check() -> int:
    """1 where a module that could be compiled here is not there."""
    missing = 0
    for module in (recipe.CPU, recipe.CUDA):
        found = extension.load(module)
        if found.module is not None:
            print(f"{_device(module)}: {found.module.__file__}")
        elif module == recipe.CUDA and (why := recipe.why_no_cuda()) is not None:
            print(f"{_device(module)}: not possible here: {why}")
        else:
            missing = 1
            print(f"{_device(module)}: {found.reason}")
    return missing


def build_all(verbose: bool, timeout: float | None) -> int:
    """The CPU's module first: what stands in CUDA's way must not cost it."""
    try:
        build("_C", _report("CPU"), _output(verbose), timeout)
    except (BuildError, OSError, ValueError) as error:
        print(f"CPU: not built: {error}", file=sys.stderr)
        return 1
    try:
        why = recipe.why_no_cuda()
        if why is None:
            build("_cuda", _report("CUDA"), _output(verbose), timeout)
        else:
            print(f"CUDA: left out: {why}", file=sys.stderr)
    except (BuildError, OSError, ValueError) as error:
        print(f"CUDA: not built: {error}", file=sys.stderr)
        return 1
    return int(why is not None and recipe.setting("LOOKSAM_CUDA") == "1")


def _device(module: str) -> str:
    return "CPU" if module == recipe.CPU else "CUDA"


def _report(device: str) -> recipe.Report:
    return lambda line: print(f"{device}: {line}", file=sys.stderr, flush=True)


def _output(verbose: bool) -> recipe.Report:
    """Everything, or the number of files done: torch's builds run in ninja, whose lines begin with ``[3/6]``."""

    def show_number(line: str) -> None:
        if done := re.match(r"\[(\d+/\d+)\]", line):
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"  {done[1]}", end=end, file=sys.stderr, flush=True)

    return (lambda line: print(line, file=sys.stderr, flush=True)) if verbose else show_number


if __name__ == "__main__":
    sys.exit(main())
