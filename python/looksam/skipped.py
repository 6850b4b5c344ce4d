"""Counts the steps that were left out because a gradient was not finite, without making the host wait for a device."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from looksam_kernels.memory import readable

IN_A_ROW = 10
"""So many steps left out one after the other are worth a warning."""


class Skipped:
    """
    On the CPU a count is a number and the warning comes with the tenth step. On other devices the count stays there, and ten
    steps are added to it at once: after that a copy of it sets out for the host, and is looked at ten steps later, when it
    has long arrived. The warning then comes within thirty steps.
    """

    def __init__(self) -> None:
        self._run = 0
        self._count = torch.zeros((), dtype=torch.int64)
        self._noted: list[Tensor] = []
        """found_inf of the steps that are not in the count yet."""
        self._copies: list[tuple[Tensor, Any]] = []
        """The count of ten steps ago and the one before, on their way to the host, with the events of their arrival."""
        self._warned = False

    @property
    def count(self) -> Tensor:
        """On the device of the parameters, int64, shape []."""
        return self._count + (torch.stack(self._noted) > 0).sum() if self._noted else self._count.clone()

    def note(self, found_inf: Tensor) -> None:
        """A step is done, or left out where ``found_inf`` is 1.0."""
        if type(found_inf) is Tensor and found_inf.is_cpu and torch._C._functorch.maybe_current_level() is None:
            self._note_here(found_inf.tolist())  # read where it lies: no operation
        elif readable((found_inf,)):
            self._note_there(found_inf)

    def _note_here(self, left_out: Any) -> None:
        if left_out:
            self._run += 1
            self._count += 1
            self._warn_after(self._run)
        else:
            self._run = 0

    def _note_there(self, found_inf: Tensor) -> None:
        is_cuda = found_inf.device.type == "cuda"
        if self._count.device != found_inf.device:
            self._count, self._noted, self._copies = self.count.to(found_inf.device), [], []
        if is_cuda and torch.cuda.is_current_stream_capturing():
            self._count += found_inf > 0  # by every replay
            return
        self._noted.append(found_inf)
        if len(self._noted) < IN_A_ROW:
            return
        self._count += (torch.stack(self._noted) > 0).sum()
        self._noted = []
        if self._warned or not is_cuda:
            return
        if len(self._copies) == 2 and all(event.query() for _, event in self._copies):
            older, newer = (int(copy) for copy, _ in self._copies)
            self._warn_after(newer - older)
        arrived = torch.cuda.Event()
        copy = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(self._count, non_blocking=True)
        arrived.record()
        self._copies = [*self._copies[-1:], (copy, arrived)]

    def _warn_after(self, steps: int) -> None:
        if steps >= IN_A_ROW and not self._warned:
            self._warned = True
            warnings.warn(
                f"{steps} steps in a row were left out because a gradient was not finite (NaN or infinite): the weights do not "
                "move. Look for what makes the loss so, or lower the learning rate or rho; optimizer.skipped_steps counts them",
                stacklevel=2,
            )
