"""The base updates on one tensor, in plain PyTorch (the twin of csrc/core/update.h).

An update takes the weight w, the direction d, the states by name, the number of updates, this one included (float64,
0-dim), and the hyper-parameters of the group by torch.optim's names, and returns the new weight and the new states.
Nothing is changed in place. Orders of operations follow torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Scalars = Mapping[str, Any]
Update = Callable[[Tensor, Tensor, State, Tensor, Scalars], tuple[Tensor, State]]


def own(group: Scalars, name: str) -> Any:
    """A hyper-parameter of the base: ``base_<name>`` in groups whose variant has one of the same name."""
    return group[renamed] if (renamed := f"base_{name}") in group else group[name]


def sgd(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """torch.optim.SGD."""
    d = d + own(h, "weight_decay") * w
    momentum = own(h, "momentum")
    if not momentum:
        return w - h["lr"] * d, {}
    direction_weight = torch.where(count == 1, torch.ones_like(count), 1 - own(h, "dampening")).to(d.dtype)
    buf = momentum * state["momentum_buffer"] + direction_weight * d
    return w - h["lr"] * (d + momentum * buf if own(h, "nesterov") else buf), {"momentum_buffer": buf}


def adam(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """torch.optim.Adam. Kingma & Ba 2015."""
    direction, new = _adam_direction(d + own(h, "weight_decay") * w, state, count, h)
    return w - h["lr"] * direction, new


def adamw(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """torch.optim.AdamW. Loshchilov & Hutter 2019."""
    direction, new = _adam_direction(d, state, count, h)
    return w * (1 - h["lr"] * own(h, "weight_decay")) - h["lr"] * direction, new


def lamb(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """LAMB. You et al. 2020."""
    direction, new = _adam_direction(d, state, count, h)
    u = direction + own(h, "weight_decay") * w
    w_norm, u_norm = (x.square().sum(dtype=torch.float64).sqrt() for x in (w, u))
    trust_ratio = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
    if own(h, "weight_decay") == 0 and not own(h, "always_adapt"):
        trust_ratio = torch.ones_like(trust_ratio)
    if own(h, "trust_clip"):
        trust_ratio = trust_ratio.clamp(max=1)
    return w - h["lr"] * trust_ratio.to(w.dtype) * u, new


def lion(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """Lion. Chen et al. 2023."""
    beta1, beta2 = own(h, "betas")
    m = state["exp_avg"]
    u = torch.sign(beta1 * m + (1 - beta1) * d)
    return w * (1 - h["lr"] * own(h, "weight_decay")) - h["lr"] * u, {"exp_avg": beta2 * m + (1 - beta2) * d}


def adagrad(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """torch.optim.Adagrad. Duchi et al. 2011."""
    d = d + own(h, "weight_decay") * w
    total = state["sum"] + d * d
    lr = (h["lr"] / (1 + (count - 1) * own(h, "lr_decay"))).to(d.dtype)
    return w - lr * (d / (total.sqrt() + own(h, "eps"))), {"sum": total}


def rmsprop(w: Tensor, d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """torch.optim.RMSprop, Hinton 2012; but what rounding leaves of a variance below 0 counts as 0, where torch has NaN."""
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
    """torch.optim.Adadelta. Zeiler 2012."""
    rho, eps = own(h, "rho"), own(h, "eps")
    d = d + own(h, "weight_decay") * w
    square_avg = rho * state["square_avg"] + (1 - rho) * d * d
    u = (state["acc_delta"] + eps).sqrt() / (square_avg + eps).sqrt() * d
    acc_delta = rho * state["acc_delta"] + (1 - rho) * u * u
    return w - h["lr"] * u, {"square_avg": square_avg, "acc_delta": acc_delta}


def _adam_direction(d: Tensor, state: State, count: Tensor, h: Scalars) -> tuple[Tensor, State]:
    """(m / bc1) / (sqrt(v / bc2) + eps) and the new m, v."""
    beta1, beta2 = own(h, "betas")
    m = torch.lerp(state["exp_avg"], d, 1 - beta1)
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * d * d
    bias_correction1 = (1 - beta1**count).to(d.dtype)
    bias_correction2_sqrt = (1 - beta2**count).sqrt().to(d.dtype)
    return (m / bias_correction1) / (v.sqrt() / bias_correction2_sqrt + own(h, "eps")), {"exp_avg": m, "exp_avg_sq": v}


UPDATES: dict[str, Update] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
    "lars": sgd,
    "lion": lion,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adadelta": adadelta,
}
"""``"lars"`` is SGD: what it gets holds the trust ratio already (:func:`looksam_kernels.formulas.lars_ratio`)."""

BASES = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "lars": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "adagrad": ("sum",),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer"),
    "adadelta": ("square_avg", "acc_delta"),
    "grad": (),
}
"""The base updates and their state columns, by torch.optim's names. ``"grad"`` is no update of its own: it writes d over
the first input, restores w, and leaves the rest to another optimizer."""

OPTION = {"momentum_buffer": "momentum", "grad_avg": "centered"}
"""States that only those groups have in which this option is not 0."""


def states(base: str, group: Scalars) -> tuple[str, ...]:
    """The state columns that a group needs."""
    return tuple(name for name in BASES[base] if name not in OPTION or own(group, OPTION[name]))
