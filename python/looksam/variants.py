"""The variants: each a row of three choices (when, ascent, descent) and its hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from looksam.aesam import AESAM, AELookSAM
from looksam.esam import ESAM
from looksam.hyper import RANGES, Group, within
from looksam.one_pass import MSAM, S2SAM
from looksam.optimizer import SharpnessAware
from looksam.plans import PLAIN, REUSE, Pass, Plan, Variant, sharp_plan
from looksam.sampa import SAMPa
from looksam.types import BackendName, BaseOptimizer, LayerScale, NormScope, ParameterFilter


class SAM(SharpnessAware):
    """SAM: e = rho g / (||g|| + perturb_eps), then the base update with the gradient at w + e. Foret et al. 2021.

    ``adaptive=True`` is :class:`looksam.ASAM`. k > 1 is SAM-k: a SAM step, then k - 1 plain steps of the base.

    Passes per step: 1 + 1/k. Extra memory: 1 model copy (w).
    When: the reference point, where two passes in every step are affordable; k > 1 only as a baseline for LookSAM.

    Args:
        rho: radius of the perturbation (L2, all tensors jointly), >= 0; per group.
        adaptive, eta, adaptive_filter: scale the perturbation with the weights; per group; see :class:`looksam.ASAM`.
        k: a sharp step on every k-th step, >= 1.
        perturb_eps: added to the norm.
        normalization: l in e = rho (1 - l + l / ||g||) g, in [0, 1]; 0: without the norm; per group.
        strength: a in d = a s + (1 - a) g on the sharp steps, >= 0; per group. k: as much in k steps as SAM in each.

    Beside these, ``precondition=True`` scales the perturbation as the base scales its update: e = rho T g / (||T g|| +
    perturb_eps), T = 1 / (sqrt(v) + eps), eps the base's and v its second moment as a step with g would make it, over Adam
    v = (beta2 v_old + (1 - beta2) g^2) / (1 - beta2^t). So ||e|| is still rho, and in the first step T is about 1 / |g|. It
    is for the bases with a second moment, by name: adam, adamw, lamb, adagrad, rmsprop, adadelta, adan (any other is a
    ValueError); the same in all groups; not together with ``adaptive``. Zhang, Li & Giannakis 2025. See :doc:`formulas`.

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
        adaptive_filter: ParameterFilter | None = None,
        normalization: float = 1.0,
        strength: float = 1.0,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "k": k, "perturb_eps": perturb_eps, "eta": eta}
        hyper |= {"adaptive_filter": adaptive_filter, "precondition": precondition}
        hyper |= {"normalization": normalization, "strength": strength}
        variant = Variant(sharp=sharp_plan("sam", "at_perturbed"), between=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class LookSAM(SharpnessAware):
    """LookSAM: a sharp step on every k-th step; the steps between reuse what changes slowly. Liu et al. 2022.

    On step 0, k, 2k, ...: e = rho g / ||g||, s = gradient at w + e, q = s - (<g,s> / ||g||^2) g, base update with s.
    On the others, after one pass: base update with g + alpha (||g|| / ||q||) q.

    Passes per step: 1 + 1/k. Extra memory: 2 model copies (w, q).
    When: SAM's effect at little more than the base's cost; take this one first.

    Args:
        k: a sharp step on every k-th step, >= 1; k = 1 is SAM.
        alpha: weight of the reused component, >= 0; per group. 0.7 in the paper; smaller with a large rho, or where
            training underfits.
        norm_scope: norms and projection over all tensors jointly (``"global"``) or per tensor (``"tensor"``).
        rho, perturb_eps, adaptive, eta, adaptive_filter, normalization, strength, precondition: as in :class:`looksam.SAM`.

    Beside these: those of the base (``lr``, ``weight_decay``, ``momentum`` or ``betas``, ...); ``max_grad_norm``, to clip;
    ``model``, so that the running statistics of batch norms move once a step. Everything else, and the errors:
    :class:`looksam.SharpnessAware`.

    Example::

        optimizer = LookSAM(model.parameters(), "adamw", lr=1e-3, k=5, model=model)
        for x, y in loader:

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        norm_scope: NormScope = "global",
        perturb_eps: float = 1e-12,
        adaptive: bool = False,
        eta: float = 0.01,
        adaptive_filter: ParameterFilter | None = None,
        normalization: float = 1.0,
        strength: float = 1.0,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "k": k, "alpha": alpha, "norm_scope": norm_scope}
        hyper |= {"perturb_eps": perturb_eps, "adaptive": adaptive, "eta": eta, "adaptive_filter": adaptive_filter}
        hyper |= {"normalization": normalization, "strength": strength, "precondition": precondition}
        variant = Variant(sharp=sharp_plan("sam", "looksam_refresh"), between=REUSE)
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

    Passes per step: 1 + 1/k. Extra memory: 1 model copy (w).
    When: layers whose weights and gradients differ much in scale; large batches over LAMB.

    Args:
        layer_scale: see the table.
        layer_filter: which tensors are scaled, a function parameter -> bool; default: all. The others have L_p = 1.

    The others, and the errors: :class:`looksam.SAM`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 1,
        layer_scale: LayerScale = "trust_normalized",
        layer_filter: ParameterFilter | None = None,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "k": k, "perturb_eps": perturb_eps}
        hyper |= {"layer_scale": layer_scale, "layer_filter": layer_filter}
        variant = Variant(sharp=sharp_plan(layer_scale, "at_perturbed"), between=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class LookLayerSAM(SharpnessAware):
    """Look-LayerSAM: LayerSAM's perturbation with LookSAM's reuse, for very large batches over LAMB. Liu et al. 2022.

    Formulas and arguments: :class:`LayerSAM` for the perturbation, :class:`LookSAM` for the rest.

    Passes per step: 1 + 1/k. Extra memory: 2 model copies (w, q).
    When: very large batches over LAMB.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        norm_scope: NormScope = "global",
        layer_scale: LayerScale = "trust_normalized",
        layer_filter: ParameterFilter | None = None,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {
            "rho": rho,
            "k": k,
            "alpha": alpha,
            "norm_scope": norm_scope,
            "perturb_eps": perturb_eps,
        }
        hyper |= {"layer_scale": layer_scale, "layer_filter": layer_filter}
        variant = Variant(sharp=sharp_plan(layer_scale, "looksam_refresh"), between=REUSE)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class ASAM(SAM):
    """ASAM: SAM with a perturbation that follows the size of the weights. Kwon et al. 2021.

    e = rho T^2 g / (||T g|| + perturb_eps), T = |w| + eta on the tensors of the filter, 1 on the others; then the base
    update with the gradient at w + e. The same as ``SAM(adaptive=True)``.

    Passes per step: 1 + 1/k. Extra memory: 1 model copy (w).
    When: layers whose weights differ much in scale, as without normalization.

    Args:
        rho: as SAM's, but about ten times as large.
        eta: added to the size of each weight, >= 0; per group.
        adaptive_filter: a function parameter -> bool; default: tensors with two or more dimensions. See :doc:`migration`.

    The others, and the errors: :class:`looksam.SAM`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.5,
        eta: float = 0.01,
        k: int = 1,
        perturb_eps: float = 1e-12,
        adaptive_filter: ParameterFilter | None = None,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        more = {"adaptive_filter": adaptive_filter, "backend": backend, **base_kwargs}
        super().__init__(params, base_optimizer, rho, True, k, perturb_eps, eta, **more)


class SSAM(SharpnessAware):
    """SSAM: SAM's direction at the length of the plain gradient. Tan et al. 2024.

    e as SAM; s the gradient at w + e; base update with d = (||g|| / (||s|| + perturb_eps)) s, also if the
    perturbation is adaptive.

    Passes per step: 1 + 1/k. Extra memory: 1 model copy (w).
    When: SAM is unstable at the desired rho or learning rate.

    Args: as :class:`looksam.SAM`, and its errors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 1,
        perturb_eps: float = 1e-12,
        adaptive: bool = False,
        eta: float = 0.01,
        adaptive_filter: ParameterFilter | None = None,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "k": k, "perturb_eps": perturb_eps, "adaptive": adaptive, "eta": eta}
        hyper |= {"adaptive_filter": adaptive_filter, "precondition": precondition}
        variant = Variant(sharp=sharp_plan("sam", "ssam"), between=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class GSAM(SharpnessAware):
    """GSAM: minimizes the perturbed loss together with its gap to the loss at w. Zhuang et al. 2022.

    e as SAM with rho_t; d = (1 + alpha c) s - alpha g, c = <g,s> / (||s||^2 + perturb_eps). rho_t is rho; with ``lr_max``
    it follows the learning rate: rho_t = rho_min + (rho - rho_min) (lr_t - lr_min) / (lr_max - lr_min).

    Passes per step: 1 + 1/k. Extra memory: 1 model copy (w).
    When: long schedules with a decaying learning rate; also to keep the loss at w and at w + e close.

    Args:
        alpha: weight of what is taken off, the part of g orthogonal to s, >= 0; 0 is SAM; per group, as the next.
        rho_min, lr_max, lr_min: of the schedule, rho_min <= rho, lr_min < lr_max.

    The others, and the errors: :class:`looksam.SAM`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        alpha: float = 0.4,
        rho_min: float = 0.0,
        lr_max: float | None = None,
        lr_min: float = 0.0,
        k: int = 1,
        perturb_eps: float = 1e-12,
        adaptive: bool = False,
        eta: float = 0.01,
        adaptive_filter: ParameterFilter | None = None,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "alpha": alpha, "rho_min": rho_min, "lr_max": lr_max, "lr_min": lr_min}
        hyper |= {"k": k, "perturb_eps": perturb_eps}
        hyper |= {"adaptive": adaptive, "eta": eta, "adaptive_filter": adaptive_filter, "precondition": precondition}
        variant = Variant(sharp=sharp_plan("sam", "gsam"), between=PLAIN, radius=_follows_lr)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


def _follows_lr(group: Group) -> Any:
    rho, low, lr_max, lr_min = (group[name] for name in ("rho", "rho_min", "lr_max", "lr_min"))
    return rho if lr_max is None else low + (rho - low) * (group["lr"] - lr_min) / (lr_max - lr_min)


class WSAM(SharpnessAware):
    """WSAM: sharpness as a regularizer with its own weight. Yue et al. 2023.

    e as SAM; a = gamma / (1 - gamma). Decoupled: base update with g, then w -= lr a (s - g), which no preconditioner
    rescales. Coupled: base update with d = a s + (1 - a) g; gamma = 0.5 is SAM.

    Passes per step: 1 + 1/k. Extra memory: 1 model copy (w).
    When: sharpness should weigh more, or less, than in SAM; adaptive bases.

    Args:
        gamma: weight of the sharpness, in [0, 1); per group.
        decouple: which of the two.

    The others, and the errors: :class:`looksam.SAM`.
    """

    ranges = RANGES | {"gamma": within(0, 1, without=1)}

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        k: int = 1,
        perturb_eps: float = 1e-12,
        adaptive: bool = False,
        eta: float = 0.01,
        adaptive_filter: ParameterFilter | None = None,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "gamma": gamma, "decouple": decouple, "k": k, "perturb_eps": perturb_eps}
        hyper |= {"adaptive": adaptive, "eta": eta, "adaptive_filter": adaptive_filter, "precondition": precondition}
        variant = Variant(sharp=sharp_plan("sam", "wsam" if decouple else "wsam_coupled"), between=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class CRSAM(SharpnessAware):
    """CR-SAM: penalizes the curvature, measured with a third pass at w - e. Wu et al. 2024.

    e as SAM; s and r the gradients at w + e and w - e; d = (1 + gamma + beta) s + (gamma - beta) r - 2 gamma g.
    ``step(closure)`` calls the closure three times; there is no ``first_step``.

    Passes per step: 1 + 2/k. Extra memory: 1 model copy (w).
    When: the loss is far from linear within rho, so that s alone misleads.

    Args:
        gamma: weight of the curvature's gradient, >= 0; per group.
        beta: weight of s - r, >= 0; per group. Both 0 is SAM.

    The others, and the errors: :class:`looksam.SAM`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.1,
        gamma: float = 0.1,
        beta: float = 0.1,
        k: int = 1,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {"rho": rho, "gamma": gamma, "beta": beta, "k": k, "perturb_eps": perturb_eps}
        passes = (*sharp_plan("sam", "crsam").passes, Pass("r", "opposite"))
        variant = Variant(sharp=Plan(passes, "crsam"), between=PLAIN)
        super().__init__(params, base_optimizer, variant, hyper, backend=backend, base_kwargs=base_kwargs)


class VaSSO(SharpnessAware):
    """VaSSO: perturbs along a moving average of the gradients, which has less noise. Li & Giannakis 2023.

    m = (1 - theta) m + theta g, the first time m = g; e = rho m / (||m|| + perturb_eps); base update with s.

    Passes per step: 2. Extra memory: 2 model copies (w, m).
    When: small batches, whose gradients are mostly noise.

    Args:
        theta: weight of the new gradient in m, in (0, 1]; 1 is SAM; per group.

    The others, and the errors: :class:`looksam.SAM`. State per parameter beside the base's: ``m``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        theta: float = 0.9,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper = {"rho": rho, "theta": theta, "perturb_eps": perturb_eps}
        plan = sharp_plan("vasso", "vasso_direction")
        super().__init__(params, base_optimizer, Variant(plan, plan), hyper, backend=backend, base_kwargs=base_kwargs)


class FriendlySAM(SharpnessAware):
    """Friendly SAM: perturbs along the difference of the gradient from its moving average. Li et al. 2024.

    c = g - sigma m with m of the step before; m = lambda m + (1 - lambda) g, in the first step c = m = g;
    e = rho c / (||c|| + perturb_eps), if adaptive ASAM's of c; base update with s.

    Passes per step: 2. Extra memory: 2 model copies (w, m).
    When: SAM's perturbation hurts through the part that all batches share.

    Args:
        sigma: how much of m is taken off, >= 0; 0 is SAM; per group.
        lambda_: what m keeps of itself, in [0, 1]; per group.

    The others, and the errors: :class:`looksam.SAM`. State per parameter beside the base's: ``m``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        sigma: float = 1.0,
        lambda_: float = 0.9,
        perturb_eps: float = 1e-12,
        adaptive: bool = False,
        eta: float = 0.01,
        adaptive_filter: ParameterFilter | None = None,
        precondition: bool = False,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        hyper: dict[str, Any] = {"rho": rho, "sigma": sigma, "lambda_": lambda_, "perturb_eps": perturb_eps}
        hyper |= {"adaptive": adaptive, "eta": eta, "adaptive_filter": adaptive_filter, "precondition": precondition}
        plan = sharp_plan("friendly", "friendly_direction")
        super().__init__(params, base_optimizer, Variant(plan, plan), hyper, backend=backend, base_kwargs=base_kwargs)


VARIANTS: dict[str, type[SharpnessAware]] = {
    cls.__name__.lower(): cls
    for cls in (
        SAM,
        LookSAM,
        LayerSAM,
        LookLayerSAM,
        ASAM,
        SSAM,
        GSAM,
        WSAM,
        CRSAM,
        VaSSO,
        FriendlySAM,
        SAMPa,
        ESAM,
        AESAM,
        AELookSAM,
        MSAM,
        S2SAM,
    )
}
"""The sharpness-aware optimizers by lower-case name."""
