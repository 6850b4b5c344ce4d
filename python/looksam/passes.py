"""What surrounds the forward and backward passes of one step: batch statistics, random numbers, gradient averaging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from looksam.messages import shown


@contextmanager
def frozen_running_stats(model: Module) -> Iterator[None]:
    """Running statistics are in the end what they were in the beginning: buffers called ``running_*``, ``moving_*`` or
    ``num_batches_tracked``, of modules of any class, scripted ones too.

    For the passes at perturbed weights, whose activations the model never has when it is used. Modules normalise as
    always, and their flags stay. Every buffer remains the same tensor in the same storage.
    """
    owners = [
        (m, name, x) for m in model.modules() for name, x in m.named_buffers(recurse=False) if _is_statistic(name, x)
    ]
    before = [x.clone() for _, _, x in owners]
    try:
        yield
    finally:
        for m, name, x in owners:
            if getattr(m, name) is not x:  # the module has put another tensor in its place
                setattr(m, name, x)
        with torch.no_grad():
            for (_, _, x), value in zip(owners, before, strict=True):
                x.data.copy_(value)  # .data: the version stays too, for a graph that is still to go backward


def _is_statistic(name: str, buffer: Tensor) -> bool:
    known = name.startswith(("running_", "moving_")) or name == "num_batches_tracked"
    return known and not is_lazy(buffer) and not buffer.is_inference()


class PassRunner:
    """Runs the closure of a step, once for each pass.

    Args:
        model: from the second pass on its running statistics are frozen, if it is given.
        same_rng: every pass draws the same random numbers (dropout), from torch's CPU and CUDA default generators.
        m_sharpness: every rank perturbs along its own gradient; only the last pass's is averaged. ``model`` is then a
            ``DistributedDataParallel``, or the closure takes a keyword ``ddp_sync``.

    Raises:
        TypeError: ``model`` is no module, or one of the others is not True or False.
        ValueError: ``m_sharpness`` with a ``model`` that has no ``no_sync``.
    """

    def __init__(self, model: Module | None = None, same_rng: bool = False, m_sharpness: bool = False) -> None:
        if model is not None and not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module or None, not {shown(model)}")
        for name, flag in (("same_rng", same_rng), ("m_sharpness", m_sharpness)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, not {shown(flag)}")
        if m_sharpness and model is not None and not hasattr(model, "no_sync"):
            raise ValueError(f"m_sharpness needs a model with no_sync(), not {type(model).__name__}")
        self.model, self.same_rng, self.m_sharpness = model, same_rng, m_sharpness
        self._plain = model is None and not same_rng and not m_sharpness
        self._generators: list[Tensor] = []
        self._between = ExitStack()

    def run(self, closure: Callable[..., Any], number: int, of: int) -> Any:
        """Pass ``number`` of a step with ``of`` passes: the closure's loss."""
        if self._plain or of == 1:
            return closure()
        if self.same_rng:
            self._rewind(first=number == 0)
        with ExitStack() as stack:
            if number > 0 and self.model is not None:
                stack.enter_context(frozen_running_stats(self.model))
            if not self.m_sharpness:
                return closure()
            local = number < of - 1
            if local and self.model is not None:
                stack.enter_context(self.model.no_sync())  # type: ignore[operator]
            if _takes_ddp_sync(closure):
                return closure(ddp_sync=not local)
            if self.model is None:
                raise RuntimeError("m_sharpness needs model=, or a closure that takes ddp_sync and does as it says")
            return closure()

    def open(self) -> None:
        """In the two-call style: the user's second pass begins.

        Raises:
            RuntimeError: ``same_rng``, as the first pass is over.
        """
        if self.same_rng:
            raise RuntimeError("same_rng needs step(closure): before first_step() the random numbers are drawn already")
        if self.model is not None:
            self._between.enter_context(frozen_running_stats(self.model))

    def close(self) -> None:
        """The user's second pass is over."""
        if not self._plain:
            self._between.close()

    def _rewind(self, first: bool) -> None:
        if first:
            self._generators = [torch.get_rng_state()]
            if torch.cuda.is_initialized():
                self._generators += torch.cuda.get_rng_state_all()
        else:
            torch.set_rng_state(self._generators[0])
            if len(self._generators) > 1:
                torch.cuda.set_rng_state_all(self._generators[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "same_rng": self.same_rng, "m_sharpness": self.m_sharpness}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PassRunner.__init__(self, **state)


def _takes_ddp_sync(closure: Callable[..., Any]) -> bool:
    return "ddp_sync" in inspect.signature(closure).parameters
