"""Sums -> coefficients, for every rule, in float64, with all zero rules in one place (the twin of csrc/core/scalars.h).

A *rule* says which columns enter a direction, which sums it needs and by which formula the sums become one coefficient
a row for each input. Everything is vectorised over rows; a global norm is a total that every row shares.

Notation: g gradient at w, s gradient at w + e, q LookSAM's orthogonal component, ``gg`` = <g,g>, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[str, str]
Groups = Sequence[Mapping[str, Any]]


class Sums(NamedTuple):
    """Inner products per tensor: ``values[i, p]`` = <x_p, y_p> for the i-th pair (x, y), float64, 0 where either is absent."""

    pairs: tuple[Pair, ...]
    values: Tensor

    def of(self, x: str, y: str) -> Tensor:
        """Per tensor, shape [rows]."""
        key = (x, y) if (x, y) in self.pairs else (y, x)
        return self.values[self.pairs.index(key)]

    def total(self, x: str, y: str) -> Tensor:
        """Over all tensors jointly, shape []."""
        return self.of(x, y).sum()

    def __add__(self, other: object) -> Sums:
        if not isinstance(other, Sums):
            return NotImplemented
        return Sums(self.pairs + other.pairs, torch.cat([self.values, other.values]))


class Coefficients(NamedTuple):
    """The scalars of one op, on the device, float64, shape [inputs, rows].

    ``d[i, p]`` multiplies input i of tensor p in the direction d (or in the perturbation e), ``q[i, p]`` in the second
    combination, which is written to the column ``writes`` (``None``: nothing is), and ``post[i, p]`` in what is added
    to w after the base update (``None``: nothing is). ``found_inf`` is 1.0 if any sum was not finite (float32, shape
    []): then perturb moves nothing and step leaves every tensor as it was before the perturbation.
    """

    inputs: tuple[str, ...]
    d: Tensor
    q: Tensor | None
    found_inf: Tensor
    post: Tensor | None = None
    writes: str = "q"


class Hyper:
    """Reads the groups' hyper-parameters as one float64 number a row (numbers and tensors, each step anew)."""

    def __init__(
        self, groups: Groups, group: Sequence[int], device: torch.device, grad_scale: Tensor | None = None
    ) -> None:
        self.groups, self.group, self.device = groups, group, device
        self.inv_scale: Tensor | float = 1.0 if grad_scale is None else grad_scale.to(torch.float64).reciprocal()

    def row(self, name: str) -> Tensor:
        """Shape [rows]."""
        values = [g[name] for g in self.groups]
        if any(isinstance(v, Tensor) for v in values):
            every = torch.stack(
                [torch.as_tensor(v, dtype=torch.float64, device=self.device).reshape(()) for v in values]
            )
            return every[torch.tensor(self.group, dtype=torch.int64, device=self.device)]
        return torch.tensor([values[i] for i in self.group], dtype=torch.float64, device=self.device)

    def sign(self) -> Tensor:
        """-1 in groups that maximize, else 1; shape [rows]."""
        signs = [-1.0 if g.get("maximize", False) else 1.0 for g in self.groups]
        return torch.tensor([signs[i] for i in self.group], dtype=torch.float64, device=self.device)

    def common(self, name: str, default: Any = None) -> Any:
        """A hyper-parameter that all groups share."""
        return self.groups[0].get(name, default) if self.groups else default


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b where b > 0, else 0: a zero denominator never makes NaN."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


# Ascent: e_p = c_p T_p^2 g_p, one c a row; or one for each input, e_p = T_p^2 sum_i c_ip x_ip -----------------------


