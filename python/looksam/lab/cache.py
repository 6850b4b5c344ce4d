"""Decoded arrays on disk, so that a data set is decoded once; the oldest used make room for new ones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .files import replacing

LIMIT_GB = 10.0


def cache_folder() -> Path:
    """``$LOOKSAM_CACHE_DIR/data``; without the variable ``$XDG_CACHE_HOME/looksam/data`` or ``~/.cache/looksam/data``.

    OSError if there is no home folder.
    """
    given = os.environ.get("LOOKSAM_CACHE_DIR")
    if given:
        return Path(given) / "data"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "looksam" / "data"
    except RuntimeError:  # a user whom the machine does not know, as in many containers
        raise FileNotFoundError(errno.ENOENT, "no home folder; LOOKSAM_CACHE_DIR names the cache", "~") from None


def cache_limit() -> float:
    """The bytes that the folder may hold: ``$LOOKSAM_CACHE_GB`` x 10^9, by default 10 GB. ValueError if it is no number of
    at least 0."""
    text = os.environ.get("LOOKSAM_CACHE_GB") or str(LIMIT_GB)
    with contextlib.suppress(ValueError):
        if (limit := float(text)) >= 0:
            return 1e9 * limit
    raise ValueError(f"LOOKSAM_CACHE_GB={text}: must be a number of gigabytes, such as {LIMIT_GB:g}")


def cached_files() -> list[Path]:
    """What is in the cache, the one used longest ago first."""
    return sorted(cache_folder().glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)


def make_room(size: int) -> bool:
    """Remove what was used longest ago until ``size`` bytes more fit; False if they never would."""
    limit = cache_limit()
    files = cached_files()
    while files and sum(file.stat().st_size for file in files) + size > limit:
        files.pop(0).unlink(missing_ok=True)
    return size <= limit


def tree_fingerprint(path: Path) -> str:
    """Changes when the file, or any file under the folder, is added, removed, resized or modified."""
    path = path.resolve()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    digest = hashlib.sha256(str(path).encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def cached_arrays(key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays stored under ``key``, or else those that ``compute`` returns, stored for the next time."""
    try:
        file = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    except OSError:
        return compute()
    if file.exists():
        try:
            with file.open("rb") as stream, np.load(stream) as stored:
                arrays = dict(stored)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            pass  # damaged: made again
        else:
            with contextlib.suppress(OSError):  # of another user, or on a medium that is only read
                os.utime(file)
            return arrays
    arrays = compute()
    with contextlib.suppress(OSError):  # no room, no right to write: without a cache then
        if make_room(sum(array.nbytes for array in arrays.values())):
            with replacing(file) as part:
                np.savez(part, **arrays)  # type: ignore[arg-type]
    return arrays
