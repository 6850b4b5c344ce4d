"""Schedules of the learning rate and of the radius, as factors of their peaks."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def lr_factor(schedule: str, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Factor for step ``step`` (from 0) of ``total_steps``.

    Linear warm-up reaches 1 at step ``warmup_steps``, its first step already moves (factor 1/(warmup_steps + 1));
    then the rate falls to 0, which it would reach at ``total_steps``: the last step taken still moves.
    """
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if schedule == "linear" else 1.0


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Grows linearly to 1, which it reaches at step ``warmup_steps`` (from 0); its first step has 1/(warmup_steps + 1)."""
    return min(1.0, (step + 1) / (warmup_steps + 1))
