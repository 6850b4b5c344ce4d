"""What trainers put in an optimizer's place."""

from __future__ import annotations

from typing import Any


def count_step(imitation: Any) -> None:
    """A step is done that ``step`` was not called for: whoever counts the calls of it is told.

    Lightning hands out, for manual optimization, an object of its own class and of the optimizer's, whose ``step`` runs a
    closure of Lightning's and counts (``max_steps``, checkpoints) between these two functions.
    """
    for name in ("_on_before_step", "_on_after_step"):
        tell = getattr(imitation, name, None)
        if tell is not None:
            tell()
