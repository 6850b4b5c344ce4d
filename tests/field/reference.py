"""Sharpness-aware optimizers once more, as plainly as they can be written, around an ordinary torch optimizer.

Nothing is remembered here but what stands in dictionaries that anybody may change: the inner optimizer's groups and
state, ``hyper`` (one dictionary a group), ``kept`` (one dictionary a parameter) and ``phase``. Every step reads them
anew, moves the weights by plain tensor operations, and lets the inner optimizer step on what it has put into ``.grad``:
the way of davda54/sam. Nothing is imported from the packages under test.

Formulas: SAM, Foret et al. 2021; LookSAM and LayerSAM, Liu et al. 2022; ASAM, Kwon et al. 2021; SSAM, Tan et al. 2024;
GSAM, Zhuang et al. 2022; WSAM (coupled), Yue et al. 2023; VaSSO, Li & Giannakis 2023; LAMB and LARS, You et al. 2020 and
2017; Lion, Chen et al. 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Columns = dict[Tensor, Tensor]
"""A tensor for each parameter that takes part."""
Closure = Callable[[], Tensor]


def dot(xs: Columns, ys: Columns) -> float:
    """Over the parameters that have both."""
    return sum(float((xs[p].double() * ys[p].double()).sum()) for p in xs if p in ys)


def norm(xs: Columns) -> float:
    return math.sqrt(dot(xs, xs))


def ratio(a: float, b: float) -> float:
    """a / b, and 0 where b is 0."""
    return a / b if b > 0 else 0.0


class Reference:
    """A sharpness-aware method around ``inner``.

    Args:
        inner: the base optimizer, over all parameters.
        method: one of :data:`METHODS`.
        hyper: the method's hyper-parameters, for all groups.
    """

    def __init__(self, inner: Optimizer, method: str, **hyper: Any) -> None:
        self.inner, self.method = inner, copy.copy(METHODS[method])
        self.hyper = [dict(hyper) for _ in inner.param_groups]
        self.kept: dict[Tensor, dict[str, Any]] = {}
        self.phase = 0
        self._backup: Columns = {}
        self._first: Columns = {}

    # One step, in either style --------------------------------------------------------------------------------------

    @property
    def is_sharp(self) -> bool:
        return self.phase % self.hyper[0].get("k", 1) == 0

    def step(self, closure: Closure) -> Tensor:
        """The loss of the first pass. A closure that raises leaves weights and state as they were."""
        loss = closure()
        try:
            if self.first_step():
                closure()
                self.second_step()
        except BaseException:
            self.abandon()
            raise
        return loss

    @torch.no_grad()
    def first_step(self) -> bool:
        """With the gradients at w. Moves the weights to w + e on a sharp step; does the whole step on another one."""
        g = self._gradients()
        if not self.is_sharp:
            self._update(self.method.between(self, g))
            return False
        self._first = g
        self._backup = {p: p.detach().clone() for p in g}
        for p, e in self.method.perturbation(self, g).items():
            p.add_(e)
        return True

    @torch.no_grad()
    def second_step(self) -> None:
        """With the gradients at w + e. The weights go back to w, and the inner optimizer steps."""
        s = self._gradients()
        self._restore()
        self._update(self.method.direction(self, self._first, s))

    @torch.no_grad()
    def abandon(self) -> None:
        self._restore()

    def _restore(self) -> None:
        for p, before in self._backup.items():
            p.copy_(before)
        self._backup = {}

    def _gradients(self) -> Columns:
        there = {p: p.grad.detach().clone() for group in self.groups for p in group["params"] if p.grad is not None}
        for p in there:
            p.grad = None
        return there

    def _update(self, d: Columns) -> None:
        limit = self.hyper[0].get("max_grad_norm")
        scale = 1.0 if limit is None else max(1.0, norm(d) / limit)
        for group in self.groups:
            for p in group["params"]:
                p.grad = (d[p] / scale).to(p.dtype) if p in d and p.numel() else None
        if d:
            self.inner.step()
        self.phase = (self.phase + 1) % self.hyper[0].get("k", 1)

    # What the methods read ------------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def of(self, p: Tensor) -> dict[str, Any]:
        """The method's hyper-parameters of a parameter."""
        for group, hyper in zip(self.groups, self.hyper, strict=True):
            if any(p is other for other in group["params"]):
                return hyper
        raise LookupError("a parameter of no group")

    def entry(self, p: Tensor, name: str, default: Any = None) -> Any:
        return self.kept.get(p, {}).get(name, default)

    def keep(self, p: Tensor, **entries: Any) -> None:
        self.kept.setdefault(p, {}).update(entries)


