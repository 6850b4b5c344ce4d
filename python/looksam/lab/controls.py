"""Methods that are no use by themselves: each leaves out one part of another, so that a comparison shows what works."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import looksam


class RandomReuse(looksam.LookSAM):
    """LookSAM with a random direction in the place of q, of q's length in each tensor.

    What LookSAM gains beyond this comes from q, not from longer or noisier steps.

    The arguments and errors: :class:`looksam.LookSAM`.
    """

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        sharp = self.needs_second_pass
        loss = super().step(closure)
        if sharp:
            self._draw()
        return loss

    @torch.no_grad()
    def _draw(self) -> None:
        for state in self.state.values():
            if "q" in state:
                noise = torch.randn_like(state["q"])
                noise_norm = noise.norm()
                state["q"].copy_(noise * torch.where(noise_norm > 0, state["q"].norm() / noise_norm, 0))


def step_length(alpha: float, k: int) -> float:
    """How much longer than g LookSAM's directions are, over a cycle: sqrt(1 + alpha^2) on k - 1 of k steps, as q is
    orthogonal to g."""
    return (1 + (k - 1) * math.sqrt(1 + alpha**2)) / k


def controls_of(values: dict[str, Any], base: str, k: int, radii: Sequence[float]) -> dict[str, str]:
    """METHOD -> what it controls for, of a LookSAM that steps with ``values`` over ``base``."""
    on_base = "" if base == "sgd" else f"+{base}"
    longer = step_length(values["alpha"], k)
    lr, decay, rho, alpha = (values[name] for name in ("lr", "weight_decay", "rho", "alpha"))
    controls = {
        f"looksam_random-{k}{on_base}:alpha={alpha},lr={lr},rho={rho},weight_decay={decay}": (
            "LookSAM with a random q of the same length"
        ),
        f"{base}:lr={lr * longer:.6g},weight_decay={decay / longer:.6g}": (
            f"{base} with steps as long as LookSAM's ({longer:.2f} times), and the same decay"
        ),
    }
    for radius in radii:
        controls[f"sam{on_base}:lr={lr},rho={radius},weight_decay={decay}"] = f"SAM at rho = {radius:g}"
    return controls
