"""The optimizers once more, in plain NumPy, written from the published formulas and from nothing in the packages.

Whoever reads only this file should be able to check it against the papers. Lists run over the parameters: ``w`` their
values, ``h`` their hyper-parameters (the group's, one dict a tensor), ``g`` and ``s`` the gradients of the two passes,
``None`` where a tensor has none.

An :class:`Independent` can be run with ``jitter``: every gradient, perturbation, direction and new weight is then moved by
a few units in the last place. How far that carries the result after N steps is how far any two correct programs, which
round in different places, may end up apart; the tests take their tolerances from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = np.ndarray
Arrays = list["Array | None"]
Hyper = dict[str, Any]
Gradients = Callable[[list[Array], int, int], Arrays]
"""(weights, step, pass 1 or 2) -> gradients."""


def norm(xs: Arrays) -> float:
    """The L2 norm over all tensors jointly; those without a value take no part."""
    return float(np.sqrt(sum(np.sum(x * x) for x in xs if x is not None)))


def dot(xs: Arrays, ys: Arrays) -> float:
    return float(sum(np.sum(x * y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None))


def ratio(a: float, b: float) -> float:
    """a / b, and 0 where b is 0: a zero denominator never makes a NaN."""
    return a / b if b > 0 else 0.0


# ---------------------------------------------------------------------------------------------------- how far up: e


def ascent_sam(w: list[Array], g: Arrays, h: list[Hyper]) -> Arrays:
    """e = rho g / (||g|| + eps)."""
    n = norm(g)
    return [
        None if gp is None else (hp["rho"] * gp / (n + hp["perturb_eps"]) if n > 0 else 0 * gp)
        for gp, hp in zip(g, h, strict=True)
    ]


def ascent_asam(w: list[Array], g: Arrays, h: list[Hyper]) -> Arrays:
    """e = rho T^2 g / (||T g|| + eps), T = |w| + eta on weights (two or more dimensions), 1 on the rest."""
    t = [
        np.abs(wp) + hp["eta"] if hp["adaptive"] and wp.ndim >= 2 else np.ones_like(wp)
        for wp, hp in zip(w, h, strict=True)
    ]
    n = norm([None if gp is None else tp * gp for tp, gp in zip(t, g, strict=True)])
    return [
        None if gp is None else (hp["rho"] * tp**2 * gp / (n + hp["perturb_eps"]) if n > 0 else 0 * gp)
        for tp, gp, hp in zip(t, g, h, strict=True)
    ]


def ascent_layer(scale: str, scaled: list[bool]) -> Callable[..., Arrays]:
    """LayerSAM: e = rho L_p g_p / denominator. ``scaled`` is the layer filter's answer; elsewhere L_p = 1."""

    def ascent(w: list[Array], g: Arrays, h: list[Hyper]) -> Arrays:
        factors: list[float] = []
        for wp, gp, inside in zip(w, g, scaled, strict=True):
            w_norm, g_norm = norm([wp]), norm([gp])
            factor = ratio(1.0 if scale == "unit" else w_norm, g_norm)
            if scale != "unit" and w_norm == 0:
                factor = 1.0  # LAMB's convention
            factors.append(factor if inside else 1.0)
        lg = [None if gp is None else f * gp for f, gp in zip(factors, g, strict=True)]
        denominator = {"trust_normalized": norm(lg), "trust": 1.0, "trust_global": norm(g), "unit": 1.0}[scale]
        return [None if x is None else hp["rho"] * ratio(1.0, denominator) * x for x, hp in zip(lg, h, strict=True)]

    return ascent


# ---------------------------------------------------------------------------------------- the base updates: B(d) at w


def clip(d: Arrays, h: list[Hyper]) -> Arrays:
    """d / max(1, ||d|| / max_grad_norm)."""
    n = norm(d)
    limits = [hp.get("max_grad_norm") for hp in h]
    return [x if x is None or limit is None else x / max(1.0, n / limit) for x, limit in zip(d, limits, strict=True)]


class SGD:
    """d += wd w; buf = momentum buf + (1 - dampening) d, at first buf = d; w -= lr buf, or lr (d + momentum buf)."""

    def __init__(self, size: int) -> None:
        self.buf: Arrays = [None] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        d = d + h.get("weight_decay", 0.0) * w
        mu = h.get("momentum", 0.0)
        if mu != 0:
            buf = self.buf[i]
            buf = d if buf is None else mu * buf + (1 - h.get("dampening", 0.0)) * d
            self.buf[i] = buf
            d = d + mu * buf if h.get("nesterov", False) else buf
        return w - h["lr"] * d


class Moments:
    """What Adam, AdamW and LAMB share: bias-corrected averages of d and of its square. t counts a tensor's own updates."""

    def __init__(self, size: int) -> None:
        self.t = [0] * size
        self.m: list[Any] = [0.0] * size
        self.v: list[Any] = [0.0] * size

    def corrected(self, i: int, d: Array, h: Hyper) -> tuple[Array, Array]:
        b1, b2 = h["betas"]
        self.t[i] += 1
        self.m[i] = b1 * self.m[i] + (1 - b1) * d
        self.v[i] = b2 * self.v[i] + (1 - b2) * d * d
        return self.m[i] / (1 - b1 ** self.t[i]), self.v[i] / (1 - b2 ** self.t[i])


