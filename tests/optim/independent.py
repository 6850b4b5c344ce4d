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
    """e = rho T^2 g / (||T g|| + eps), T = |w| + eta on what the filter takes (two or more dimensions), 1 on the rest."""
    t = [
        np.abs(wp) + hp["eta"] if hp["adaptive"] and hp.get("adaptive_filter", is_matrix)(wp) else np.ones_like(wp)
        for wp, hp in zip(w, h, strict=True)
    ]
    n = norm([None if gp is None else tp * gp for tp, gp in zip(t, g, strict=True)])
    return [
        None if gp is None else (hp["rho"] * tp**2 * gp / (n + hp["perturb_eps"]) if n > 0 else 0 * gp)
        for tp, gp, hp in zip(t, g, h, strict=True)
    ]


def ascent_unified(w: list[Array], g: Arrays, h: list[Hyper]) -> Arrays:
    """e = rho (1 - l + l / (||T g|| + eps)) T^2 g: ASAM's with the norm to a part only; 0 where g is."""
    t = [
        np.abs(wp) + hp["eta"] if hp["adaptive"] and is_matrix(wp) else np.ones_like(wp)
        for wp, hp in zip(w, h, strict=True)
    ]
    n = norm([None if gp is None else tp * gp for tp, gp in zip(t, g, strict=True)])
    parts = [1 - hp["normalization"] + hp["normalization"] / (n + hp["perturb_eps"]) if n > 0 else 0.0 for hp in h]
    rows = zip(t, g, h, parts, strict=True)
    return [None if gp is None else hp["rho"] * part * tp**2 * gp for tp, gp, hp, part in rows]


def is_matrix(w: Array) -> bool:
    return w.ndim >= 2


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
        if not h.get("bias_correction", True):
            m, v = self.m[i], self.v[i]
        u = m / (np.sqrt(v) + h["eps"]) + h["weight_decay"] * w
        r = 1.0
        if (h["weight_decay"] != 0 or h.get("always_adapt", False)) and norm([w]) > 0 and norm([u]) > 0:
            r = norm([w]) / norm([u])
        if h.get("trust_clip", False):
            r = min(r, 1.0)
        return w - h["lr"] * r * u


class LARS:
    """r = c ||w_p|| / (||d_p|| + wd ||w_p|| + eps); SGD, momentum and all, of r (d + wd w) without a decay of its own."""

    def __init__(self, size: int) -> None:
        self.sgd = SGD(size)

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        wd, r = h["weight_decay"], 1.0
        if wd != 0 or h["always_adapt"]:
            if norm([w]) > 0 and norm([d]) > 0:
                r = h["trust_coefficient"] * norm([w]) / (norm([d]) + wd * norm([w]) + h["eps"])
            if h["trust_clip"]:
                r = min(r / h["lr"], 1.0)
        return self.sgd.update(i, w, r * (d + wd * w), {**h, "weight_decay": 0.0})


class Lion:
    """w shrinks by its decay and moves by lr in the direction of the signs of b1 m + (1 - b1) d."""

    def __init__(self, size: int) -> None:
        self.m: list[Any] = [0.0] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        b1, b2 = h["betas"]
        u = np.sign(b1 * self.m[i] + (1 - b1) * d)
        self.m[i] = b2 * self.m[i] + (1 - b2) * d
        return w * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * u


class Adagrad:
    """d += wd w; sum += d^2; w -= lr / (1 + (t - 1) lr_decay) d / (sqrt(sum) + eps)."""

    def __init__(self, size: int) -> None:
        self.t = [0] * size
        self.sum: list[Any] = [None] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        d = d + h["weight_decay"] * w
        before = h["initial_accumulator_value"] if self.sum[i] is None else self.sum[i]
        self.sum[i] = before + d * d
        self.t[i] += 1
        return w - h["lr"] / (1 + (self.t[i] - 1) * h["lr_decay"]) * d / (np.sqrt(self.sum[i]) + h["eps"])


def of_base(h: Hyper, name: str) -> float:
    """Given as base_<name> where the method has an argument of that name."""
    return h.get("base_" + name, h.get(name))


class RMSprop:
    """d += wd w; v = a v + (1 - a) d^2; u = d / (sqrt(v or, centered, v - mean^2) + eps); w -= lr (momentum buf + u)."""

    def __init__(self, size: int) -> None:
        self.v: list[Any] = [0.0] * size
        self.mean: list[Any] = [0.0] * size
        self.buf: list[Any] = [0.0] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        a = of_base(h, "alpha")
        d = d + h["weight_decay"] * w
        self.v[i] = v = a * self.v[i] + (1 - a) * d * d
        if h["centered"]:
            self.mean[i] = a * self.mean[i] + (1 - a) * d
            v = np.maximum(v - self.mean[i] ** 2, 0)
        self.buf[i] = h["momentum"] * self.buf[i] + d / (np.sqrt(v) + h["eps"])
        return w - h["lr"] * self.buf[i]


class Adadelta:
    """d += wd w; v = r v + (1 - r) d^2; u = sqrt(x + eps) / sqrt(v + eps) d; x = r x + (1 - r) u^2; w -= lr u."""

    def __init__(self, size: int) -> None:
        self.v: list[Any] = [0.0] * size
        self.x: list[Any] = [0.0] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        r, eps = of_base(h, "rho"), h["eps"]
        d = d + h["weight_decay"] * w
        self.v[i] = r * self.v[i] + (1 - r) * d * d
        u = np.sqrt(self.x[i] + eps) / np.sqrt(self.v[i] + eps) * d
        self.x[i] = r * self.x[i] + (1 - r) * u * u
        return w - h["lr"] * u


class Adan:
    """m, n averages of d and of its change D, v of (d + b2 D)^2; u = (m / c1 + b2 n / c2) / (sqrt(v / c3) + eps); the decay is
    a proximal step after it, or shrinks w before. c = 1 - b^t; D is 0 the first time."""

    def __init__(self, size: int) -> None:
        self.t = [0] * size
        self.before: Arrays = [None] * size
        self.m: list[Any] = [0.0] * size
        self.n: list[Any] = [0.0] * size
        self.v: list[Any] = [0.0] * size

    def update(self, i: int, w: Array, d: Array, h: Hyper) -> Array:
        b1, b2, b3 = h["betas"]
        before = self.before[i]
        change = 0 * d if before is None else d - before
        self.before[i] = d
        self.t[i] += 1
        t = self.t[i]
        self.m[i] = b1 * self.m[i] + (1 - b1) * d
        self.n[i] = b2 * self.n[i] + (1 - b2) * change
        self.v[i] = b3 * self.v[i] + (1 - b3) * (d + b2 * change) ** 2
        mean = self.m[i] / (1 - b1**t) + b2 * self.n[i] / (1 - b2**t)
        u = mean / (np.sqrt(self.v[i] / (1 - b3**t)) + h["eps"])
        decay = h["lr"] * h["weight_decay"]
        return w * (1 - decay) - h["lr"] * u if h["no_prox"] else (w - h["lr"] * u) / (1 + decay)


def second_moment(base: Any, i: int, g: Array, h: Hyper) -> Array:
    """v of a base as a step with the direction g, without any decay in it, would make it: Adam's corrected for its bias."""
    if isinstance(base, Adagrad):
        return (h["initial_accumulator_value"] if base.sum[i] is None else base.sum[i]) + g * g
    b = h["betas"][-1] if "betas" in h else of_base(h, "alpha" if isinstance(base, RMSprop) else "rho")
    v = b * base.v[i] + (1 - b) * g * g
    corrected = isinstance(base, Moments | Adan) and h.get("bias_correction", True)
    return v / (1 - b ** (base.t[i] + 1)) if corrected else v


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
    """The base optimizer, and what all methods share: gradients, jitter, and the update.

    A tensor without a gradient takes no part. One that has a gradient in the last pass only was not perturbed, and its d is
    that gradient; where it has none in the last pass it is restored and not updated.
    """

    def __init__(
        self,
        w: list[Array],
        h: list[Hyper],
        base: Any,
        ascent: Callable[..., Arrays] = ascent_sam,
        k: int = 1,
        norm_scope: str | None = None,
        jitter: Callable[[Array], Array] = lambda x: x,
    ) -> None:
        self.w, self.h, self.base, self.ascent, self.k = [x.copy() for x in w], h, base, ascent, k
        self.norm_scope = norm_scope
        self.kept: Arrays = [None] * len(w)
        """q, m or y of the method."""
        self.t = 0
        self.passes = 0
        self._jitter = jitter
        self.inside: list[bool] = [True] * len(w)
        """The tensors that the method is about, as if there were no others. The others follow the last gradient."""

    def step(self, gradients: Gradients) -> None:
        self.gradients, self.number = gradients, 0
        self.added: Arrays = [None] * len(self.w)
        d = self.sharp() if self.t % self.k == 0 else self.between(self.gradient_at())
        self.update_with(self.jitter([x if i else last for x, last, i in zip(d, self.last, self.inside, strict=True)]))
        self.t += 1

    def gradient_at(self, e: Arrays | None = None) -> Arrays:
        """The gradients at w + e."""
        e = self.jitter(e or [None] * len(self.w))
        self.passes += 1
        self.number += 1
        up = [wp if ep is None else wp + ep for wp, ep in zip(self.w, e, strict=True)]
        self.last = self.jitter(self.gradients(up, self.t, self.number))
        return self.of_inside(self.last)

    def of_inside(self, xs: Arrays) -> Arrays:
        return [x if inside else None for x, inside in zip(xs, self.inside, strict=True)]

    def sharp(self) -> Arrays:
        return self.gradient_at()

    def between(self, g: Arrays) -> Arrays:
        return g

    def climb(self, x: Arrays, g: Arrays) -> Arrays:
        """The method's e along x. Preconditioned: e = rho u / (||u|| + eps), u = x / (sqrt(v) + eps of the base), with v of g."""
        if not self.h[0].get("precondition", False):
            return self.ascent(self.w, x, self.h)
        u: Arrays = []
        for i, (xp, gp, hp) in enumerate(zip(x, g, self.h, strict=True)):
            u.append(xp if xp is None else xp / (np.sqrt(second_moment(self.base, i, gp, hp)) + hp["eps"]))
        return self.ascent(self.w, u, self.h)

    def along(self, x: Arrays) -> Arrays:
        """e = rho x / (||x|| + eps)."""
        return ascent_sam(self.w, x, self.h)

    def update_with(self, d: Arrays) -> None:
        for i, x in enumerate(clip(d, self.h)):
            if x is not None and x.size > 0:
                new = self.base.update(i, self.w[i], x, self.h[i])
                extra = self.added[i]
                self.w[i] = self._jitter(new if extra is None else new + extra)

    def jitter(self, xs: Arrays) -> Arrays:
        return [None if x is None else self._jitter(x) for x in xs]

    def each(self, formula: Callable[..., Array], *columns: Arrays) -> Arrays:
        """formula(last, ..., h) for every tensor; the last gradient, which comes first, where another is missing."""
        return [
            last if last is None or any(x is None for x in others) else formula(last, *others, hp)
            for last, *others, hp in zip(*columns, self.h, strict=True)
        ]


class SAM(Independent):
    """d = a s + (1 - a) g, s at w + e; a = 1 unless there is another."""

    def sharp(self) -> Arrays:
        g = self.gradient_at()
        return self.combine(g, self.gradient_at(self.climb(g, g)))

    def combine(self, g: Arrays, s: Arrays) -> Arrays:
        if all(hp.get("strength", 1) == 1 for hp in self.h):
            return s
        return self.each(lambda s, g, hp: hp["strength"] * s + (1 - hp["strength"]) * g, s, g)


