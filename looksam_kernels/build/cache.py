"""The user's folder of compiled modules: one folder a build, moved there complete, and a lock while one is made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def folder() -> Path:
    """``$LOOKSAM_CACHE_DIR/builds``; by default under ``$XDG_CACHE_HOME/looksam`` or ``~/.cache/looksam``.

    Raises:
        FileNotFoundError: there is no home folder, as for a user whom the machine does not know (in many containers).
    """
    given = os.environ.get("LOOKSAM_CACHE_DIR")
    try:
        root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "looksam"
    except RuntimeError:
        raise FileNotFoundError("there is no home folder; LOOKSAM_CACHE_DIR names the cache") from None
    return root.absolute() / "builds"


def modules(name: str) -> list[Path]:
    """Every build of a module, for whatever it was made; the newest first."""
    with contextlib.suppress(OSError):
        return sorted(folder().glob(f"{name}-*/{name}.*.so"), key=_age)
    return []


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):  # removed meanwhile
        return -path.stat().st_mtime
    return 0.0


@contextlib.contextmanager
def locked(key: str, timeout: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Only one process at a time makes ``key``. The kernel frees the lock of a process that is killed.

    Raises:
        TimeoutError: another process held the lock for ``timeout`` seconds; the message says which.
    """
    path = folder() / f"{key}.lock"
    with path.open("a+") as file:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                waited = time.monotonic() - began
                if waited >= timeout:
                    raise TimeoutError(
                        f"{holder} has been building for more than {timeout:g} s ({path}); end it, or wait longer "
                        "with --timeout"
                    ) from None
                waiting(holder)
                time.sleep(min(0.2, timeout - waited + 0.01))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def workspace(key: str) -> Iterator[Path]:
    """A new folder for one build of ``key``, whose lock is held; removed afterwards, with those of builds that were killed."""
    for left in folder().glob(f".{key}.*"):
        shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder()))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish(made: Path, key: str) -> Path:
    """Moves a complete folder to its place: it is there whole or not at all."""
    target = folder() / key
    if target.exists():  # what does not load is replaced
        shutil.rmtree(target)
    made.rename(target)
    return target


def clean() -> int:
    """Removes every build and log; returns the number of builds. Those that are loaded go on working, one that is being
    made is left alone."""
    count = 0
    for path in folder().glob("*"):
        if path.suffix == ".lock" or path.name.startswith("."):
            continue  # another process may hold it; a killed build's folder goes with the next build
        count += path.is_dir()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return count
