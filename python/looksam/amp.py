"""What ``torch.amp.GradScaler`` hands to an optimizer, and what it must hear back."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler

LOSS_SCALE = "loss_scale"
"""In the groups, after a step that a scaler made: its scale, the very tensor that ``scaler.update()`` writes, so that a
checkpoint holds what the next gradients carry."""


class ScaledGradients:
    """The optimizer's side of ``scaler.step(optimizer, ...)``.

    A scaler that sees ``_step_supports_amp_scaling`` sets ``grad_scale`` (``None`` after ``scaler.unscale_``) and
    ``found_inf`` for the time of the step, and skips nothing itself. Its ``found_inf`` is of the gradients that were
    there before the step, so the step looks for itself, and tells the scaler with :meth:`_report`.
    """

    _step_supports_amp_scaling = True
    _scaler: GradScaler | None = None
    _found_before: Tensor | None = None

    param_groups: list[dict[str, Any]]

    @property
    def found_inf(self) -> Any:
        if self._scaler is None:
            raise AttributeError("found_inf")
        return self._found_before

    @found_inf.setter
    def found_inf(self, value: Any) -> None:
        # The scaler does not pass itself, yet it has to learn of an overflow in a pass that it has not seen: it would
        # keep the scale, or raise in update() as no check was recorded. It is the one that sets the attribute.
        caller = sys._getframe(1).f_locals.get("self")
        self._scaler = caller if isinstance(caller, GradScaler) else None
        self._found_before = value if isinstance(value, Tensor) else None

    @found_inf.deleter
    def found_inf(self) -> None:
        self._scaler = self._found_before = None

    def _grad_scale(self, new_gradients: bool) -> Tensor | None:
        """The factor on the gradients of this step.

        Args:
            new_gradients: they are made in this step, by a closure.

        Raises:
            RuntimeError: ``scaler.unscale_`` before ``scaler.step(optimizer, closure)``: it unscaled the gradients of
                before, not those that the closure makes.
        """
        scale: Tensor | None = self.__dict__.get("grad_scale")
        if self._scaler is not None and scale is None and new_gradients:
            raise RuntimeError(
                "scaler.unscale_(optimizer) before scaler.step(optimizer, closure): the closure makes new gradients, "
                "which carry the scale; leave unscale_ out and give max_grad_norm to the optimizer to clip"
            )
        return scale

    def _probable_scale(self) -> Tensor | None:
        """The factor on gradients that the user made before ``first_step``, which a scaler does not know of: the scale of
        now, if a scaler made the step before. (In a first step it cancels: there is nothing yet to add gradients to.)"""
        scale: Tensor | None = self.param_groups[0].get(LOSS_SCALE)
        return scale

    def _report(self, found_inf: Tensor) -> None:
        """Tells the scaler whether this step was skipped, so that ``scaler.update()`` lowers the scale."""
        for group in self.param_groups:
            group.pop(LOSS_SCALE, None)
            if self._scaler is not None:
                group[LOSS_SCALE] = self._scaler._scale
        if self._scaler is not None:
            found: dict[Any, Tensor] = self._scaler._found_inf_per_device(self)  # type: ignore[arg-type]
            found.clear()
            found[found_inf.device] = found_inf.float().clone()

    def _hand_back(self) -> None:
        """Forgets what was handed over: after a step that raised the scaler does not, and would square the scale."""
        if self._scaler is not None:
            self.__dict__.pop("grad_scale", None)
            del self.found_inf