class LookSAM(SAM):
    """In between d = g + alpha (||g|| / ||q||) q."""

    def combine(self, g: Arrays, s: Arrays) -> Arrays:
        """q = s - (<g,s> / ||g||^2) g, with one coefficient for all or one for each tensor; q = s where g is missing."""
        joint = ratio(dot(g, s), norm(g) ** 2)
        for i, (gp, sp) in enumerate(zip(g, s, strict=True)):
            if sp is None:
                continue  # an absent tensor takes no part: what it had as q, it keeps
            c = joint if self.norm_scope == "global" else ratio(dot([gp], [sp]), norm([gp]) ** 2)
            self.kept[i] = sp if gp is None else sp - c * gp
        return super().combine(g, s)

    def between(self, g: Arrays) -> Arrays:
        """d = g + alpha (||g|| / ||q||) q. Tensors without a gradient are in neither norm."""
        q = [None if gp is None else qp for gp, qp in zip(g, self.kept, strict=True)]
        joint = ratio(norm(g), norm(q))
        d: Arrays = []
        for gp, qp, hp in zip(g, q, self.h, strict=True):
            scale = joint if self.norm_scope == "global" else ratio(norm([gp]), norm([qp]))
            d.append(gp if gp is None or qp is None else gp + hp["alpha"] * scale * qp)
        return d


class SSAM(SAM):
    """d = (||g|| / (||s|| + eps)) s."""

    def combine(self, g: Arrays, s: Arrays) -> Arrays:
        scale = norm(g) / (norm(s) + self.h[0]["perturb_eps"])
        return [None if sp is None else scale * sp for sp in s]


class GSAM(SAM):
    """d = (1 + alpha c) s - alpha g, c = <g,s> / (||s||^2 + eps);
    rho_t = rho_min + (rho - rho_min) (lr_t - lr_min) / (lr_max - lr_min)."""

    def sharp(self) -> Arrays:
        given = self.h
        self.h = [{**hp, "rho": self.radius(hp)} for hp in given]
        d = super().sharp()
        self.h = given
        return d

    @staticmethod
    def radius(hp: Hyper) -> float:
        if hp.get("lr_max") is None:
            return float(hp["rho"])
        part = (hp["lr"] - hp["lr_min"]) / (hp["lr_max"] - hp["lr_min"])
        return float(hp["rho_min"] + (hp["rho"] - hp["rho_min"]) * part)

    def combine(self, g: Arrays, s: Arrays) -> Arrays:
        c = dot(g, s) / (norm(s) ** 2 + self.h[0]["perturb_eps"])
        return self.each(lambda s, g, hp: (1 + hp["alpha"] * c) * s - hp["alpha"] * g, s, g)


class WSAM(SAM):
    """a = gamma / (1 - gamma). Coupled: d = a s + (1 - a) g. Decoupled: d = g, then w -= lr a (s - g)."""

    def combine(self, g: Arrays, s: Arrays) -> Arrays:
        def a(hp: Hyper) -> float:
            return float(hp["gamma"] / (1 - hp["gamma"]))

        if not self.h[0].get("decouple", True):
            return self.each(lambda s, g, hp: a(hp) * s + (1 - a(hp)) * g, s, g)
        self.added = self.jitter(self.each(lambda s, g, hp: -hp["lr"] * a(hp) * (s - g), s, g))
        self.added = [x if gp is not None else None for x, gp in zip(self.added, g, strict=True)]
        return self.each(lambda s, g, hp: g, s, g)


class CRSAM(SAM):
    """a at w + e, b at w - e: d = (1 + gamma + beta) a + (gamma - beta) b - 2 gamma g."""

    def sharp(self) -> Arrays:
        g = self.gradient_at()
        e = self.ascent(self.w, g, self.h)
        a = self.gradient_at(e)
        b = self.gradient_at([None if x is None else -x for x in e])
        return self.each(
            lambda b, a, g, hp: (
                (1 + hp["gamma"] + hp["beta"]) * a + (hp["gamma"] - hp["beta"]) * b - 2 * hp["gamma"] * g
            ),
            b,
            a,
            g,
        )


