"""One build, from the sources in the package into the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from looksam_kernels.build import cache, recipe
from looksam_kernels.build.compiling import CompileError, compile_module

TIMEOUT = 900.0
"""Seconds to wait for another process that makes the same build; LOOKSAM_BUILD_TIMEOUT sets another number."""


class BuildError(RuntimeError):
    """A module could not be compiled; the message says why and ends with the compiler's last lines, if it ran."""


def csrc() -> Path | None:
    """The sources: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((path for path in (package / "csrc", package.parent / "csrc") if path.is_dir()), None)


def build(
    module: str, report: recipe.Report, output: recipe.Report = lambda line: None, timeout: float | None = None
) -> Path:
    """Compiles ``"_C"`` or ``"_cuda"`` for the torch that is installed, unless that is done already; returns its file.

    Several processes may call it at once: one compiles, the others wait for it.

    Args:
        report: gets a line for each thing that takes its time, and what is done.
        output: gets every line of the compilers.
        timeout: of the wait for another process, in seconds; default: LOOKSAM_BUILD_TIMEOUT, else 900.

    Raises:
        BuildError: it cannot be compiled here, or the compiler failed.
        TimeoutError: another process has been at it for too long.
    """
    source = csrc()
    if source is None:
        raise BuildError("the package was installed without its sources")
    why = recipe.why_no_cpu() or (recipe.why_no_cuda() if module == recipe.CUDA else None)
    if why is not None:
        raise BuildError(why)
    stamp = recipe.wanted_stamp(source, module, recipe.cuda_arch_list() if module == recipe.CUDA else "")
    key = f"{module}-torch{stamp.torch}-{stamp.python}-{_short(json.dumps(stamp))}"
    began = time.time()
    made = _made(key, stamp)
    if made is not None:  # asked before anything is written: others may have filled a cache that is only read here
        report(f"{made} is up to date")
        return made
    _make_folder()
    with cache.locked(key, _timeout(timeout), _once(lambda holder: report(f"waiting for {holder}"))):
        made = _made(key, stamp)
        if made is not None:
            report(f"{made} is up to date")
            return made
        _same_failure(key, began)
        with cache.workspace(key) as work:
            _compile(source, stamp, work, key, report, output)
            cache.publish(work / "into", key)
        made = cache.folder() / key / f"{module}.{stamp.python}.so"
        report(f"built in {time.time() - began:.0f} s: {made}")
        return made


def _made(key: str, stamp: recipe.Stamp) -> Path | None:
    """The file of an earlier build. The newest that fits is the one that is loaded, and so this one from now on."""
    made = cache.folder() / key / f"{stamp.module}.{stamp.python}.so"
    with contextlib.suppress(OSError):
        if recipe.read_stamp(made) == stamp:
            with contextlib.suppress(OSError):
                os.utime(made)
            return made
    return None


def _compile(
    source: Path, stamp: recipe.Stamp, work: Path, key: str, report: recipe.Report, output: recipe.Report
) -> None:
    log = cache.folder() / f"{key}.log"
    device = "CPU" if stamp.module == recipe.CPU else f"CUDA {stamp.cuda}, architectures {stamp.arch}"
    report(f"compiling for torch {stamp.torch}, {device}; this takes a minute or more")
    with log.open("w") as file:

        def both(line: str) -> None:
            print(line, file=file, flush=True)
            output(line)

        try:
            made = compile_module(recipe, source, stamp, work / "objects", work / "into", both)
            _try(made, stamp.module)
        except CompileError as error:
            text = "\n".join([f"the compiler failed: {error}", *(f"  {line}" for line in error.tail)])
            (cache.folder() / f"{key}.failed").write_text(text)
            raise BuildError(f"{text}\nAll of it: {log}") from None
    log.unlink()
    (cache.folder() / f"{key}.failed").unlink(missing_ok=True)


def _try(made: Path, module: str) -> None:
    """Loads it in a process of its own: what cannot be loaded is never published."""
    code = (
        "import sys, torch, importlib.util as u; s = u.spec_from_file_location(sys.argv[1], sys.argv[2]); "
        "s.loader.exec_module(u.module_from_spec(s))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, module, str(made)], capture_output=True, text=True, cwd=made.parent, check=False
    )
    if done.returncode != 0:
        raise CompileError([*done.stderr.splitlines(), f"error: {made.name} was compiled, but does not load"])


def _same_failure(key: str, began: float) -> None:
    """Processes that waited for a build that failed need not see the compiler fail again."""
    failed = cache.folder() / f"{key}.failed"
    if failed.exists() and failed.stat().st_mtime > began:
        raise BuildError(failed.read_text())


def _make_folder() -> None:
    try:
        cache.folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.folder()):
            pass
    except OSError as error:
        raise BuildError(
            f"{cache.folder()} cannot be written ({error.strerror}); LOOKSAM_CACHE_DIR names another folder"
        ) from None


def _timeout(given: float | None) -> float:
    if given is not None:
        return given
    text = os.environ.get("LOOKSAM_BUILD_TIMEOUT") or str(TIMEOUT)
    try:
        return seconds(text)
    except ValueError as error:
        raise ValueError(f"LOOKSAM_BUILD_TIMEOUT={error}") from None


def seconds(text: str) -> float:
    """
    Raises:
        ValueError: it is not a number of at least 0.
    """
    with contextlib.suppress(ValueError):
        if (number := float(text)) >= 0:
            return number
    raise ValueError(f"{text!r} is not a number of seconds")


def _once(say: recipe.Report) -> recipe.Report:
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return once


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
