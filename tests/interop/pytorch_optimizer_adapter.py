"""Loaded by pytest (``-p``) before pytorch_optimizer's own tests: puts our SAM and LookSAM in place of its classes.

What is adapted, because the packages differ on purpose:

* ``use_gc``, ``foreach`` and ``num_data`` are dropped, and ``adaptive`` where our class has no such argument.
* ``init_group`` exists and does nothing: state is created by the first step.
* ``step()`` without a closure raises their ``NoClosureError`` where ours raises ``RuntimeError``; and it does so without
  gradients too, where ours creates the state (torch.distributed.checkpoint asks for that).
* ``norm_scope="tensor"`` is the default of LookSAM, as theirs projects per tensor.
* ``params=None`` together with a bad ``rho`` raises ``ValueError``: ours looks at the parameters first.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer.base.exception import NoClosureError

import looksam


def adapted(cls: type[looksam.SharpnessAware]) -> type[looksam.SharpnessAware]:
    known = inspect.signature(cls).parameters

    class Adapted(cls):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, base_optimizer: Any, **kwargs: Any) -> None:
            dropped = {"use_gc", "foreach", "num_data"} | ({"adaptive"} - known.keys())
            kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
            if "norm_scope" in known:
                kwargs.setdefault("norm_scope", "tensor")
            if params is None:
                params = [torch.nn.Parameter(torch.zeros(1))]
            super().__init__(params, base_optimizer, **kwargs)

        def init_group(self, group: Any, **_: Any) -> None:
            pass

        def step(self, closure: Any = None) -> Any:
            if closure is None and not self._moved and self.needs_second_pass:
                raise NoClosureError(str(self))
            return super().step(closure)

    Adapted.__name__ = cls.__name__
    return Adapted


pytorch_optimizer.SAM = adapted(looksam.SAM)
pytorch_optimizer.LookSAM = adapted(looksam.LookSAM)
