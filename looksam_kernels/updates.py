"""The base updates on one tensor, in plain PyTorch, and the table of all bases (the twin of csrc/core/updates.h).

An update takes the weight w, the direction d, the states by name, the number of updates, this one included (float64,
0-dim), and the hyper-parameters of the group by torch.optim's names, and returns the new weight and the new states.
Nothing is changed in place. Orders of operations follow torch.optim. The docstring is the formula and its source.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

from looksam_kernels.numbers import dot, one_minus_power

State = dict[str, Tensor]
Scalars = Mapping[str, Any]
Update = Callable[[Tensor, Tensor, State, Tensor, Scalars], tuple[Tensor, State]]


def own(group: Scalars, name: str) -> Any:
    """A hyper-parameter of the base: ``base.<name>`` in groups whose variant has one of the same name.

    The dot keeps it apart from all that others write into groups: schedulers have a ``base_momentum`` of their own.
    """
    return group[renamed] if (renamed := f"base.{name}") in group else group[name]


def sgd(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """d += weight_decay w; buf = momentum buf + (1 - dampening) d (the first time buf = d); nesterov: d + momentum buf;
    w -= lr d. torch.optim.SGD"""
    d = d + own(h, "weight_decay") * w
    momentum = own(h, "momentum")
    if not momentum:
        return w - h["lr"] * d, {}
    direction_weight = torch.where(count == 1, torch.ones_like(count), 1 - own(h, "dampening")).to(d.dtype)
    buf = momentum * state["momentum_buffer"] + direction_weight * d
    return w - h["lr"] * (d + momentum * buf if own(h, "nesterov") else buf), {"momentum_buffer": buf}


def adam(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """d += weight_decay w; m = beta1 m + (1 - beta1) d; v = beta2 v + (1 - beta2) d^2;
    w -= lr (m / bc1) / (sqrt(v / bc2) + eps), bc = 1 - beta^step. Kingma & Ba 2015"""
    direction, new = _adam_direction(d + own(h, "weight_decay") * w, state, count, h)
    return w - h["lr"] * direction, new


def adamw(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """w *= 1 - lr weight_decay, then as adam without its decay. Loshchilov & Hutter 2019"""
    direction, new = _adam_direction(d, state, count, h)
    return w * (1 - h["lr"] * own(h, "weight_decay")) - h["lr"] * direction, new


def lamb(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """m, v as adam; u = (m / bc1) / (sqrt(v / bc2) + eps) + weight_decay w, bc = 1 without ``bias_correction``;
    w -= lr r u with r = ||w_p|| / ||u_p||, 1 where either is 0, 1 where weight_decay = 0 unless ``always_adapt``, at most
    1 with ``trust_clip``. You et al. 2020"""
    u, new = lamb_direction(w, d, state, count, h)
    w_norm, u_norm = (dot(x, x).sqrt() for x in (w, u))
    return lamb_apply(w, u, w_norm, u_norm, h), new


def lamb_direction(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """u and the new states."""
    direction, new = _adam_direction(d, state, count, h, bias_correction=bool(own(h, "bias_correction")))
    return direction + own(h, "weight_decay") * w, new


def lamb_apply(w: Tensor, u: Tensor, w_norm: Tensor, u_norm: Tensor, h: Scalars) -> Tensor:
    """The new w, from the norms of the whole tensors (of which w and u may be parts)."""
    r = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
    if own(h, "weight_decay") == 0 and not own(h, "always_adapt"):
        r = torch.ones_like(r)
    if own(h, "trust_clip"):
        r = r.clamp(max=1)
    return w - h["lr"] * r.to(w.dtype) * u


def lars(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """sgd of a d that holds r_p, with r_p weight_decay; r is ``coefficients.trust``
    (:func:`looksam_kernels.formulas.lars_ratio`). You, Gitman & Ginsburg 2017"""
    return sgd(w, d, state, count, h)


def lion(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """w *= 1 - lr weight_decay; w -= lr sign(beta1 m + (1 - beta1) d); m = beta2 m + (1 - beta2) d. Chen et al. 2023"""
    beta1, beta2 = own(h, "betas")
    m = state["exp_avg"]
    u = torch.sign(beta1 * m + (1 - beta1) * d)
    return w * (1 - h["lr"] * own(h, "weight_decay")) - h["lr"] * u, {"exp_avg": beta2 * m + (1 - beta2) * d}


def adagrad(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """d += weight_decay w; sum += d^2; w -= lr / (1 + (step - 1) lr_decay) d / (sqrt(sum) + eps). Duchi et al. 2011"""
    d = d + own(h, "weight_decay") * w
    total = state["sum"] + d * d
    lr = (h["lr"] / (1 + (count - 1) * own(h, "lr_decay"))).to(d.dtype)
    return w - lr * (d / (total.sqrt() + own(h, "eps"))), {"sum": total}


def rmsprop(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """d += weight_decay w; v = alpha v + (1 - alpha) d^2; centered: a = alpha a + (1 - alpha) d, V = v - a^2, else V = v;
    u = d / (sqrt(V) + eps); momentum: u = buf = momentum buf + u; w -= lr u. What rounding leaves of V below 0 counts as
    0, where torch has NaN. Hinton 2012"""
    alpha, momentum = own(h, "alpha"), own(h, "momentum")
    d = d + own(h, "weight_decay") * w
    variance = square_avg = alpha * state["square_avg"] + (1 - alpha) * d * d
    new = {"square_avg": square_avg}
    if own(h, "centered"):
        grad_avg = new["grad_avg"] = torch.lerp(state["grad_avg"], d, 1 - alpha)
        variance = (square_avg - grad_avg * grad_avg).clamp(min=0)
    u = d / (variance.sqrt() + own(h, "eps"))
    if momentum:
        u = new["momentum_buffer"] = momentum * state["momentum_buffer"] + u
    return w - h["lr"] * u, new


def adadelta(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """d += weight_decay w; v = rho v + (1 - rho) d^2; u = sqrt(x + eps) / sqrt(v + eps) d; x = rho x + (1 - rho) u^2;
    w -= lr u. Zeiler 2012"""
    rho, eps = own(h, "rho"), own(h, "eps")
    d = d + own(h, "weight_decay") * w
    square_avg = rho * state["square_avg"] + (1 - rho) * d * d
    u = (state["acc_delta"] + eps).sqrt() / (square_avg + eps).sqrt() * d
    acc_delta = rho * state["acc_delta"] + (1 - rho) * u * u
    return w - h["lr"] * u, {"square_avg": square_avg, "acc_delta": acc_delta}


def adan(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """D = d - d of the step before (the first time 0); m = beta1 m + (1 - beta1) d; a = beta2 a + (1 - beta2) D;
    v = beta3 v + (1 - beta3) (d + beta2 D)^2; u = (m / bc1 + beta2 a / bc2) / (sqrt(v / bc3) + eps), bc = 1 - beta^step;
    w = (w - lr u) / (1 + lr weight_decay), or with ``no_prox`` w = (1 - lr weight_decay) w - lr u. Xie et al. 2022"""
    beta1, beta2, beta3 = own(h, "betas")
    difference = torch.where((count == 1).to(d.device), torch.zeros_like(d), d + state["neg_pre_grad"])
    m = torch.lerp(state["exp_avg"], d, 1 - beta1)
    a = torch.lerp(state["exp_avg_diff"], difference, 1 - beta2)
    v = beta3 * state["exp_avg_sq"] + (1 - beta3) * (d + beta2 * difference).square()
    corrections = (1 - beta1**count, 1 - beta2**count, (1 - beta3**count).sqrt())
    c1, c2, c3_sqrt = (x.to(d.dtype) for x in corrections)
    moved = h["lr"] * ((m / c1 + beta2 * a / c2) / (v.sqrt() / c3_sqrt + own(h, "eps")))
    decay = h["lr"] * own(h, "weight_decay")
    new_w = (1 - decay) * w - moved if own(h, "no_prox") else (w - moved) / (1 + decay)
    return new_w, {"exp_avg": m, "exp_avg_diff": a, "exp_avg_sq": v, "neg_pre_grad": -d}


def _adam_direction(
    d: Tensor, state: State, count: Tensor, h: Scalars, bias_correction: bool = True
) -> tuple[Tensor, State]:
    """(m / bc1) / (sqrt(v / bc2) + eps) and the new m, v."""
    beta1, beta2 = own(h, "betas")
    m = torch.lerp(state["exp_avg"], d, 1 - beta1)
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * d * d
    if not bias_correction:
        return m / (v.sqrt() + own(h, "eps")), {"exp_avg": m, "exp_avg_sq": v}
    bias_correction1 = one_minus_power(beta1, count).to(d.dtype)
    bias_correction2_sqrt = one_minus_power(beta2, count).sqrt().to(d.dtype)
    return (m / bias_correction1) / (v.sqrt() / bias_correction2_sqrt + own(h, "eps")), {"exp_avg": m, "exp_avg_sq": v}


# Options of the bases that torch.optim does not have: their defaults and their errors --------------------------------


def lamb_options(
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    always_adapt: bool = False,
    trust_clip: bool = False,
    bias_correction: bool = True,
    maximize: bool = False,
) -> dict[str, Any]:
    checked = Adam([_probe()], lr, betas, eps, weight_decay, maximize=maximize).defaults
    kept = {name: checked[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
    return kept | {"always_adapt": always_adapt, "trust_clip": trust_clip, "bias_correction": bias_correction}


def lars_options(
    lr: float | Tensor = 1.0,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 1e-4,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    trust_clip: bool = False,
    always_adapt: bool = False,
    maximize: bool = False,
) -> dict[str, Any]:
    for name, value in (("trust_coefficient", trust_coefficient), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    checked = SGD([_probe()], lr, momentum, dampening, weight_decay, nesterov, maximize=maximize).defaults
    kept = {x: checked[x] for x in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    mine = {"trust_coefficient": trust_coefficient, "eps": eps, "trust_clip": trust_clip, "always_adapt": always_adapt}
    return kept | mine


def lion_options(
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> dict[str, Any]:
    checked = Adam([_probe()], lr, betas, weight_decay=weight_decay, maximize=maximize).defaults
    return {name: checked[name] for name in ("lr", "betas", "weight_decay", "maximize")}


def adan_options(
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
    maximize: bool = False,
) -> dict[str, Any]:
    if len(betas) != 3 or not 0 <= betas[2] < 1:
        raise ValueError(f"betas must be three numbers in [0, 1), not {betas}")
    checked = Adam([_probe()], lr, betas[:2], eps, weight_decay, maximize=maximize).defaults
    kept = {name: checked[name] for name in ("lr", "eps", "weight_decay", "maximize")}
    return kept | {"betas": tuple(betas), "no_prox": no_prox}


def _probe() -> torch.nn.Parameter:
    """A parameter to construct an optimizer with, only to see its defaults and hear its errors."""
    return torch.nn.Parameter(torch.zeros(1, 1))


# The bases by name --------------------------------------------------------------------------------------------------


class SecondMoment(NamedTuple):
    """Where a base keeps the mean square v of its directions: what it divides by is sqrt(v) + eps. A step makes it
    a v + (1 - a) d^2."""

    state: str
    decay: str | None
    """The hyper-parameter a, as in :attr:`Base.hyper`; ``None``: v is a sum, v + d^2."""
    corrected: bool = False
    """Is v divided by 1 - a^step? (Unless an option ``bias_correction`` says otherwise.)"""


class Base(NamedTuple):
    """Everything that is said of a base in Python. In C++ it is a struct in csrc/core/updates.h, in Triton a function in
    backends/triton/base_updates.py, with the same states and hyper-parameters in the same order."""

    update: Update | None
    """``None``: no update of its own; d goes over the first input, and the rest is left to another optimizer."""
    states: tuple[str, ...] = ()
    """By torch.optim's names."""
    hyper: tuple[str, ...] = ()
    """What the update reads beside lr, weight_decay first; ``beta1`` is the first of ``betas``."""
    options: Callable[..., Any] | None = None
    """torch.optim's class, or a function of the options; either gives all of them, with defaults, and refuses bad ones."""
    usual: tuple[float, float] = (1e-3, 0.0)
    """The lr and weight_decay with which small models train well."""
    max_grad_norm: float | None = None
    """Clipping where the user says nothing."""
    takes_trust_ratio: bool = False
    """Are d and weight_decay multiplied by LARS's trust ratio before?"""
    second_moment: SecondMoment | None = None
    """``None``: it keeps none, so that its ascent cannot be preconditioned."""

    @property
    def read(self) -> tuple[str, ...]:
        """All that the update reads."""
        return ("lr", *self.hyper) if self.update is not None else ()


