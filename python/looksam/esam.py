"""ESAM, and the losses of single samples by which it chooses those of its second gradient."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from looksam.hyper import COMMON, RANGES, within
from looksam.optimizer import SharpnessAware
from looksam.plans import PLAIN, Plan, Variant, sharp_plan
from looksam.types import BackendName, BaseOptimizer, Closure, ParameterFilter


class ESAM(SharpnessAware):
    """ESAM: perturbs some weights at random; second gradient on the samples whose loss rose most. Du et al. 2022.

    e = (rho / beta) b g / (||g|| + perturb_eps), b ~ Bernoulli(beta) for each element. Of the B samples of the batch the
    gamma B whose losses grow most from w to w + e are kept; s is the gradient of their mean loss; base update with s.

    The closure is not that of the other variants: ``closure(kept)`` computes and returns the losses of single samples, a
    1-D tensor, of the samples that the index tensor ``kept`` names, or of the whole batch where it is ``None``. It does
    not call backward; the optimizer does, on the mean. ``step`` returns the mean of the first losses. Under a GradScaler
    the closure returns scaled losses.

    Passes per step: 1 + 0.83/k. Extra memory: 1 model copy (w).
    When: the second pass should cost less and use the samples that matter; with gamma = 0.5 it is 1/3 (the forward pass for
    the choice, without gradients) + 0.5. The loss must be a mean over samples.

    Args:
        beta: share of the elements that are perturbed, in (0, 1]; the same in all groups, as gamma and seed.
        gamma: share of the samples that are kept, in (0, 1]: gamma B rounded, at least one. With 1 none are chosen, and the
            forward pass for the choice is left out.
        seed: of the masks, at least 0. Every sharp step draws another; ``draws`` in every group counts them. All ranks draw
            the same; of sharded parameters each rank draws for its shard. A captured CUDA graph repeats its mask.

    beta = gamma = 1 is SAM. The others, and the errors: :class:`looksam.SAM`.

    Raises:
        TypeError: from ``step``: the closure takes no ``kept``, or does not return a 1-D tensor.
        RuntimeError: from ``step``: the closure called backward. From ``first_step``, always.
    """

    ranges = RANGES | {"beta": within(0, 1, without=0), "gamma": within(0, 1, without=0)}
    shared = (*COMMON, "beta", "gamma", "seed")
    counted = ("phase", "draws")
    per_sample = True
    _losses: Tensor | None = None
    """Of the whole batch at w, until the samples are chosen."""

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int = 0,
        k: int = 1,
        perturb_eps: float = 1e-12,
        adaptive: bool = False,
        eta: float = 0.01,
        adaptive_filter: ParameterFilter | None = None,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "beta": beta, "gamma": gamma, "seed": seed, "draws": 0}
        hyper |= {"k": k, "perturb_eps": perturb_eps}
        hyper |= {"adaptive": adaptive, "eta": eta, "adaptive_filter": adaptive_filter, "precondition": precondition}
        variant = Variant(sharp=sharp_plan("esam", "at_perturbed"), between=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)

    def first_step(self, zero_grad: bool = False) -> bool:
        """Not for ESAM, which chooses samples between its passes.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"ESAM cannot be split into first_step and second_step; call step(closure): {CLOSURE}")

    def _pass(self, closure: Closure, number: int, of: int) -> Any:
        kept, gamma = None, self.param_groups[0]["gamma"]
        if number == 0:
            check_closure(closure)
        elif gamma < 1:
            after = super()._pass(only_losses(closure), number, of)
            torch.clear_autocast_cache()  # in older torch it holds casts of the weights without a graph
            assert self._losses is not None
            kept = sharpest(self._losses, after, gamma)
        params = [p for group in self.param_groups for p in group["params"]]
        losses = super()._pass(with_backward(closure, kept, params), number, of)
        self._losses = losses if number + 1 < of else None
        return losses.mean()

    def _advance(self, plan: Plan) -> None:
        super()._advance(plan)
        for group in self.param_groups:
            group["draws"] += plan is self.variant.sharp


SampleClosure = Callable[..., Any]
"""``closure(kept)``: the losses, one a sample, of the samples that the index tensor ``kept`` names; ``None`` is all."""

CLOSURE = (
    "closure(kept) computes and returns the losses of single samples, a 1-D tensor (in a loss function of torch: "
    "reduction='none'), of the samples that the index tensor kept names, or of all where kept is None; the optimizer "
    "calls backward itself"
)


def only_losses(closure: SampleClosure) -> SampleClosure:
    """The losses of all samples, without a graph."""

    @functools.wraps(closure)
    def run(**options: Any) -> Tensor:
        with torch.no_grad():
            return _checked(closure(None, **options), None)

    return run


def with_backward(closure: SampleClosure, kept: Tensor | None, params: Sequence[Tensor]) -> SampleClosure:
    """The losses of the kept samples, and the gradient of their mean in ``params``, where there was none before."""

    @functools.wraps(closure)
    def run(**options: Any) -> Tensor:
        for p in params:
            p.grad = None
        losses = _checked(closure(kept, **options), kept)
        if any(p.grad is not None for p in params):
            raise RuntimeError(f"the closure called backward: take that out; {CLOSURE}")
        losses.mean().backward()
        return losses.detach()

    return run


def check_closure(closure: SampleClosure) -> None:
    """
    Raises:
        TypeError: the closure cannot be called with the kept samples.
    """
    try:
        inspect.signature(closure).bind(None)
    except TypeError as error:
        raise TypeError(f"the closure takes no kept samples ({error}): {CLOSURE}") from None


def sharpest(before: Tensor, after: Tensor, gamma: float) -> Tensor:
    """The gamma B samples (rounded, at least one) whose losses grew most, in the order of the batch; ties go to the first."""
    if before.shape != after.shape:
        raise ValueError(
            f"the closure returned {len(before)} losses at w and {len(after)} at w + e for the same samples"
        )
    count = max(1, round(gamma * len(before)))
    return (after - before).argsort(descending=True, stable=True)[:count].sort().values


def _checked(losses: Any, kept: Tensor | None) -> Tensor:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise TypeError(f"the closure returned {found}: {CLOSURE}")
    if kept is not None and len(losses) != len(kept):
        raise ValueError(f"the closure returned {len(losses)} losses for {len(kept)} kept samples: {CLOSURE}")
    return losses