class SAM:
    """e = rho g / (||g|| + eps); d = s."""

    def perturbation(self, at: Reference, g: Columns) -> Columns:
        n = norm(g)
        return {p: at.of(p)["rho"] * ratio(1.0, n + 1e-12 if n > 0 else 0.0) * x for p, x in g.items()}

    def direction(self, at: Reference, g: Columns, s: Columns) -> Columns:
        return s

    def between(self, at: Reference, g: Columns) -> Columns:
        """The direction of the steps without a second pass."""
        return g


class ASAM(SAM):
    """e = rho T^2 g / (||T g|| + eps), T = |w| + eta where the filter says so (two or more dimensions), 1 elsewhere."""

    def perturbation(self, at: Reference, g: Columns) -> Columns:
        def takes(p: Tensor) -> bool:
            accepts = at.of(p).get("adaptive_filter")
            return p.ndim >= 2 if accepts is None else accepts(p)

        t = {p: p.abs() + at.of(p)["eta"] if takes(p) else torch.ones_like(p) for p in g}
        n = norm({p: t[p] * x for p, x in g.items()})
        return {p: at.of(p)["rho"] * t[p] ** 2 * x * ratio(1.0, n) for p, x in g.items()}


class LayerSAM(SAM):
    """e_p = rho L_p g_p / ||L g||, L_p = ||w_p|| / ||g_p||, 1 where w_p = 0 or the filter leaves p out."""

    def perturbation(self, at: Reference, g: Columns) -> Columns:
        scaled = {}
        for p, x in g.items():
            w_norm, accepts = norm({p: p.detach()}), at.of(p).get("layer_filter")
            inside = w_norm > 0 and (accepts is None or accepts(p))
            scaled[p] = x * (ratio(w_norm, norm({p: x})) if inside else 1.0)
        n = norm(scaled)
        return {p: at.of(p)["rho"] * ratio(1.0, n) * x for p, x in scaled.items()}


class LookSAM(SAM):
    """q = s - (<g,s> / ||g||^2) g; in between d = g + alpha (||g|| / ||q||) q. A tensor without q takes d = g."""

    def direction(self, at: Reference, g: Columns, s: Columns) -> Columns:
        c = ratio(dot(g, s), dot(g, g))
        for p, x in s.items():
            q = x - c * g[p] if p in g else x.clone()
            at.keep(p, q=q)
        return s

    def between(self, at: Reference, g: Columns) -> Columns:
        q = {p: at.entry(p, "q") for p in g if at.entry(p, "q") is not None}
        n = norm(q)
        scale = ratio(norm(g), n if n > 2.0**-21 * norm(g) else 0.0)
        return {p: x + at.of(p)["alpha"] * scale * q[p] if p in q else x for p, x in g.items()}


class LookLayerSAM(LookSAM):
    """LayerSAM's perturbation, LookSAM's reuse."""

    perturbation = LayerSAM.perturbation


class SSAM(SAM):
    """d = (||g|| / ||s||) s."""

    def direction(self, at: Reference, g: Columns, s: Columns) -> Columns:
        return {p: ratio(norm(g), norm(s)) * x for p, x in s.items()}


class GSAM(SAM):
    """d = (1 + alpha c) s - alpha g, c = <g,s> / ||s||^2."""

    def direction(self, at: Reference, g: Columns, s: Columns) -> Columns:
        c = ratio(dot(g, s), dot(s, s))
        return {p: (1 + at.of(p)["alpha"] * c) * x - at.of(p)["alpha"] * g[p] if p in g else x for p, x in s.items()}


class WSAM(SAM):
    """Coupled: d = a s + (1 - a) g, a = gamma / (1 - gamma)."""

    def direction(self, at: Reference, g: Columns, s: Columns) -> Columns:
        a = {p: at.of(p)["gamma"] / (1 - at.of(p)["gamma"]) for p in s}
        return {p: a[p] * x + (1 - a[p]) * g[p] if p in g else x for p, x in s.items()}