class VaSSO(Independent):
    """m <- g at first, then m <- (1 - theta) m + theta g; e = rho m / (||m|| + eps); d = s."""

    def sharp(self) -> Arrays:
        g = self.gradient_at()
        m = [
            None if gp is None else gp if mp is None else (1 - hp["theta"]) * mp + hp["theta"] * gp
            for gp, mp, hp in zip(g, self.kept, self.h, strict=True)
        ]
        s = self.gradient_at(self.along(m))
        self.keep(m, s)
        return s

    def keep(self, m: Arrays, s: Arrays) -> None:
        """A tensor that is not updated keeps its m, too."""
        for i, (mp, sp) in enumerate(zip(m, s, strict=True)):
            if mp is not None and sp is not None:
                self.kept[i] = mp


class FriendlySAM(VaSSO):
    """c = g - sigma m, at first c = m = g; then m <- lambda m + (1 - lambda) g; e = rho c / (||c|| + eps), or ASAM's of c;
    d = s."""

    def sharp(self) -> Arrays:
        g = self.gradient_at()
        columns = list(zip(g, self.kept, self.h, strict=True))
        c = [gp if gp is None or mp is None else gp - hp["sigma"] * mp for gp, mp, hp in columns]
        s = self.gradient_at(self.climb(c, g))
        m = [
            gp if gp is None or mp is None else hp["lambda_"] * mp + (1 - hp["lambda_"]) * gp for gp, mp, hp in columns
        ]
        self.keep(m, s)
        return s


class SAMPa(Independent):
    """a at w + rho y / ||y||, b at w - lr y; d = (1 - lambda) a + lambda b; y <- b. Both at w where there is no y yet."""

    def sharp(self) -> Arrays:
        """Only e is for some tensors alone."""
        y, inside = self.kept, self.inside
        e = self.along(self.of_inside(y))
        self.inside = [True] * len(inside)
        a = self.gradient_at(e)
        b = self.gradient_at([None if yp is None else -hp["lr"] * yp for yp, hp in zip(y, self.h, strict=True)])
        self.kept = [yp if bp is None else bp for yp, bp in zip(y, b, strict=True)]
        self.last = self.each(lambda b, a, hp: (1 - hp["lambda_"]) * a + hp["lambda_"] * b, b, a)
        self.inside = inside
        return self.last


class OnePass(Independent):
    """The gradient is taken at w + e, e from what the step before has left; ``self.w`` are the plain weights."""

    def __init__(self, w: list[Array], *more: Any, **others: Any) -> None:
        super().__init__(w, *more, **others)
        self.e: list[Any] = [0 * x for x in w]

    def sharp(self) -> Arrays:
        self.rest = self.jitter([wp + ep for wp, ep in zip(self.w, self.e, strict=True)])
        g = self.gradient_at(self.e)
        self.kept = [yp if gp is None else gp for yp, gp in zip(self.kept, self.last, strict=True)]
        return g

    def update_with(self, d: Arrays) -> None:
        there = [x is not None for x in d]
        super().update_with(self.decayed(clip(d, self.h)))
        x = [xp if here and i else None for xp, here, i in zip(self.direction(), there, self.inside, strict=True)]
        new = self.ascent(self.rest, x, self.h)
        for i, here in enumerate(there):
            if here:
                self.e[i] = 0 * self.w[i] if new[i] is None else self._jitter(new[i])
                self.w[i] = self._jitter(self.w[i] + self.e[i]) - self.e[i]  # what is rounded is the sum

    def decayed(self, d: Arrays) -> Arrays:
        return d

    def direction(self) -> Arrays:
        """What e goes along."""
        return self.kept


class MSAM(OnePass):
    """e = -rho v / (||v|| + eps), v the momentum of SGD or Adam; where the decay is added to the gradient, it is that of w + e."""

    def decayed(self, d: Arrays) -> Arrays:
        if type(self.base) is AdamW:
            return d
        return [
            x if x is None else x + hp.get("weight_decay", 0.0) * ep
            for x, ep, hp in zip(d, self.e, self.h, strict=True)
        ]

    def direction(self) -> Arrays:
        v = self.base.buf if isinstance(self.base, SGD) else self.base.m
        return [None if x is None or np.ndim(x) != np.ndim(wp) else -x for x, wp in zip(v, self.w, strict=True)]


class S2SAM(OnePass):
    """e = rho y / (||y|| + eps), y the gradient of the step before."""
