"""The console of the commands."""

from __future__ import annotations

import errno
import sys

from rich.console import Console


class PipedConsole(Console):
    """Raises OSError where the reader of a pipe is gone; rich would end the program without a word."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()  # sends the rest of the output nowhere, or its last flush would fail too
        except SystemExit:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more", "standard output") from None


def make_console() -> Console:
    """As wide as the terminal; in a file or pipe, wide enough for the widest table."""
    return PipedConsole(width=None if sys.stdout.isatty() else 120)
