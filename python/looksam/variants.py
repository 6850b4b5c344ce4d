"""The variants: each a row of three choices (when, ascent, descent) and its hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from looksam.optimizer import SharpnessAware
from looksam.plans import PLAIN, Look, Plan, Variant

BaseOptimizer = str | type[Optimizer]

REUSE = Plan((Look("g"),), "looksam_reuse")


def _two_looks(ascent: str, descent: str) -> Plan:
    """g at w, s at w + e."""
    return Plan((Look("g"), Look("s", ascent)), descent)


class SAM(SharpnessAware):
    """SAM: e = rho g / (||g|| + perturb_eps), then the base update with the gradient at w + e. Foret et al. 2021.

    ``adaptive=True`` is ASAM (Kwon et al. 2021): e = rho T^2 g / (||T g|| + perturb_eps), T = |w| + eta on tensors with
    two or more dimensions, 1 on the others; take rho about ten times larger. k > 1 is SAM-k: a SAM step, then k - 1
    plain steps of the base.

    Passes per step: 1 + 1/k. Extra memory: a copy of the weights (and of the gradients during a sharp step).

    Args:
        rho: radius of the perturbation (L2, all tensors jointly), >= 0; per group.
        adaptive: scale the perturbation with the weights; per group.
        k: look twice on every k-th step, >= 1.
        perturb_eps: added to the norm.
        eta: ASAM's offset, >= 0; per group.

    ``params``, ``base_optimizer``, ``backend``, ``base_kwargs`` and the errors: :class:`looksam.SharpnessAware`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        k: int = 1,
        perturb_eps: float = 1e-12,
        eta: float = 0.01,
        backend: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {"rho": rho, "adaptive": adaptive, "k": k, "perturb_eps": perturb_eps, "eta": eta}
        variant = Variant(sharp=_two_looks("sam", "second"), cheap=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class LookSAM(SharpnessAware):
    """LookSAM: looks twice on every k-th step and reuses what changes slowly in between. Liu et al. 2022.

    On step 0, k, 2k, ...: e = rho g / ||g||, s = gradient at w + e, q = s - (<g,s> / ||g||^2) g, base update with s.
    On the others, after one pass: base update with g + alpha (||g|| / ||q||) q.

    Passes per step: 1 + 1/k. Extra memory: q and a copy of the weights.

    Args:
        rho: radius of the perturbation, >= 0; per group.
        k: look twice on every k-th step, >= 1; k = 1 is SAM.
        alpha: weight of the reused component, >= 0; per group. 0.7 in the paper; smaller with noisy labels.
        norm_scope: norms and projection over all tensors jointly (``"global"``) or per tensor (``"tensor"``).
        perturb_eps: added to ||g|| in the perturbation.

    ``params``, ``base_optimizer``, ``backend``, ``base_kwargs`` and the errors: :class:`looksam.SharpnessAware`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        norm_scope: str = "global",
        perturb_eps: float = 1e-12,
        backend: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {"rho": rho, "k": k, "alpha": alpha, "norm_scope": norm_scope, "perturb_eps": perturb_eps}
        variant = Variant(sharp=_two_looks("sam", "looksam_refresh"), cheap=REUSE)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class LayerSAM(SharpnessAware):
    """LayerSAM: SAM with a perturbation scaled per tensor by L_p = ||w_p|| / ||g_p||. Liu et al. 2022.

    ======================  ==============================  ===========================
    ``layer_scale``         e_p                             size of e_p
    ======================  ==============================  ===========================
    ``"trust_normalized"``  rho L_p g_p / ||L g||           rho ||w_p|| / ||w||
    ``"trust"``             rho L_p g_p                     rho ||w_p||
    ``"trust_global"``      rho L_p g_p / ||g||             rho ||w_p|| / ||g||
    ``"unit"``              rho g_p / ||g_p||               rho
    ======================  ==============================  ===========================

    L_p = 1 where ||w_p|| = 0. The paper's public readings differ; the default keeps the meaning of rho: ||e|| = rho.

    Passes per step: 1 + 1/k. Extra memory: a copy of the weights.

    Args:
        rho: radius of the perturbation, >= 0; per group.
        k: look twice on every k-th step, >= 1.
        layer_scale: see the table.
        layer_filter: which tensors are scaled, a function parameter -> bool; default: all. The others have L_p = 1.
        perturb_eps: added to the norm.

    ``params``, ``base_optimizer``, ``backend``, ``base_kwargs`` and the errors: :class:`looksam.SharpnessAware`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 1,
        layer_scale: str = "trust_normalized",
        layer_filter: Callable[[Tensor], bool] | None = None,
        perturb_eps: float = 1e-12,
        backend: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {
            "rho": rho,
            "k": k,
            "layer_scale": layer_scale,
            "layer_filter": layer_filter,
            "perturb_eps": perturb_eps,
        }
        variant = Variant(sharp=_two_looks(layer_scale, "second"), cheap=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class LookLayerSAM(SharpnessAware):
    """Look-LayerSAM: LayerSAM's perturbation with LookSAM's reuse, for very large batches over LAMB. Liu et al. 2022.

    Formulas and arguments: :class:`LayerSAM` for the perturbation, :class:`LookSAM` for the rest.

    Passes per step: 1 + 1/k. Extra memory: q and a copy of the weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        norm_scope: str = "global",
        layer_scale: str = "trust_normalized",
        layer_filter: Callable[[Tensor], bool] | None = None,
        perturb_eps: float = 1e-12,
        backend: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {
            "rho": rho,
            "k": k,
            "alpha": alpha,
            "norm_scope": norm_scope,
            "layer_scale": layer_scale,
            "layer_filter": layer_filter,
            "perturb_eps": perturb_eps,
        }
        variant = Variant(sharp=_two_looks(layer_scale, "looksam_refresh"), cheap=REUSE)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class LAMB(SharpnessAware):
    """LAMB, fused: Adam's direction with decay, scaled per tensor by the trust ratio. You et al. 2020.

    g /= max(1, ||g|| / max_grad_norm); m, v as in Adam with bias correction; u = m / (sqrt(v) + eps) + weight_decay w;
    w -= lr r u with r = ||w_p|| / ||u_p||, 1 where either is 0 and where weight_decay = 0 unless ``always_adapt``.

    Args:
        lr, betas, eps, weight_decay, maximize: as torch.optim.Adam; lr may be a 0-dim tensor.
        max_grad_norm: clips the global norm of the gradients; ``None``: not.
        always_adapt: use the trust ratio in groups without weight decay too.
        trust_clip: r at most 1.
        backend: see :class:`looksam.SharpnessAware`.
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
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        base_kwargs = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
            "maximize": maximize,
        }
        variant = Variant(sharp=PLAIN, cheap=PLAIN)
        super().__init__(params, "lamb", variant, {}, backend=backend, base_kwargs=base_kwargs)


VARIANTS: dict[str, type[SharpnessAware]] = {
    cls.__name__.lower(): cls for cls in (SAM, LookSAM, LayerSAM, LookLayerSAM)
}
"""The sharpness-aware optimizers by lower-case name."""