_ADAM: Any = {
    "states": ("exp_avg", "exp_avg_sq"),
    "hyper": ("weight_decay", "beta1", "beta2", "eps"),
    "second_moment": SecondMoment("exp_avg_sq", "beta2", corrected=True),
}
_SGD: Any = {"states": ("momentum_buffer",), "hyper": ("weight_decay", "momentum", "dampening", "nesterov")}

BASES: dict[str, Base] = {
    "sgd": Base(sgd, **_SGD, options=SGD, usual=(0.05, 5e-4)),
    "adam": Base(adam, **_ADAM, options=Adam),
    "adamw": Base(adamw, **_ADAM, options=AdamW, usual=(1e-3, 0.05)),
    "lamb": Base(
        lamb,
        states=("exp_avg", "exp_avg_sq"),
        hyper=("weight_decay", "beta1", "beta2", "eps", "always_adapt", "trust_clip", "bias_correction"),
        options=lamb_options,
        usual=(5e-3, 0.01),
        max_grad_norm=1.0,
        second_moment=SecondMoment("exp_avg_sq", "beta2", corrected=True),
    ),
    "lars": Base(lars, **_SGD, options=lars_options, usual=(5.0, 1e-4), takes_trust_ratio=True),
    "lion": Base(
        lion,
        states=("exp_avg",),
        hyper=("weight_decay", "beta1", "beta2"),
        options=lion_options,
        usual=(2e-4, 0.1),
    ),
    "adagrad": Base(
        adagrad,
        states=("sum",),
        hyper=("weight_decay", "lr_decay", "eps"),
        options=Adagrad,
        usual=(0.02, 0.0),
        second_moment=SecondMoment("sum", None),
    ),
    "rmsprop": Base(
        rmsprop,
        states=("square_avg", "grad_avg", "momentum_buffer"),
        hyper=("weight_decay", "alpha", "eps", "momentum", "centered"),
        options=RMSprop,
        second_moment=SecondMoment("square_avg", "alpha"),
    ),
    "adadelta": Base(
        adadelta,
        states=("square_avg", "acc_delta"),
        hyper=("weight_decay", "rho", "eps"),
        options=Adadelta,
        usual=(1.0, 0.0),
        second_moment=SecondMoment("square_avg", "rho"),
    ),
    "adan": Base(
        adan,
        states=("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
        hyper=("weight_decay", "beta1", "beta2", "beta3", "eps", "no_prox"),
        options=adan_options,
        usual=(1e-3, 0.02),
        second_moment=SecondMoment("exp_avg_sq", "beta3", corrected=True),
    ),
    "grad": Base(None),
}
"""The bases by name."""

STATE_NEEDS = {"momentum_buffer": "momentum", "grad_avg": "centered"}
"""States that only those groups have in which this option is not 0."""

INITIAL = {"sum": "initial_accumulator_value"}
"""States that start at the value of this option; the others start at 0."""

FLAGS = ("nesterov", "centered", "always_adapt", "trust_clip", "bias_correction", "no_prox")
"""The hyper-parameters that are yes or no."""


def states(base: str, group: Scalars) -> tuple[str, ...]:
    """The state columns that a group needs."""
    if STATE_NEEDS.keys().isdisjoint(BASES[base].states):
        return BASES[base].states
    return tuple(name for name in BASES[base].states if name not in STATE_NEEDS or own(group, STATE_NEEDS[name]))


def hyper_of(group: Scalars, name: str) -> Any:
    """A group's value of one of :attr:`Base.read`."""
    if name == "lr":
        return group["lr"]
    return own(group, "betas")[int(name[-1]) - 1] if name in ("beta1", "beta2", "beta3") else own(group, name)


def group_of(base: Base, values: Sequence[Any]) -> dict[str, Any]:
    """The group with these values of :attr:`Base.read`."""
    group = dict(zip(base.read, values, strict=True))
    betas = tuple(group.pop(x) for x in base.read if x.startswith("beta"))
    return {**group, "betas": betas}


def formulas() -> str:
    """The bases as a table: name, formula and source, as the updates' docstrings give them."""
    rows = {f"``{name}``": " ".join((row.update.__doc__ or "").split()) for name, row in BASES.items() if row.update}
    rows["``grad``"] = "x_0 <- d, w restored: the update is another optimizer's"
    width = max(map(len, rows))
    lines = ["=" * width + "  " + "=" * 100]
    for name, formula in rows.items():
        first, *more = textwrap.wrap(formula, 100, break_long_words=False)
        lines += [f"{name:{width}}  {first}", *(" " * (width + 2) + line for line in more)]
    return "\n".join([*lines, lines[0]])
