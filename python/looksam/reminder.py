"""A warning where a model is evaluated at perturbed weights."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.nn import Module


class Reminder:
    """A forward hook. Copies of it, which copies of the model have, say nothing: their weights are not the optimizer's.

    Args:
        optimizer: has ``is_perturbed``.
    """

    def __init__(self, optimizer: Any = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def watch(self, model: Module) -> None:
        model.register_forward_pre_hook(self)

    def __call__(self, model: Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or self._optimizer is None or model.training:
            return
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.is_perturbed:
            self._optimizer = None
            warnings.warn(
                "the model is used in eval mode, but its weights are perturbed: call optimizer.eval() before, and "
                "optimizer.train() after it",
                stacklevel=4,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Reminder, ()
