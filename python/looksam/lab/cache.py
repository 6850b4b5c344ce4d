"""Decoded arrays on disk, so that a data set is decoded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .files import replacing


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/looksam``, by default ``~/.cache/looksam``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "looksam"


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
    file = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if file.exists():
        with np.load(file) as stored:
            return dict(stored)
    arrays = compute()
    with replacing(file) as part:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    return arrays
