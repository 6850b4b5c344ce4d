"""Mixed precision: autocast for the forward passes and, with float16, the scaler of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from looksam.optimizer import SharpnessAware

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """How the passes of one run compute. ``amp``: a key of PRECISIONS, or None for float32 and no scaler."""

    def __init__(self, amp: str | None, device: torch.device) -> None:
        self._device = device.type
        self._dtype = PRECISIONS.get(amp or "")
        self.scaler = GradScaler(device.type, enabled=amp == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # a scaler makes its scale here, and step() asks for it

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device, self._dtype, enabled=self._dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, closure: Callable[[], Any], clip: float | None = None) -> Any:
        """One step of any optimizer; the closure calls :meth:`backward`, or returns scaled losses where the optimizer wants
        those of single samples. Returns the first loss.

        ``clip`` limits the norm of the gradients, for the optimizers that do not do it themselves.
        """
        if isinstance(optimizer, SharpnessAware):
            scale = self.scaler.scale(torch.ones((), device=self._device))
            loss: Any = self.scaler.step(optimizer, closure)
            if optimizer.per_sample:
                loss = loss / scale
        else:  # for torch's own optimizers the scaler looks at the gradients before it calls them: no closure then
            loss = closure()
            if clip is not None:
                self.scaler.unscale_(optimizer)
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss
