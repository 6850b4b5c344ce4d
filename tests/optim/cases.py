"""The tables of this folder's tests: methods, bases, and how a user would build each pair."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import optim

import looksam
import looksam_kernels
from tests import bases
from tests.bases import RMSPROP_HYPER
from tests.optim import independent
from tests.optim.independent import FromTorch, ascent_asam, ascent_sam
from tests.optim.problem import SHAPES, Problem

K = 3
BACKENDS = [name for name, info in looksam_kernels.backend_info("cpu").items() if info.available]
QUICK = [name for name in BACKENDS if name != "triton"]  # Triton's interpreter takes seconds a step


@dataclass(frozen=True)
class Method:
    """``hyper``: one dict a group. ``options``: what is the same in all groups. The layer-wise ascents come with those.

    ``k``: None where the method has no period."""

    optimizer: type
    ascent: Any = ascent_sam
    hyper: tuple = ({"rho": 0.3}, {"rho": 0.1}, {"rho": 0.2})
    options: dict = field(default_factory=dict)
    norm_scope: str | None = None
    k: int | None = K
    independent: type = independent.SAM
    passes: int = 2
    """Of a sharp step."""
    bases: tuple[str, ...] | None = None
    """Those over which it is compared with the formulas; default: all."""

    @property
    def period(self) -> int:
        return self.k or 1

    @property
    def is_layerwise(self) -> bool:
        return self.optimizer in (looksam.LayerSAM, looksam.LookLayerSAM) or "layer_scale" in self.options

    @property
    def in_two_calls(self) -> bool:
        return self.independent not in (independent.CRSAM, independent.SAMPa)


def layer_filter(p: torch.Tensor) -> bool:
    return p.ndim >= 2


def is_vector(p: Any) -> bool:
    return p.ndim == 1


def some(p: Any) -> bool:
    """Vectors, and some of the matrices."""
    return p.ndim == 1 or (p.ndim == 2 and p.shape[0] < p.shape[1])


def everywhere(p: Any) -> bool:
    return True


ALPHAS = tuple({"rho": rho, "alpha": alpha} for rho, alpha in ((0.3, 0.7), (0.1, 0.3), (0.2, 0.0)))
ASAM = ({"rho": 0.5, "eta": 0.01}, {"rho": 0.4, "eta": 0.1}, {"rho": 0.2, "eta": 0.0})
SCHEDULE = (
    {"rho": 0.3, "alpha": 0.4, "rho_min": 0.1, "lr_max": 0.2, "lr_min": 0.01},
    {"rho": 0.1, "alpha": 0.1},
    {"rho": 0.2, "alpha": 0.9, "lr_max": 0.3},
)
GAMMAS = ({"rho": 0.3, "gamma": 0.9}, {"rho": 0.1, "gamma": 0.3}, {"rho": 0.2, "gamma": 0.0})
GAMMAS_COUPLED = ({"rho": 0.3, "gamma": 0.6}, *GAMMAS[1:])
CURVATURE = (
    {"rho": 0.3, "gamma": 0.1, "beta": 0.2},
    {"rho": 0.1, "gamma": 0.0, "beta": 0.1},
    {"rho": 0.2, "gamma": 0.3, "beta": 0.0},
)
THETAS = ({"rho": 0.3, "theta": 0.9}, {"rho": 0.1, "theta": 0.3}, {"rho": 0.2, "theta": 1.0})
FRIENDLY = (
    {"rho": 0.3, "sigma": 1.0, "lambda_": 0.9},
    {"rho": 0.1, "sigma": 0.5, "lambda_": 0.2},
    {"rho": 0.2, "sigma": 0.0, "lambda_": 1.0},
)
LAMBDAS = ({"rho": 0.3, "lambda_": 0.2}, {"rho": 0.1, "lambda_": 0.9}, {"rho": 0.2, "lambda_": 0.0})
RHOS = ({"rho": 0.3}, {"rho": 0.1}, {"rho": 0.2})
LAYER_SCALES = ("trust_normalized", "trust", "trust_global", "unit")
ADAPTIVE = ({"rho": 0.5, "eta": 0.01}, {"rho": 0.4, "eta": 0.1}, {"rho": 0.2, "adaptive": False})
ADAPTIVE_FRIENDLY = tuple({**h, **f} for h, f in zip(FRIENDLY, ADAPTIVE, strict=True))
ADAPTIVE_ALPHAS = tuple({**h, "alpha": a} for h, a in zip(ADAPTIVE, (0.7, 0.3, 1.2), strict=True))
ADAPTIVE_GAMMAS = tuple({**h, "gamma": a} for h, a in zip(ADAPTIVE, (0.6, 0.3, 0.5), strict=True))

METHODS = {
    "sam": Method(looksam.SAM, ascent_sam, options={"perturb_eps": 0.01}, k=1),
    "sam-3": Method(looksam.SAM, ascent_sam),
    "asam-3": Method(looksam.SAM, ascent_asam, ADAPTIVE, {"adaptive": True, "perturb_eps": 0.01}),
    "asam-3-vectors": Method(looksam.ASAM, ascent_asam, ASAM, {"adaptive_filter": is_vector}),
    "asam-3-everywhere": Method(looksam.SAM, ascent_asam, ADAPTIVE, {"adaptive": True, "adaptive_filter": everywhere}),
    "looksam-3": Method(
        looksam.LookSAM, ascent_sam, ALPHAS, {"perturb_eps": 0.01}, "global", independent=independent.LookSAM
    ),
    "looksam-3-tensor": Method(looksam.LookSAM, ascent_sam, ALPHAS, {}, "tensor", independent=independent.LookSAM),
    "layersam-3-trust_normalized": Method(looksam.LayerSAM, None),
    "layersam-trust": Method(looksam.LayerSAM, None, options={"layer_scale": "trust"}, k=1),
    "layersam-3-trust_global": Method(looksam.LayerSAM, None, options={"layer_scale": "trust_global"}),
    "layersam-3-unit": Method(looksam.LayerSAM, None, options={"layer_scale": "unit"}),
    "layersam-3-filter": Method(looksam.LayerSAM, None, options={"layer_filter": layer_filter}),
    "layersam-3-trust-filter": Method(
        looksam.LayerSAM,
        None,
        options={"layer_scale": "trust", "layer_filter": layer_filter},
    ),
    "looklayersam-3": Method(looksam.LookLayerSAM, None, ALPHAS, {}, "global", independent=independent.LookSAM),
    "looklayersam-3-tensor-trust": Method(
        looksam.LookLayerSAM,
        None,
        ALPHAS,
        {"layer_scale": "trust"},
        "tensor",
        independent=independent.LookSAM,
    ),
    "ASAM-3": Method(looksam.ASAM, ascent_asam, ASAM),
    "looksam-3-adaptive": Method(
        looksam.LookSAM, ascent_asam, ADAPTIVE_ALPHAS, {"adaptive": True}, "global", independent=independent.LookSAM
    ),
    "ssam-3-adaptive": Method(looksam.SSAM, ascent_asam, ADAPTIVE, {"adaptive": True}, independent=independent.SSAM),
    "gsam-3-adaptive": Method(
        looksam.GSAM, ascent_asam, ADAPTIVE_ALPHAS, {"adaptive": True}, independent=independent.GSAM
    ),
    "wsam-3-adaptive": Method(
        looksam.WSAM, ascent_asam, ADAPTIVE_GAMMAS, {"adaptive": True, "decouple": False}, independent=independent.WSAM
    ),
    "ssam-3": Method(looksam.SSAM, options={"perturb_eps": 0.01}, independent=independent.SSAM),
    "gsam-3": Method(looksam.GSAM, hyper=SCHEDULE, options={"perturb_eps": 0.01}, independent=independent.GSAM),
    "wsam-3": Method(looksam.WSAM, hyper=GAMMAS, independent=independent.WSAM),
    "wsam-3-coupled": Method(
        looksam.WSAM, hyper=GAMMAS_COUPLED, options={"decouple": False}, independent=independent.WSAM
    ),
    "crsam-3": Method(looksam.CRSAM, hyper=CURVATURE, independent=independent.CRSAM, passes=3),
    "vasso": Method(looksam.VaSSO, hyper=THETAS, options={"perturb_eps": 0.01}, independent=independent.VaSSO, k=None),
    "friendlysam": Method(looksam.FriendlySAM, hyper=FRIENDLY, independent=independent.FriendlySAM, k=None),
    "friendlysam-adaptive": Method(
        looksam.FriendlySAM,
        ascent_asam,
        ADAPTIVE_FRIENDLY,
        {"adaptive": True, "perturb_eps": 0.01},
        independent=independent.FriendlySAM,
        k=None,
    ),
    "sampa": Method(
        looksam.SAMPa, hyper=LAMBDAS, options={"previous_batch": False}, independent=independent.SAMPa, k=None
    ),
}

METHODS |= {
    name: Method(optimizer, hyper=RHOS, options=options, independent=it, k=None, passes=1, bases=over)
    for optimizer, it, over in (
        (looksam.MSAM, independent.MSAM, ("sgd-momentum", "sgd-momentum-clip", "adam", "adamw")),
        (
            looksam.S2SAM,
            independent.S2SAM,
            ("sgd", "sgd-clip", "adam", "adamw", "adagrad", "rmsprop", "adadelta", "lion"),
        ),
    )
    for name, options in (
        (optimizer.__name__.lower(), {"perturb_eps": 0.01}),
        (f"{optimizer.__name__.lower()}-only", {"perturb_filter": some}),
        *((f"{optimizer.__name__.lower()}-{scale}", {"layer_scale": scale}) for scale in LAYER_SCALES),
        (f"{optimizer.__name__.lower()}-filter", {"layer_scale": "trust_global", "layer_filter": layer_filter}),
    )
}
"""With one pass."""

_FEW = ("sgd-clip", "adamw", "lars", "Adafactor")
UNIFIED = ({"rho": 0.3, "normalization": 0.5}, {"rho": 0.1, "normalization": 0.0}, {"rho": 0.2})
STRENGTHS = ({"rho": 0.3, "strength": 1.5}, {"rho": 0.1, "strength": 0.4}, {"rho": 0.2})


def _both(a: tuple, b: tuple) -> tuple:
    return tuple({**x, **y} for x, y in zip(a, b, strict=True))


METHODS |= {
    name: replace(METHODS[of], ascent=independent.ascent_unified, hyper=_both(METHODS[of].hyper, hyper), bases=_FEW)
    for name, of, hyper in (
        ("sam-3-unified", "sam-3", UNIFIED),
        ("asam-3-unified", "asam-3", UNIFIED),
        ("looksam-3-unified", "looksam-3", UNIFIED),
        ("sam-3-strength", "sam-3", STRENGTHS),
        ("looksam-3-strength", "looksam-3", STRENGTHS),
        ("looksam-3-tensor-both", "looksam-3-tensor", _both(UNIFIED, STRENGTHS)),
    )
}
MOMENTS = tuple(
    case
    for name, base in bases.BASES.items()
    if looksam_kernels.updates.BASES[name].second_moment
    for case in base.hyper
)
METHODS |= {
    f"{name}-preconditioned": replace(
        METHODS[name], options={**METHODS[name].options, "precondition": True}, bases=MOMENTS
    )
    for name in ("sam", "looksam-3-tensor", "gsam-3", "friendlysam")
}
METHODS |= {
    f"{name}-only": replace(
        METHODS[name],
        options={**METHODS[name].options, "perturb_filter": some},
        bases=_FEW,
    )
    for name in (
        *("sam-3", "asam-3", "looksam-3", "looksam-3-tensor", "layersam-3-trust_normalized", "layersam-3-trust-filter"),
        *(
            "sam-3-strength",
            "ssam-3",
            "gsam-3",
            "wsam-3",
            "crsam-3",
            "vasso",
            "friendlysam",
            "friendlysam-adaptive",
            "sampa",
        ),
    )
}
"""With a perturb filter."""


@dataclass(frozen=True)
class Base:
    name: Any
    hyper: tuple
    independent: Any
    options: dict = field(default_factory=dict)


class OfUser(optim.RMSprop):
    """Wrapped: a class of the user's own, whatever it is made of."""


ADAFACTOR_HYPER = (
    {"lr": 0.05, "beta2_decay": -0.8, "d": 1.0, "eps": (1e-12, 1e-3), "weight_decay": 0.01},
    {"lr": 0.02, "beta2_decay": -0.5, "d": 2.0, "eps": (1e-6, 1e-2), "weight_decay": 0.0},
    {"lr": 0.01, "beta2_decay": -0.8, "d": 1.5, "eps": (1e-9, 1e-4), "weight_decay": 0.1},
)
MOMENTUM_HYPER = (
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.5},
    {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1},
)
BASES = {
    **{
        case: Base(name, hyper, base.independent, base.shared.get(case, {}))
        for name, base in bases.BASES.items()
        for case, hyper in base.hyper.items()
    },
    "sgd-momentum": Base("sgd", MOMENTUM_HYPER, independent.SGD),
    "sgd-momentum-clip": Base("sgd", MOMENTUM_HYPER, independent.SGD, {"max_grad_norm": 0.5}),
    "RMSprop": Base(
        OfUser,
        RMSPROP_HYPER,
        lambda n: FromTorch(n, OfUser, ("lr", "alpha", "eps", "momentum", "weight_decay", "centered")),
    ),
    "Adafactor": Base(
        optim.Adafactor,
        ADAFACTOR_HYPER,
        lambda n: FromTorch(n, optim.Adafactor, ("lr", "beta2_decay", "eps", "d", "weight_decay")),
    ),
}


def group_hypers(method: Method, base: Base) -> list[dict]:
    """One dict a group, as a user gives it: where the base has an argument of the variant's name, it is base_<name>."""
    return [
        {**h, **{("base_" + n if n in h else n): x for n, x in b.items()}}
        for h, b in zip(method.hyper, base.hyper, strict=True)
    ]


def hypers(method: Method, base: Base) -> list[dict]:
    """One dict a group, complete, as the independent calculation reads it."""
    defaults = {"perturb_eps": 1e-12, "adaptive": method.optimizer is looksam.ASAM, "eta": 0.01, "alpha": 0.7}
    defaults |= {"rho_min": 0.0, "lr_min": 0.0, "normalization": 1.0}
    if method.is_layerwise:
        defaults["perturb_eps"] = 0.0  # the layer-wise formulas have none
    return [{**defaults, "strength": 1.0, **method.options, **base.options, **h} for h in group_hypers(method, base)]


def names_for(method: Method, base: Base) -> tuple[str, ...]:
    left_out = set()
    if method.norm_scope == "tensor":
        # In a tensor of one element s is parallel to g: its own q is 0, up to a rounding that the reuse would blow up. See
        # test_reuse_of_a_single_element_is_not_rounding_noise.
        left_out.add("scalar")
    if method.independent is independent.MSAM and method.is_layerwise:
        # One element's e has the sign of the momentum alone; the optimizer makes it of two terms, which may nearly cancel.
        left_out.add("scalar")
    if base.name is optim.Adafactor:
        left_out |= {"empty", "empty_matrix"}  # see test_a_wrapped_optimizer_never_sees_an_empty_tensor
    return tuple(name for name in SHAPES if name not in left_out)


def build(problem: Problem, params: list, method: Method, base: Base, backend: str | None = None) -> Any:
    options = dict(method.options, backend=backend)
    if method.k is not None:
        options["k"] = method.k
    if method.norm_scope:
        options["norm_scope"] = method.norm_scope
    options.setdefault("perturb_eps", hypers(method, base)[0]["perturb_eps"])
    # What belongs to the base is given where a user would: as an argument when it is the same for all, else per group.
    groups = problem.groups(params, group_hypers(method, base))
    return method.optimizer(groups, base.name, **options, **base.options)
