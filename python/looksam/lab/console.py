"""The console of the commands."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console() -> Console:
    """As wide as the terminal; in a file or pipe, wide enough for the widest table."""
    return Console(width=None if sys.stdout.isatty() else 120)
