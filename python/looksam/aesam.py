"""The variants that decide by the gradient whether a step is sharp."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, sqrt
from typing import Any

from torch import Tensor

from looksam.hyper import COMMON
from looksam.optimizer import SharpnessAware
from looksam.plans import PLAIN, REUSE, Plan, Variant, sharp_plan
from looksam.steps import RunningStep
from looksam.types import BackendName, BaseOptimizer, NormScope


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
        between: Plan,
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
        variant = Variant(sharp=sharp_plan("sam", descent), between=between)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)

    def _decide(self, step: RunningStep, grad_scale: Tensor | None) -> None:
        step.plan = self.variant.between
        step.take_gradients(step.plan.passes[0])
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
    ``first_step`` the scale, on which x depends, is unknown.

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
        super().__init__(params, base_optimizer, PLAIN, "at_perturbed", hyper, backend, base_kwargs)


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