def sam(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho / (||g|| + perturb_eps), 0 if ||g|| = 0. SAM, Foret et al. 2021."""
    return _over_norm(hyper.row("rho"), sums.total("g", "g").sqrt(), hyper)


def asam(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho / (||T g|| + perturb_eps) with e = c T^2 g. ASAM, Kwon et al. 2021."""
    return _over_norm(hyper.row("rho"), sums.total("Tg", "Tg").sqrt(), hyper)


def trust_normalized(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho L_p / ||L g||, so that ||e|| = rho. LayerSAM, Liu et al. 2022."""
    scale = _layer_ratio(sums, hyper)
    return _over_norm(hyper.row("rho") * scale, (scale.square() * sums.of("g", "g")).sum().sqrt(), hyper)


def trust(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho L_p, so that ||e_p|| = rho ||w_p||."""
    return hyper.row("rho") * _layer_ratio(sums, hyper) * hyper.inv_scale


def trust_global(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho L_p / ||g||."""
    return _over_norm(hyper.row("rho") * _layer_ratio(sums, hyper), sums.total("g", "g").sqrt(), hyper)


def unit(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho / ||g_p||; tensors outside the layer filter take SAM's rho / ||g||."""
    gg = sums.of("g", "g")
    norm = torch.where(hyper.row("layer_scaled") > 0, gg, gg.sum()).sqrt()
    return _over_norm(hyper.row("rho"), norm, hyper)


def _over_norm(numerator: Tensor, norm: Tensor, hyper: Hyper) -> Tensor:
    return torch.where(norm > 0, numerator / (norm + hyper.common("perturb_eps", 0.0)), 0.0)


def _layer_ratio(sums: Sums, hyper: Hyper) -> Tensor:
    """L_p = ||w_p|| / ||g_p||; 1 where ||w_p|| = 0 and for tensors outside the layer filter; 0 where g_p = 0.

    The 1 makes L depend on the size of g, so g enters unscaled: a loss scale must not move the perturbation.
    """
    ww, gg = sums.of("w", "w"), sums.of("g", "g") * hyper.inv_scale**2
    scale = torch.where((ww > 0) & (hyper.row("layer_scaled") > 0), ratio(ww, gg).sqrt(), 1.0)
    return torch.where(gg > 0, scale, 0.0)


# Descent: d = sum_i d_i x_i, and q = sum_i q_i x_i where it is written --------------------------------------------


Row = Tensor | float


class Direction(NamedTuple):
    """Coefficients of each input in d, in what is written, and in what is added to w after the base update."""

    d: tuple[Row, ...]
    q: tuple[Row, ...] | None = None
    post: tuple[Row, ...] | None = None


def as_is(sums: Sums, hyper: Hyper) -> Direction:
    """d = x: the base optimizer on g, SAM on s."""
    return Direction(d=(1.0,))


def looksam_refresh(sums: Sums, hyper: Hyper) -> Direction:
    """d = s, q = s - (<g,s>/||g||^2) g. LookSAM, Liu et al. 2022."""
    gs, gg = (_scoped(sums.of(*pair), hyper) for pair in (("g", "s"), ("g", "g")))
    return Direction(d=(1.0, 0.0), q=(1.0, -ratio(gs, gg)))


def looksam_reuse(sums: Sums, hyper: Hyper) -> Direction:
    """d = g + alpha (||g||/||q||) q; q's term is 0 where ||q|| = 0. LookSAM, Liu et al. 2022."""
    gg, qq = (_scoped(sums.of(x, x), hyper) for x in "gq")
    return Direction(d=(1.0, hyper.row("alpha") * ratio(gg, qq).sqrt()))


def _scoped(x: Tensor, hyper: Hyper) -> Tensor:
    """Per tensor or the total in every row, as ``norm_scope`` says."""
    return x if hyper.common("norm_scope", "global") == "tensor" else x.sum().expand_as(x)


# The rules by name --------------------------------------------------------------------------------------------------


class Ascent(NamedTuple):
    formula: Callable[[Sums, Hyper], Tensor]
    pairs: tuple[Pair, ...]
    inputs: tuple[str, ...] = ("g",)


class Descent(NamedTuple):
    formula: Callable[[Sums, Hyper], Direction]
    inputs: tuple[str, ...]
    """The first input decides which rows take part."""
    pairs: tuple[Pair, ...]
    """Sums that the formula needs; each input must stand in one, so that a non-finite value is seen."""
    clip_pairs: tuple[Pair, ...] = ()
    """Further sums that ||d||^2 needs, when it is clipped."""
    writes: str | None = None
    """The column that takes the second combination; its ||.||^2 goes to ``<column>_norm_sq`` where there is one."""


_GG, _GS, _SS, _GQ, _QQ, _WW = (("g", "g"), ("g", "s"), ("s", "s"), ("g", "q"), ("q", "q"), ("w", "w"))

ASCENTS = {
    "sam": Ascent(sam, (_GG,)),
    "asam": Ascent(asam, (("Tg", "Tg"),)),
    "trust_normalized": Ascent(trust_normalized, (_GG, _WW)),
    "trust": Ascent(trust, (_GG, _WW)),
    "trust_global": Ascent(trust_global, (_GG, _WW)),
    "unit": Ascent(unit, (_GG,)),
}

DESCENTS = {
    "first": Descent(as_is, ("g",), (_GG,)),
    "second": Descent(as_is, ("s",), (_SS,)),
    "looksam_refresh": Descent(looksam_refresh, ("s", "g"), (_GG, _GS), (_SS,), writes="q"),
    "looksam_reuse": Descent(looksam_reuse, ("g", "q"), (_GG, _QQ), (_GQ,)),
}

BASES = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "grad": (),
}
"""The base updates and their state columns. ``"grad"`` is no update of its own: it writes d over the first input,
restores w, and leaves the rest to another optimizer."""


def ascent(name: str, sums: Sums, hyper: Hyper, found_inf: Tensor) -> Coefficients:
    """The coefficients of e; all 0 after a non-finite sum."""
    rule = ASCENTS[name]
    c = rule.formula(sums, hyper).reshape(len(rule.inputs), -1) * hyper.sign()
    return Coefficients(rule.inputs, torch.where(found_inf > 0, 0.0, c), None, found_inf)


def descent(name: str, sums: Sums, hyper: Hyper, found_inf: Tensor, max_grad_norm: float | None) -> Coefficients:
    """The coefficients of d, of what is written and of what is added after the update; all of them unscaled.

    d is scaled by min(1, max_grad_norm / ||d||). ``maximize`` turns d and the addition round, not what is written.
    """
    rule = DESCENTS[name]
    direction = rule.formula(sums, hyper)
    d = _rows(direction.d, sums) * hyper.inv_scale
    q, post = (None if x is None else _rows(x, sums) * hyper.inv_scale for x in direction[1:])
    if max_grad_norm is not None:
        d = d * ratio(torch.as_tensor(max_grad_norm, dtype=d.dtype), direction_norm(rule.inputs, d, sums)).clamp(max=1)
    post = None if post is None else post * hyper.sign()
    return Coefficients(rule.inputs, d * hyper.sign(), q, found_inf, post, rule.writes or "q")


def direction_norm(inputs: tuple[str, ...], d: Tensor, sums: Sums) -> Tensor:
    """||d|| of d = sum_i d_i x_i, over all tensors, from the inner products alone."""
    square = sum(
        (d[i] * d[j] * sums.of(x, y) for i, x in enumerate(inputs) for j, y in enumerate(inputs)),
        start=torch.zeros_like(d[0]),
    )
    return square.sum().clamp(min=0).sqrt()


def _rows(coefficients: Sequence[Row], sums: Sums) -> Tensor:
    return torch.stack([torch.zeros_like(sums.values[0]) + c for c in coefficients])