class VaSSO(SAM):
    """m <- (1 - theta) m + theta g; e = rho m / ||m||; d = s. An m that is not there yet, or zero, becomes g.

    Whether it is there is known when the weights move; one that goes between the passes is zero.
    """

    def _mean(self, at: Reference, p: Tensor, g: Tensor) -> Tensor:
        if p in self._new:
            return g
        theta, m = at.of(p)["theta"], at.entry(p, "m", torch.zeros_like(g))
        return (1 - theta) * m + theta * g

    def perturbation(self, at: Reference, g: Columns) -> Columns:
        self._new = {p for p in g if at.entry(p, "m") is None or not at.entry(p, "m").any()}
        return super().perturbation(at, {p: self._mean(at, p, x) for p, x in g.items()})

    def direction(self, at: Reference, g: Columns, s: Columns) -> Columns:
        for p in g.keys() & s.keys():
            at.keep(p, m=self._mean(at, p, g[p]))
        return s


METHODS: dict[str, SAM] = {
    "sam": SAM(),
    "asam": ASAM(),
    "looksam": LookSAM(),
    "layersam": LayerSAM(),
    "looklayersam": LookLayerSAM(),
    "ssam": SSAM(),
    "gsam": GSAM(),
    "wsam": WSAM(),
    "vasso": VaSSO(),
}


# Base optimizers that torch does not have --------------------------------------------------------------------------


class PerParameter(Optimizer):
    """An optimizer that treats one parameter after the other. Entries of its state that are not there begin at zero."""

    defaults_of_class: ClassVar[dict[str, Any]]

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, {**self.defaults_of_class, **options})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, -p.grad if group.get("maximize") else p.grad, group, self.state[p])

    def update(self, p: Tensor, d: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


def moments(d: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """Adam's direction, with its bias corrections."""
    b1, b2 = group["betas"]
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * d
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * d * d
    return (m / (1 - b1 ** float(t))) / ((v / (1 - b2 ** float(t))).sqrt() + group["eps"])


class LAMB(PerParameter):
    """u = m / (sqrt(v) + eps) + wd w; w -= lr (||w|| / ||u||) u."""

    defaults_of_class: ClassVar[dict[str, Any]] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}

    def update(self, p: Tensor, d: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        u = moments(d, group, state) + group["weight_decay"] * p
        w_norm, u_norm = norm({p: p.detach()}), norm({p: u})
        trust = w_norm / u_norm if group["weight_decay"] != 0 and w_norm > 0 and u_norm > 0 else 1.0
        p.sub_(group["lr"] * trust * u)


class LARS(PerParameter):
    """r = c ||w|| / (||d|| + wd ||w|| + eps); buf = momentum buf + r (d + wd w), at first without it; w -= lr buf."""

    defaults_of_class: ClassVar[dict[str, Any]] = {
        "lr": 1.0,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "trust_coefficient": 0.001,
        "eps": 1e-8,
    }

    def update(self, p: Tensor, d: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        w_norm, d_norm, decay = norm({p: p.detach()}), norm({p: d}), group["weight_decay"]
        trust = 1.0
        if decay != 0 and w_norm > 0 and d_norm > 0:
            trust = group["trust_coefficient"] * w_norm / (d_norm + decay * w_norm + group["eps"])
        x = trust * (d + decay * p)
        state["momentum_buffer"] = buf = group["momentum"] * state.get("momentum_buffer", 0.0) + x
        p.sub_(group["lr"] * buf)


class Lion(PerParameter):
    """w *= 1 - lr wd; w -= lr sign(b1 m + (1 - b1) d); m = b2 m + (1 - b2) d."""

    defaults_of_class: ClassVar[dict[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def update(self, p: Tensor, d: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        m = state.get("exp_avg", torch.zeros_like(d))
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * torch.sign(b1 * m + (1 - b1) * d))
        state["exp_avg"] = b2 * m + (1 - b2) * d


NAMED: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "lamb": LAMB,
    "lars": LARS,
    "lion": Lion,
}
"""The bases that looksam fuses, by its names."""
