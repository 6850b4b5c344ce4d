"""The fused bases that torch.optim lacks, as optimizers by themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Never

from looksam.messages import refuse
from looksam.optimizer import SharpnessAware
from looksam.plans import PLAIN, Variant
from looksam.types import BackendName, NonFinite, WeightRounding


class LAMB(SharpnessAware):
    """LAMB, fused: Adam's direction with decay, scaled per tensor by the trust ratio. You et al. 2020.

    g /= max(1, ||g|| / max_grad_norm); m, v as in Adam; u = m / (sqrt(v) + eps) + weight_decay w;
    w -= lr r u with r = ||w_p|| / ||u_p||, 1 where either is 0 and where weight_decay = 0 unless ``always_adapt``.

    Args:
        lr, betas, eps, weight_decay, maximize: as torch.optim.Adam; lr may be a 0-dim tensor.
        max_grad_norm: clips the global norm of the gradients; ``None``: not.
        always_adapt: use the trust ratio in groups without weight decay too.
        trust_clip: r at most 1.
        bias_correction: without it m and v are used as they are, as in the implementations for BERT.
        nonfinite, rounding, rounding_seed, backend: see :class:`looksam.SharpnessAware`.
    """

    fused_base = "lamb"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        always_adapt: bool = False,
        trust_clip: bool = False,
        bias_correction: bool = True,
        maximize: bool = False,
        nonfinite: NonFinite = "skip",
        rounding: WeightRounding | None = None,
        rounding_seed: int = 0,
        backend: BackendName | None = None,
        **unknown: Never,
    ) -> None:
        refuse(unknown, type(self))
        base_kwargs = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "rounding_seed": rounding_seed,
        }
        variant = Variant(sharp=PLAIN, between=PLAIN)
        super().__init__(params, "lamb", variant, {}, backend=backend, base_kwargs=base_kwargs)


class LARS(SharpnessAware):
    """LARS, fused: SGD whose direction, with decay, is scaled per tensor by the trust ratio. You, Gitman & Ginsburg 2017.

    r = trust_coefficient ||w_p|| / (||g_p|| + weight_decay ||w_p|| + eps), 1 where either norm is 0 and where
    weight_decay = 0 unless ``always_adapt``; then SGD with momentum of r (g + weight_decay w), as torch.optim.SGD.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD; lr may be a 0-dim tensor.
        trust_coefficient: >= 0.
        eps: >= 0, added to the denominator.
        trust_clip: r = min(1, r / lr), so that a tensor's rate is the smaller of lr and r (LARC).
        always_adapt: use the trust ratio in groups without weight decay too.
        max_grad_norm: clips the global norm of the gradients before; ``None``: not.
        nonfinite, rounding, rounding_seed, backend: see :class:`looksam.SharpnessAware`.
    """

    fused_base = "lars"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        nonfinite: NonFinite = "skip",
        rounding: WeightRounding | None = None,
        rounding_seed: int = 0,
        backend: BackendName | None = None,
        **unknown: Never,
    ) -> None:
        refuse(unknown, type(self))
        base_kwargs = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "max_grad_norm": max_grad_norm,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "rounding_seed": rounding_seed,
        }
        variant = Variant(sharp=PLAIN, between=PLAIN)
        super().__init__(params, "lars", variant, {}, backend=backend, base_kwargs=base_kwargs)


class Lion(SharpnessAware):
    """Lion, fused: steps of size lr in the direction of a sign. Chen et al. 2023.

    w *= 1 - lr weight_decay; w -= lr sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g. The lr is three to ten
    times smaller than AdamW's, the weight decay larger by as much.

    Args:
        lr: > 0; may be a 0-dim tensor.
        betas: weights of m in the sign and in its own average.
        weight_decay: decoupled, as torch.optim.AdamW's.
        max_grad_norm: clips the global norm of the gradients before; ``None``: not.
        maximize: ascend instead of descend.
        nonfinite, rounding, rounding_seed, backend: see :class:`looksam.SharpnessAware`.
    """

    fused_base = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        nonfinite: NonFinite = "skip",
        rounding: WeightRounding | None = None,
        rounding_seed: int = 0,
        backend: BackendName | None = None,
        **unknown: Never,
    ) -> None:
        refuse(unknown, type(self))
        base_kwargs = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "rounding_seed": rounding_seed,
        }
        variant = Variant(sharp=PLAIN, between=PLAIN)
        super().__init__(params, "lion", variant, {}, backend=backend, base_kwargs=base_kwargs)
