"""The variants that decide during a step: which weights and samples to use, or whether the step is sharp."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from looksam import samples
from looksam.hyper import COMMON, RANGES, within
from looksam.optimizer import SharpnessAware
from looksam.plans import PLAIN, REUSE, Plan, Variant, two_looks
from looksam.steps import Step
from looksam.types import BackendName, BaseOptimizer, Closure, NormScope


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
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {"rho": rho, "beta": beta, "gamma": gamma, "seed": seed, "draws": 0, "k": k, "perturb_eps": perturb_eps}
        variant = Variant(sharp=two_looks("esam", "second"), cheap=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)

    def first_step(self, zero_grad: bool = False) -> bool:
        """Not for ESAM, which chooses samples between its passes.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"ESAM cannot be split into first_step and second_step; call step(closure): {samples.CLOSURE}"
        )

    def _pass(self, closure: Closure, number: int, of: int) -> Any:
        kept, gamma = None, self.param_groups[0]["gamma"]
        if number == 0:
            samples.check_closure(closure)
        elif gamma < 1:
            after = super()._pass(samples.only_losses(closure), number, of)
            torch.clear_autocast_cache()  # in older torch it holds casts of the weights without a graph
            assert self._losses is not None
            kept = samples.sharpest(self._losses, after, gamma)
        params = [p for group in self.param_groups for p in group["params"]]
        losses = super()._pass(samples.with_backward(closure, kept, params), number, of)
        self._losses = losses if number + 1 < of else None
        return losses.mean()

    def _advance(self, plan: Plan) -> None:
        super()._advance(plan)
        for group in self.param_groups:
            group["draws"] += plan is self.variant.sharp


class _Deciding(SharpnessAware):
    """Makes a sharp step when the gradient is large compared with its recent values."""

    shared = (*COMMON, "total_steps", "delta", "lambda1", "lambda2")
    counted = ("phase", "mu", "var", "t")
    _statistics: tuple[float, float] = (0.0, 0.0)
    """mu and var with the gradient of the step under way."""

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        cheap: Plan,
        descent: str,
        hyper: dict[str, Any],
        backend: BackendName | None,
        base_kwargs: dict[str, Any],
    ) -> None:
        if base_kwargs.get("m_sharpness"):
            raise ValueError(
                f"{type(self).__name__} takes no m_sharpness: all ranks must decide alike, by the mean gradient"
            )
        hyper = {**hyper, "mu": 0.0, "var": 0.0, "t": 0}
        variant = Variant(sharp=two_looks("sam", descent), cheap=cheap)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)

    def _decide(self, step: Step, grad_scale: Tensor | None) -> None:
        step.plan = self.variant.cheap
        step.collect(step.plan.looks[0])
        x = step.norm_sq(grad_scale).item()
        h = self.param_groups[0]
        mu, var, delta, part = h["mu"], h["var"], h["delta"], min(h["t"] / h["total_steps"], 1)
        if isfinite(x):
            mu = delta * mu + (1 - delta) * x
            var = delta * var + (1 - delta) * (x - mu) ** 2
            if x >= mu + (part * h["lambda1"] + (1 - part) * h["lambda2"]) * sqrt(var):
                step.plan = self.variant.sharp
        self._statistics = mu, var

    def _advance(self, plan: Plan) -> None:
        super()._advance(plan)
        mu, var = self._statistics
        for group in self.param_groups:
            group.update(mu=mu, var=var, t=group["t"] + 1)


class AESAM(_Deciding):
    """AE-SAM: a sharp step when the gradient is large compared with recent ones, else a plain step. Jiang et al. 2023.

    x = ||g||^2; mu = delta mu + (1 - delta) x; var = delta var + (1 - delta) (x - mu)^2 with the new mu; the step is SAM's
    if x >= mu + c_t sqrt(var), c_t = (t/T) lambda1 + (1 - t/T) lambda2, else the base's. t counts the steps done, in 0 to
    T = ``total_steps``. mu and var begin with 0, so that the first step is sharp unless c_0 > 1 / sqrt(1 - delta).

    The host reads x, once a step: the one variant that makes it wait for the device. Where x is not finite, mu and var stay
    and the step is left out. ``mu``, ``var`` and ``t`` stand in every group. ``needs_second_pass`` is true until the first
    gradient has decided; ``first_step`` returns what it was. With a GradScaler call ``step(closure)``: before
    ``first_step`` nobody says what the scale is, on which x depends.

    Passes per step: 1 or 2. Extra memory: 1 model copy (w).
    When: SAM at a lower price, with the passes where they matter rather than in every k-th step.

    Args:
        total_steps: T, >= 1; c_t stays at lambda1 after it; the same in all groups, as the next three.
        delta: what mu and var keep of themselves, in [0, 1).
        lambda1, lambda2: c_t at the end and at the beginning: the lower, the more sharp steps.

    The others, and the errors: :class:`looksam.SAM`. ``m_sharpness`` is refused: all ranks must decide alike.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        total_steps: int,
        rho: float = 0.05,
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "total_steps": total_steps, "delta": delta}
        hyper |= {"lambda1": lambda1, "lambda2": lambda2}
        hyper |= {"perturb_eps": perturb_eps}
        super().__init__(params, base_optimizer, PLAIN, "second", hyper, backend, base_kwargs)


class AELookSAM(_Deciding):
    """AE-LookSAM: AE-SAM's choice of the sharp steps, LookSAM's reuse steps between them. Jiang et al. 2023.

    Sharp: s at w + rho g / ||g||, q = s - (<g,s> / ||g||^2) g, base update with s. Else: base update with
    g + alpha (||g|| / ||q||) q. Which of them, and what that costs: :class:`looksam.AESAM`.

    Passes per step: 1 or 2. Extra memory: 2 model copies (w, q).
    When: as AE-SAM, and the steps between shall be sharpness-aware too.

    Args:
        alpha, norm_scope: as :class:`looksam.LookSAM`.

    The others, and the errors: :class:`looksam.AESAM`. State per parameter beside the base's: ``q``, ``q_norm_sq``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        total_steps: int,
        rho: float = 0.05,
        alpha: float = 0.7,
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        norm_scope: NormScope = "global",
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "total_steps": total_steps, "delta": delta}
        hyper |= {"lambda1": lambda1, "lambda2": lambda2}
        hyper |= {"alpha": alpha, "norm_scope": norm_scope, "perturb_eps": perturb_eps}
        super().__init__(params, base_optimizer, REUSE, "looksam_refresh", hyper, backend, base_kwargs)