class Adam(Moments):
    """Weight decay is part of d."""

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        m, v = self.corrected(i, d + h["weight_decay"] * w, h)
        return w - h["lr"] * m / (np.sqrt(v) + h["eps"])


class AdamW(Moments):
    """Weight decay shrinks w by itself."""

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        m, v = self.corrected(i, d, h)
        return w * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * m / (np.sqrt(v) + h["eps"])


class LAMB(Moments):
    """u = m / (sqrt(v) + eps) + wd w; w -= lr r u, r = ||w_p|| / ||u_p||. (d is clipped before, jointly.)"""

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        m, v = self.corrected(i, d, h)
        u = m / (np.sqrt(v) + h["eps"]) + h["weight_decay"] * w
        r = 1.0
        if (h["weight_decay"] != 0 or h.get("always_adapt", False)) and norm([w]) > 0 and norm([u]) > 0:
            r = norm([w]) / norm([u])
        if h.get("trust_clip", False):
            r = min(r, 1.0)
        return w - h["lr"] * r * u


class FromTorch:
    """Any other optimizer: the class itself, one instance a tensor, steps on a d made by hand."""

    def __init__(self, size: int, cls: type[torch.optim.Optimizer], own: tuple[str, ...]) -> None:
        self.cls, self.own = cls, own
        self.inner: list[Any] = [None] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        if self.inner[i] is None:
            hyper = {name: h["base_" + name] if "base_" + name in h else h[name] for name in self.own}
            self.inner[i] = self.cls([torch.nn.Parameter(torch.tensor(w))], **hyper)
        (p,) = self.inner[i].param_groups[0]["params"]
        with torch.no_grad():
            p.copy_(torch.tensor(w))
        p.grad = torch.tensor(d)
        self.inner[i].step()
        return p.detach().numpy().copy()


# ---------------------------------------------------------------------------------------------------------- the methods


class Independent:
    """One optimizer of this family: look twice on steps 0, k, 2k, ..., with or without LookSAM's reuse in between."""

    def __init__(
        self,
        w: list[Array],
        h: list[Hyper],
        base: Any,
        ascent: Callable[..., Arrays],
        k: int,
        norm_scope: str | None = None,
        jitter: Callable[[Array], Array] = lambda x: x,
    ) -> None:
        self.w, self.h, self.base, self.ascent, self.k = [x.copy() for x in w], h, base, ascent, k
        self.norm_scope = norm_scope
        self.q: Arrays = [None] * len(w)
        self.t = 0
        self.passes = 0
        self._jitter = jitter

    def step(self, gradients: Gradients) -> None:
        g = self.jitter(gradients(self.w, self.t, 1))
        self.passes += 1
        if self.t % self.k == 0:
            e = self.jitter(self.ascent(self.w, g, self.h))
            up = [wp if ep is None else wp + ep for wp, ep in zip(self.w, e, strict=True)]
            d = self.jitter(gradients(up, self.t, 2))
            self.passes += 1
            if self.norm_scope:
                self.refresh(g, d)
        else:
            d = self.reuse(g) if self.norm_scope else g
        self.descend(self.jitter(d))
        self.t += 1

    def refresh(self, g: Arrays, s: Arrays) -> None:
        """q = s - (<g,s> / ||g||^2) g, with one coefficient for all or one for each tensor; q = s where g is missing."""
        joint = ratio(dot(g, s), norm(g) ** 2)
        for i, (gp, sp) in enumerate(zip(g, s, strict=True)):
            if sp is None:
                continue  # an absent tensor takes no part: what it had as q, it keeps
            c = joint if self.norm_scope == "global" else ratio(dot([gp], [sp]), norm([gp]) ** 2)
            self.q[i] = sp if gp is None else sp - c * gp

    def reuse(self, g: Arrays) -> Arrays:
        """d = g + alpha (||g|| / ||q||) q. Tensors without a gradient are in neither norm."""
        q = [None if gp is None else qp for gp, qp in zip(g, self.q, strict=True)]
        joint = ratio(norm(g), norm(q))
        d: Arrays = []
        for gp, qp, hp in zip(g, q, self.h, strict=True):
            scale = joint if self.norm_scope == "global" else ratio(norm([gp]), norm([qp]))
            d.append(gp if gp is None or qp is None else gp + hp["alpha"] * scale * qp)
        return d

    def descend(self, d: Arrays) -> None:
        for i, x in enumerate(clip(d, self.h)):
            if x is not None and x.size > 0:
                self.w[i] = self._jitter(self.base.update(i, self.w[i], x, self.h[i]))

    def jitter(self, xs: Arrays) -> Arrays:
        return [None if x is None else self._jitter(x) for x in xs]
