"""Sums -> coefficients, for every rule, in float64, with all zero rules in one place (the twin of csrc/core/formulas.h).

A *rule* says which columns enter a direction, which sums it needs and by which formula the sums become one coefficient
a row for each input. Everything is vectorised over rows; a global norm is a total that every row shares.

Notation: g gradient at w, s gradient at w + e, r gradient at a third point, q LookSAM's orthogonal component, m a
momentum of gradients, y a gradient kept for the next step. A loss scale is taken out before the formulas and put back
into the coefficients after them, so the formulas know none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from operator import getitem
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from looksam_kernels.numbers import scalar_dtype
from looksam_kernels.updates import own

Pair = tuple[str, str]
Row = Tensor | float
"""One number a tensor, or the same for all."""
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

    def stored(self) -> Sums:
        """Those of columns that are not gradients of this step."""
        kept = [i for i, pair in enumerate(self.pairs) if not any(map(carries_scale, pair))]
        return Sums(tuple(self.pairs[i] for i in kept), self.values[kept])

    def __add__(self, other: object) -> Sums:
        if not isinstance(other, Sums):
            return NotImplemented
        return Sums(self.pairs + other.pairs, torch.cat([self.values, other.values]))


class Coefficients(NamedTuple):
    """The scalars of one op, on the device, float64, shape [inputs, rows].

    ``d[i, p]`` multiplies input i of tensor p in the direction d (or in the perturbation e), ``q[i, p]`` in the second
    combination, which is written to the column ``writes`` (``None``: nothing is), and ``post[i, p]`` in what is added
    to w after the base update (``None``: nothing is). ``trust[p]``, shape [rows], is LARS's trust ratio: d holds it
    already, the weight decay has still to be multiplied by it (``None``: the base is another). ``found_inf`` is 1.0 if
    any sum was not finite (float32, shape []): then perturb moves nothing and step leaves every tensor as it was before
    the perturbation. ``kept[p]``, shape [rows], is the number that step writes to the column ``keeps`` (``None``: none).
    """

    inputs: tuple[str, ...]
    d: Tensor
    q: Tensor | None
    found_inf: Tensor
    post: Tensor | None = None
    writes: str = "q"
    trust: Tensor | None = None
    kept: Tensor | None = None
    keeps: str = ""


class Scaling(NamedTuple):
    """What acts on the coefficients of every rule; the arguments of :func:`looksam_kernels.measure` of these names."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    trust_ratio: bool = False


class Hyper:
    """Reads the groups' hyper-parameters as one number a row, float64 where it exists (numbers and tensors, each step anew)."""

    limit: Any = None
    """max_grad_norm, for rules that clip by themselves."""
    inside: Tensor | None = None
    """For rules that tell the rows apart by themselves: which are moved; ``None``: all."""

    def __init__(
        self, groups: Groups, group: Sequence[int], device: torch.device, grad_scale: Tensor | None = None
    ) -> None:
        self.groups, self.group, self.device = groups, group, device
        self.dtype = scalar_dtype(device)
        one = torch.ones((), dtype=self.dtype, device=device)
        self.inv_scale = one if grad_scale is None else one / grad_scale.to(device)

    def row(self, name: str, read: Callable[[Mapping[str, Any], str], Any] = getitem) -> Tensor:
        """Shape [rows]. read: :func:`looksam_kernels.updates.own` for a hyper-parameter of the base."""
        values = [read(g, name) for g in self.groups]
        if any(isinstance(v, Tensor) for v in values):
            every = [
                v if isinstance(v, Tensor) else torch.full((), v, dtype=self.dtype, device=self.device) for v in values
            ]
            every = [v.to(self.device, self.dtype).reshape(()) for v in every]
            return torch.stack(every)[self.upload(self.group, torch.int64)]
        return self.upload([values[i] for i in self.group])

    def sign(self) -> Tensor:
        """-1 in groups that maximize, else 1; shape [rows]."""
        signs = [-1.0 if g.get("maximize", False) else 1.0 for g in self.groups]
        return self.upload([signs[i] for i in self.group])

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers on the device; float32 for float64 where that does not exist."""
        return torch.tensor(values, dtype=self.dtype if dtype is torch.float64 else dtype, device=self.device)

    def common(self, name: str, default: Any = None) -> Any:
        """A hyper-parameter that all groups share."""
        return self.groups[0].get(name, default) if self.groups else default


def ratio(a: Row, b: Tensor) -> Tensor:
    """a / b where b > 0, else 0: a zero denominator never makes NaN."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


# Ascent: e_p = c_p T_p^2 g_p, one c a row; or one for each input, e_p = T_p^2 sum_i c_ip x_ip -----------------------


def sam(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho / (||g|| + perturb_eps), 0 if ||g|| = 0. SAM, Foret et al. 2021."""
    return over_norm(hyper.row("rho"), sums.total("g", "g").sqrt(), hyper)


def asam(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho / (||T g|| + perturb_eps) with e = c T^2 g. ASAM, Kwon et al. 2021."""
    return over_norm(hyper.row("rho"), sums.total("Tg", "Tg").sqrt(), hyper)


def sam_unified(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho (1 - l + l / (||g|| + perturb_eps)), l = normalization: 1 is SAM, 0 is without the norm. Unified SAM,
    Oikonomou & Loizou 2025."""
    return _partly_over_norm(sums.total("g", "g").sqrt(), hyper)


def asam_unified(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho (1 - l + l / (||T g|| + perturb_eps)) with e = c T^2 g."""
    return _partly_over_norm(sums.total("Tg", "Tg").sqrt(), hyper)


def esam(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho / (beta (||g|| + perturb_eps)), where a mask keeps each element with probability beta. ESAM, Du et al. 2022."""
    return over_norm(hyper.row("rho") / hyper.row("beta"), sums.total("g", "g").sqrt(), hyper)


def esam_adaptive(sums: Sums, hyper: Hyper) -> Tensor:
    """c = rho / (beta (||T g|| + perturb_eps)) with e = c T^2 (b g), b the mask."""
    return over_norm(hyper.row("rho") / hyper.row("beta"), sums.total("Tg", "Tg").sqrt(), hyper)


def trust_normalized(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho L_p / ||L g||, so that ||e|| = rho. LayerSAM, Liu et al. 2022."""
    return layer_lengths("trust_normalized", sums.of("g", "g"), sums, hyper)


def trust(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho L_p, so that ||e_p|| = rho ||w_p||."""
    return layer_lengths("trust", sums.of("g", "g"), sums, hyper)


def trust_global(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho L_p / ||g||."""
    return layer_lengths("trust_global", sums.of("g", "g"), sums, hyper)


def unit(sums: Sums, hyper: Hyper) -> Tensor:
    """c_p = rho / ||g_p||; tensors outside the layer filter take SAM's rho / ||g||."""
    return layer_lengths("unit", sums.of("g", "g"), sums, hyper)


def opposite(sums: Sums, hyper: Hyper) -> Tensor:
    """The point across: e = -rho g / (||g|| + perturb_eps). CR-SAM, Wu et al. 2024."""
    return -sam(sums, hyper)


def vasso(sums: Sums, hyper: Hyper) -> tuple[Tensor, ...]:
    """e = rho m' / (||m'|| + perturb_eps), m' = (1 - theta) m + theta g as :func:`vasso_direction` will write it. VaSSO,
    Li & Giannakis 2023."""
    return _over_combination((theta := _weight_of_new(hyper.row("theta"), sums), 1 - theta), ("g", "m"), sums, hyper)


def friendly(sums: Sums, hyper: Hyper) -> tuple[Tensor, ...]:
    """e = rho c / (||c|| + perturb_eps), c = g - sigma m. Friendly SAM, Li et al. 2024."""
    return _over_combination((1.0, -hyper.row("sigma")), ("g", "m"), sums, hyper)


def friendly_adaptive(sums: Sums, hyper: Hyper) -> tuple[Tensor, ...]:
    """e = rho T^2 c / (||T c|| + perturb_eps), c = g - sigma m."""
    return _over_combination((1.0, -hyper.row("sigma")), ("Tg", "Tm"), sums, hyper)


def along_previous(sums: Sums, hyper: Hyper) -> Tensor:
    """e = rho y / (||y|| + perturb_eps), y the gradient of the step before. SAMPa, Xie et al. 2024."""
    return over_norm(hyper.row("rho"), sums.total("y", "y").sqrt(), hyper)


def extrapolate(sums: Sums, hyper: Hyper) -> Tensor:
    """w - lr y: where plain gradient descent would be. SAMPa, Xie et al. 2024."""
    return -hyper.row("lr")


def extrapolate_sgd(sums: Sums, hyper: Hyper) -> tuple[Row, ...]:
    """w - lr (y + weight_decay w + momentum buf): where SGD would step with y. SAMPa's authors' code, 2024."""
    lr = hyper.row("lr")
    decay, momentum = (lr * hyper.row(name, own) * hyper.sign() for name in ("weight_decay", "momentum"))
    return -lr, -decay, -momentum  # maximize turns y round alone


def _partly_over_norm(norm: Tensor, hyper: Hyper) -> Tensor:
    rho, part = hyper.row("rho"), hyper.row("normalization")
    return torch.where(norm > 0, rho * (1 - part), 0.0) + over_norm(rho * part, norm, hyper)


def _over_combination(c: tuple[Row, ...], inputs: tuple[str, ...], sums: Sums, hyper: Hyper) -> tuple[Tensor, ...]:
    rho, norm = hyper.row("rho"), direction_norm(inputs, c, sums)
    return tuple(over_norm(rho * x, norm, hyper) for x in c)


def _weight_of_new(weight: Tensor, sums: Sums) -> Tensor:
    """A moving average's weight of the new gradient: 1 where m is still zero, so that m starts as g."""
    return torch.where(sums.of("m", "m") > 0, weight, 1.0)


def over_norm(numerator: Tensor, norm: Tensor, hyper: Hyper) -> Tensor:
    return torch.where(norm > 0, numerator / (norm + hyper.common("perturb_eps", 0.0)), 0.0)


def layer_lengths(layer_scale: str, xx: Tensor, sums: Sums, hyper: Hyper) -> Tensor:
    """c_p of LayerSAM's e_p = c_p x_p, from ||x_p||^2 and ||w_p||^2."""
    rho = hyper.row("rho")
    if layer_scale == "unit":
        return over_norm(rho, torch.where(hyper.row("layer_scaled") > 0, xx, xx.sum()).sqrt(), hyper)
    scale = _layer_ratio(xx, sums, hyper)
    if layer_scale == "trust":
        return rho * scale
    norm_sq = xx if layer_scale == "trust_global" else scale.square() * xx
    return over_norm(rho * scale, norm_sq.sum().sqrt(), hyper)


def _layer_ratio(xx: Tensor, sums: Sums, hyper: Hyper) -> Tensor:
    """L_p = ||w_p|| / ||x_p||; 1 where ||w_p|| = 0 and for tensors outside the layer filter; 0 where x_p = 0."""
    ww = sums.of("w", "w")
    scale = torch.where((ww > 0) & (hyper.row("layer_scaled") > 0), ratio(ww, xx).sqrt(), 1.0)
    return torch.where(xx > 0, scale, 0.0)


# Descent: d = sum_i d_i x_i, and q = sum_i q_i x_i where it is written --------------------------------------------


class Direction(NamedTuple):
    """Coefficients of each input in d, in what is written, and in what is added to w after the base update; and a number a
    row that is kept."""

    d: tuple[Row, ...]
    q: tuple[Row, ...] | None = None
    post: tuple[Row, ...] | None = None
    kept: Row | None = None


def as_is(sums: Sums, hyper: Hyper) -> Direction:
    """d = x: the base optimizer on g, SAM on s."""
    return Direction(d=(1.0,))


def looksam_refresh(sums: Sums, hyper: Hyper) -> Direction:
    """d = s, q = s - (<g,s>/||g||^2) g. LookSAM, Liu et al. 2022."""
    gs, gg = (_scoped(sums.of(*pair), hyper) for pair in (("g", "s"), ("g", "g")))
    return Direction(d=(1.0, 0.0), q=(1.0, -ratio(gs, gg)))


def sam_blend(sums: Sums, hyper: Hyper) -> Direction:
    """d = a s + (1 - a) g, a = strength. Gradient norm penalty, Zhao, Zhang & Hu 2022."""
    a = hyper.row("strength")
    return Direction(d=(a, 1 - a))


def looksam_blend(sums: Sums, hyper: Hyper) -> Direction:
    """d = a s + (1 - a) g, a = strength; q as :func:`looksam_refresh`."""
    return sam_blend(sums, hyper)._replace(q=looksam_refresh(sums, hyper).q)


def looksam_reuse(sums: Sums, hyper: Hyper) -> Direction:
    """d = g + alpha (||g||/||q||) q. LookSAM, Liu et al. 2022.

    q's term is 0 where ||q|| <= 2^-21 ||g||: such a q is what rounding left of nothing, as in a tensor of one element,
    and ||g||/||q|| would make a full step of it.
    """
    gg, qq = (_scoped(sums.of(x, x), hyper) for x in "gq")
    qq = torch.where(qq > ROUNDING_SQ * gg, qq, 0.0)
    return Direction(d=(1.0, hyper.row("alpha") * ratio(gg, qq).sqrt()))


def ssam(sums: Sums, hyper: Hyper) -> Direction:
    """d = (||g|| / (||s|| + perturb_eps)) s. SSAM, Tan et al. 2024."""
    return Direction(d=(over_norm(sums.total("g", "g").sqrt(), sums.total("s", "s").sqrt(), hyper),))


def gsam(sums: Sums, hyper: Hyper) -> Direction:
    """d = (1 + alpha c) s - alpha g, c = <g,s> / (||s||^2 + perturb_eps): SAM's direction, less what of g is orthogonal to s. GSAM,
    Zhuang et al. 2022."""
    c = over_norm(sums.total("g", "s"), sums.total("s", "s"), hyper)
    return Direction(d=(1 + hyper.row("alpha") * c, -hyper.row("alpha")))


def wsam(sums: Sums, hyper: Hyper) -> Direction:
    """d = g, and after the base update w -= lr a (s - g), a = gamma / (1 - gamma). WSAM, Yue et al. 2023."""
    pull = hyper.row("lr") * _gamma_odds(hyper)
    return Direction(d=(0.0, 1.0), post=(-pull, pull))


def wsam_coupled(sums: Sums, hyper: Hyper) -> Direction:
    """d = a s + (1 - a) g, a = gamma / (1 - gamma). WSAM, Yue et al. 2023."""
    return Direction(d=(_gamma_odds(hyper), 1 - _gamma_odds(hyper)))


def crsam(sums: Sums, hyper: Hyper) -> Direction:
    """d = (1 + gamma + beta) s + (gamma - beta) r - 2 gamma g, r the gradient at w - e. CR-SAM, Wu et al. 2024."""
    beta, gamma = hyper.row("beta"), hyper.row("gamma")
    return Direction(d=(gamma - beta, 1 + gamma + beta, -2 * gamma))


def vasso_direction(sums: Sums, hyper: Hyper) -> Direction:
    """d = s; m <- (1 - theta) m + theta g, the first time g. VaSSO, Li & Giannakis 2023."""
    theta = _weight_of_new(hyper.row("theta"), sums)
    return Direction(d=(1.0, 0.0, 0.0), q=(0.0, theta, 1 - theta))


def friendly_direction(sums: Sums, hyper: Hyper) -> Direction:
    """d = s; m <- lambda m + (1 - lambda) g, the first time g. Friendly SAM, Li et al. 2024."""
    new = _weight_of_new(1 - hyper.row("lambda_"), sums)
    return Direction(d=(1.0, 0.0, 0.0), q=(0.0, new, 1 - new))


def sampa(sums: Sums, hyper: Hyper) -> Direction:
    """d = (1 - lambda) s + lambda r; y <- r. SAMPa, Xie et al. 2024."""
    weight = hyper.row("lambda_")
    return Direction(d=(weight, 1 - weight), q=(1.0, 0.0))


def _gamma_odds(hyper: Hyper) -> Tensor:
    gamma = hyper.row("gamma")
    return gamma / (1 - gamma)


ROUNDING_SQ = 2.0**-42
"""(4 float32 ulps)^2."""


def _scoped(x: Tensor, hyper: Hyper) -> Tensor:
    """Per tensor or the total in every row, as ``norm_scope`` says."""
    return x if hyper.common("norm_scope", "global") == "tensor" else x.sum().expand_as(x)


# What a base makes of d ---------------------------------------------------------------------------------------------


def lars_ratio(d_norm: Tensor, sums: Sums, hyper: Hyper) -> Tensor:
    """r_p = trust_coefficient ||w_p|| / (||d_p|| + weight_decay ||w_p|| + eps), which scales d_p + weight_decay w_p. LARS,
    You, Gitman & Ginsburg 2017.

    1 where either norm is 0; with ``trust_clip`` min(1, r_p / lr), so that the row's rate is the smaller of lr and r_p; 1 in
    groups without weight decay unless ``always_adapt``.
    """
    weight_decay, eps, coefficient = (hyper.row(x, own) for x in ("weight_decay", "eps", "trust_coefficient"))
    always, clip = (hyper.row(x, own) > 0 for x in ("always_adapt", "trust_clip"))
    w_norm = sums.of("w", "w").sqrt()
    r = torch.where((w_norm > 0) & (d_norm > 0), coefficient * w_norm / (d_norm + weight_decay * w_norm + eps), 1.0)
    lr = hyper.row("lr")
    r = torch.where(clip, torch.where(r < lr, r / lr, 1.0), r)
    return torch.where((weight_decay != 0) | always, r, 1.0)


# The rules by name --------------------------------------------------------------------------------------------------


class Ascent(NamedTuple):
    formula: Callable[[Sums, Hyper], Tensor | tuple[Row, ...]]
    """c, one number a row; or one for each input."""
    pairs: tuple[Pair, ...]
    inputs: tuple[str, ...] = ("g",)
    adaptive: str | None = None
    """The rule that takes its place where a group is adaptive, with T = |w| + eta, or preconditioned, with the T of
    :mod:`looksam_kernels.preconditioning` and e = T sum_i c_i x_i."""
    everywhere: bool = False
    """Does it move all tensors, also those outside a perturb filter?"""
    unified: str | None = None
    """The rule that takes its place where a group's ``normalization`` is not 1."""


class Descent(NamedTuple):
    formula: Callable[[Sums, Hyper], Direction]
    inputs: tuple[str, ...]
    """The first input decides which rows take part."""
    pairs: tuple[Pair, ...]
    """Sums that are taken; each input must stand in one, so that a non-finite value is seen."""
    clip_pairs: tuple[Pair, ...] = ()
    """Further sums that ||d||^2 needs, when it is clipped."""
    writes: str | None = None
    """The column that takes the second combination; its ||.||^2 goes to ``<column>_norm_sq`` where there is one."""
    whole: bool = False
    """Does it take all gradients to make sense? A row that lacks one then has the first input alone for d."""
    everywhere: bool = False
    """Is it the same for tensors outside a perturb filter? The others are about those inside, as if there were no others;
    those outside have the first input for d."""
    blended: str | None = None
    """The rule that takes its place where a group's ``strength`` is not 1."""
    only_checked: tuple[Pair, ...] = ()
    """Those of ``pairs`` that the formula does not read: they show that an input is not finite, and serve to clip."""
    along: str | None = None
    """The column along which the weights rest perturbed between the steps. The rule clips d by itself, tells the rows that are
    moved from the others (``hyper.inside``), and gives the number that is kept in :func:`scale_of` this column."""


def _pairs(names: str) -> tuple[Pair, ...]:
    """``"gg gs"`` -> (("g", "g"), ("g", "s"))"""
    return tuple((name[0], name[1]) for name in names.split())


ASCENTS = {
    "sam": Ascent(sam, _pairs("gg"), adaptive="asam", unified="sam_unified"),
    "sam_unified": Ascent(sam_unified, _pairs("gg"), adaptive="asam_unified"),
    "asam_unified": Ascent(asam_unified, (("Tg", "Tg"),)),
    "asam": Ascent(asam, (("Tg", "Tg"),)),
    "esam": Ascent(esam, _pairs("gg"), adaptive="esam_adaptive"),
    "esam_adaptive": Ascent(esam_adaptive, (("Tg", "Tg"),)),
    "trust_normalized": Ascent(trust_normalized, _pairs("gg ww")),
    "trust": Ascent(trust, _pairs("gg ww")),
    "trust_global": Ascent(trust_global, _pairs("gg ww")),
    "unit": Ascent(unit, _pairs("gg")),
    "opposite": Ascent(opposite, _pairs("gg")),
    "vasso": Ascent(vasso, _pairs("gg gm mm"), ("g", "m")),
    "friendly": Ascent(friendly, _pairs("gg gm mm"), ("g", "m"), adaptive="friendly_adaptive"),
    "friendly_adaptive": Ascent(friendly_adaptive, (("Tg", "Tg"), ("Tg", "Tm"), ("Tm", "Tm")), ("g", "m")),
    "along_previous": Ascent(along_previous, _pairs("yy"), ("y",)),
    "extrapolate": Ascent(extrapolate, _pairs("yy"), ("y",), everywhere=True),
    "extrapolate_sgd": Ascent(extrapolate_sgd, _pairs("yy"), ("y", "w", "momentum_buffer"), everywhere=True),
}

DESCENTS = {
    "at_w": Descent(as_is, ("g",), _pairs("gg"), everywhere=True, only_checked=_pairs("gg")),
    "at_perturbed": Descent(
        as_is, ("s",), _pairs("ss"), everywhere=True, blended="sam_blend", only_checked=_pairs("ss")
    ),
    "sam_blend": Descent(
        sam_blend, ("s", "g"), _pairs("gg ss"), _pairs("gs"), whole=True, only_checked=_pairs("gg ss")
    ),
    "looksam_refresh": Descent(
        looksam_refresh, ("s", "g"), _pairs("gg gs"), _pairs("ss"), writes="q", blended="looksam_blend"
    ),
    "looksam_blend": Descent(
        looksam_blend, ("s", "g"), _pairs("gg gs ss"), writes="q", whole=True, only_checked=_pairs("ss")
    ),
    "looksam_reuse": Descent(looksam_reuse, ("g", "q"), _pairs("gg qq"), _pairs("gq")),
    "ssam": Descent(ssam, ("s",), _pairs("gg ss")),
    "gsam": Descent(gsam, ("s", "g"), _pairs("gg gs ss"), whole=True, only_checked=_pairs("gg")),
    "wsam": Descent(wsam, ("s", "g"), _pairs("gg ss"), _pairs("gs"), whole=True, only_checked=_pairs("gg ss")),
    "wsam_coupled": Descent(
        wsam_coupled, ("s", "g"), _pairs("gg ss"), _pairs("gs"), whole=True, only_checked=_pairs("gg ss")
    ),
    "crsam": Descent(
        crsam, ("r", "s", "g"), _pairs("gg ss rr"), _pairs("gs gr sr"), whole=True, only_checked=_pairs("gg ss rr")
    ),
    "vasso_direction": Descent(
        vasso_direction,
        ("s", "g", "m"),
        _pairs("ss gg mm"),
        _pairs("gs gm sm"),
        writes="m",
        whole=True,
        only_checked=_pairs("ss gg"),
    ),
    "friendly_direction": Descent(
        friendly_direction,
        ("s", "g", "m"),
        _pairs("ss gg mm"),
        _pairs("gs gm sm"),
        writes="m",
        whole=True,
        only_checked=_pairs("ss gg"),
    ),
    "sampa": Descent(
        sampa,
        ("r", "s"),
        _pairs("ss rr"),
        _pairs("sr"),
        writes="y",
        whole=True,
        everywhere=True,
        only_checked=_pairs("ss rr"),
    ),
}

STORED = ("w", "q", "m", "y", "momentum_buffer", "exp_avg")
"""Columns without a loss scale in them; all others are gradients of this step, which contain it."""
WRITTEN = ("q", "m", "y")
"""Those that descents write."""


def scale_of(column: str) -> str:
    """The column of numbers, one a row, that says how far along ``column`` the weights rest: u = w + scale x. It enters the
    sums as its pair with itself, whose value is the number."""
    return f"{column}_scale"


def is_scale(column: str) -> bool:
    return column.endswith("_scale")


def stretched(column: str) -> str | None:
    """Of a virtual column ``Tx``, T times x with ASAM's T = |w| + eta or a preconditioner's: x; of another ``None``."""
    return column[1:] if column.startswith("T") else None


def carries_scale(column: str) -> bool:
    """Is the loss scale in it?"""
    return (stretched(column) or column) not in STORED and not is_scale(column)


MAX_INPUTS = 3

_built_in = {*ASCENTS, *DESCENTS}

Formula = TypeVar("Formula", bound=Callable[[Sums, Hyper], Any])


def rule(
    kind: str,
    *,
    inputs: str = "g",
    pairs: str = "gg",
    clip_pairs: str = "",
    writes: str | None = None,
    whole: bool = False,
) -> Callable[[Formula], Formula]:
    """Makes a function of the sums a rule under its own name, which :func:`looksam_kernels.measure` and the variants take.

    ``@rule("ascent")``: the function returns c, one number a row, e = sum_i c_i x_i (with several inputs a tuple of them).
    ``@rule("descent", inputs="s g", pairs="gg gs ss")``: it returns a :class:`Direction`, d = sum_i d_i x_i.

    The function gets :class:`Sums` without loss scale and :class:`Hyper`, and works with tensors on the device: no
    ``.item()``, and 0 where a norm is 0 (:func:`ratio`). Defining a rule again replaces it.

    Args:
        kind: ``"ascent"`` or ``"descent"``.
        inputs: the columns that are combined, one to three: g gradient at w, s at w + e, r at a third point; q, m, y what
            an earlier step has written. The first decides which parameters take part.
        pairs: the inner products that the function reads; every input must be in one, so that a value that is not finite
            is seen.
        clip_pairs: of a descent: further ones that ||d||^2 needs; default: those of the inputs with each other.
        writes: of a descent: q, m or y, which takes the second combination of the direction.
        whole: of a descent: parameters that lack one of the gradients have d = the first input.

    Raises:
        ValueError: an argument that is none of these, or the name of a rule that is built in.
    """
    columns, sums, more = tuple(inputs.split()), _pairs(pairs), _pairs(clip_pairs)
    if kind not in ("ascent", "descent"):
        raise ValueError(f'kind must be "ascent" or "descent", not {kind!r}')
    if not 1 <= len(columns) <= MAX_INPUTS:
        raise ValueError(f"inputs must be one to three columns, not {inputs!r}")
    for column in columns:
        if not any(column in pair for pair in sums):
            raise ValueError(f"inputs: {column} is in none of the pairs {pairs!r}; add {column}{column}")
    if writes is not None and (kind == "ascent" or writes not in WRITTEN):
        raise ValueError(f"writes must be q, m or y, and of a descent, not {writes!r}")

    def register(formula: Formula) -> Formula:
        name = getattr(formula, "__name__", "")
        if name in _built_in:
            raise ValueError(f"there is a rule {name!r} already; give the function another name")
        ASCENTS.pop(name, None)
        DESCENTS.pop(name, None)
        if kind == "ascent":
            ASCENTS[name] = Ascent(formula, sums, columns)
        else:
            have = {frozenset(pair) for pair in (*sums, *more)}
            products = combinations_with_replacement(columns, 2)
            missing = tuple(pair for pair in products if frozenset(pair) not in have)
            DESCENTS[name] = Descent(formula, columns, sums, (*more, *missing), writes, whole)
        return formula

    return register


KEEP_NORM = ("q",)
"""Written columns whose squared norms stand beside them, in ``<column>_norm_sq``: the sums need not read them again."""


def kept_norm(pair: Pair) -> str | None:
    """The column that holds this sum already; counted in rows that have a g."""
    x, y = pair
    return f"{x}_norm_sq" if x == y and x in KEEP_NORM else None


Presence = Mapping[str, Sequence[bool]]
"""Which rows have a gradient, for each one that a rule reads; asked for where a row lacks some of them."""


def is_everywhere(name: str) -> bool:
    return ASCENTS[name].everywhere if name in ASCENTS else DESCENTS[name].everywhere


def evaluate(
    name: str,
    sums: Sums,
    hyper: Hyper,
    found_inf: Tensor,
    scaling: Scaling,
    present: Presence | None = None,
    inside: Sequence[bool] | None = None,
) -> Coefficients:
    """The coefficients of a rule, for gradients as they are, loss scale and all."""
    (*combined, kept), trust = coefficients_of(name, sums, hyper, found_inf, scaling, present, inside)
    d, q, post = (None if x is None else _stacked(x, sums) for x in combined)
    assert d is not None
    kept = None if kept is None else _stacked([kept], sums)[0]
    return Coefficients(
        inputs_of(name), d, q, found_inf, post, writes_of(name) or "q", trust, kept, keeps_of(name) or ""
    )


def writes_of(name: str) -> str | None:
    return DESCENTS[name].writes if name in DESCENTS else None


def keeps_of(name: str) -> str | None:
    """The column of numbers, one a row, that a step by this rule writes."""
    along = DESCENTS[name].along if name in DESCENTS else None
    return None if along is None else scale_of(along)


def build_in(name: str, rule: Descent) -> None:
    """Adds a rule of this package that stands elsewhere (:mod:`looksam_kernels.one_pass`)."""
    DESCENTS[name] = rule
    _built_in.add(name)


def inputs_of(name: str) -> tuple[str, ...]:
    return ASCENTS[name].inputs if name in ASCENTS else DESCENTS[name].inputs


def coefficients_of(
    name: str,
    sums: Sums,
    hyper: Hyper,
    found_inf: Tensor,
    scaling: Scaling,
    present: Presence | None = None,
    inside: Sequence[bool] | None = None,
) -> tuple[Direction, Tensor | None]:
    """:func:`evaluate`, each coefficient by itself; and LARS's trust ratio.

    This, and the formulas that it calls, does nothing but arithmetic, comparisons, ``where``, square roots and totals over the
    rows. The Triton backend relies on that: it runs them once, on symbols, and the kernel then does what they did.
    """
    unscaled = _unscaled(sums, hyper)
    if name in ASCENTS:
        return _ascent(ASCENTS[name], unscaled, hyper, found_inf, present, inside), None
    return _descent(DESCENTS[name], unscaled, hyper, found_inf, scaling, present, inside)


def _ascent(
    rule: Ascent,
    sums: Sums,
    hyper: Hyper,
    found_inf: Tensor,
    present: Presence | None,
    inside: Sequence[bool] | None,
) -> Direction:
    """The coefficients of e; 0 after a non-finite sum. Rows without the first input, and those outside, are in no norm."""
    if present is not None:
        sums = _of_rows(sums, hyper.upload(present[rule.inputs[0]], torch.bool))
    if inside is not None:
        sums = _of_rows(sums, hyper.upload(inside, torch.bool))
    c = rule.formula(sums, hyper)
    if isinstance(c, Tensor):
        c = c.reshape(len(rule.inputs), -1).unbind()
    each = c if isinstance(c, tuple) else (c,)
    stopped = [torch.where(found_inf > 0, 0.0, x * hyper.sign()) for x in each]
    if inside is not None:
        stopped = [torch.where(hyper.upload(inside, torch.bool), x, 0.0) for x in stopped]
    return Direction(_for_scaled(rule.inputs, stopped, hyper))


def _of_rows(sums: Sums, rows: Tensor) -> Sums:
    """0 in the others."""
    return Sums(sums.pairs, torch.where(rows, sums.values, 0.0))


def _descent(
    rule: Descent,
    sums: Sums,
    hyper: Hyper,
    found_inf: Tensor,
    scaling: Scaling,
    present: Presence | None,
    inside: Sequence[bool] | None,
) -> tuple[Direction, Tensor | None]:
    """The coefficients of d, of what is written and of what is added after the update.

    d is scaled by min(1, max_grad_norm / ||d||), then for LARS by its trust ratio. ``maximize`` turns d and the addition
    round, not what is written.
    Rows that lack a gradient of a rule which needs all, and those outside, have the first input for d, and keep what it
    makes a mean of. ||d|| is over all rows.
    """
    if rule.along is not None:
        return _resting(rule, sums, hyper, found_inf, scaling, present, inside), None
    direction = rule.formula(sums if inside is None else _of_rows(sums, hyper.upload(inside, torch.bool)), hyper)
    if direction.post is not None and rule.writes in rule.inputs:
        raise ValueError(
            f"{rule.formula.__name__!r} adds with inputs after the update, but {rule.writes} is written before that"
        )
    if present is not None:
        direction = _with_gaps(rule, direction, sums, hyper, present)
    if inside is not None:
        direction = _alone(rule, direction, sums, ~hyper.upload(inside, torch.bool), keeps=False)
    d, q, post, _ = direction
    if scaling.max_grad_norm is not None:
        shrink = ratio(scaling.max_grad_norm, direction_norm(rule.inputs, d, sums)).clamp(max=1)
        d = tuple(x * shrink for x in d)
    trust = lars_ratio(row_norms(rule.inputs, d, sums), sums, hyper) if scaling.trust_ratio else None
    if trust is not None:
        d = tuple(x * trust for x in d)
    d = _for_scaled(rule.inputs, [x * hyper.sign() for x in d], hyper)
    q = None if q is None else _for_scaled(rule.inputs, q, hyper)
    post = None if post is None else _for_scaled(rule.inputs, [x * hyper.sign() for x in post], hyper)
    return Direction(d, q, post), trust


def _resting(
    rule: Descent,
    sums: Sums,
    hyper: Hyper,
    found_inf: Tensor,
    scaling: Scaling,
    present: Presence | None,
    inside: Sequence[bool] | None,
) -> Direction:
    """Of a rule whose weights rest perturbed: it clips, and knows which rows are moved. What is kept stays after a sum that was
    not finite. ``maximize`` as in :func:`_descent`."""
    hyper.limit = scaling.max_grad_norm
    for rows in (inside, None if present is None else present[rule.inputs[0]]):
        if rows is not None:
            flags = hyper.upload(rows, torch.bool)
            hyper.inside = flags if hyper.inside is None else hyper.inside & flags
    d, q, post, kept = rule.formula(sums, hyper)
    assert post is not None
    assert rule.along is not None
    assert kept is not None
    kept = torch.where(found_inf > 0, sums.of(scale_of(rule.along), scale_of(rule.along)), kept)
    d, post = (_for_scaled(rule.inputs, [x * hyper.sign() for x in rows], hyper) for rows in (d, post))
    return Direction(d, None if q is None else _for_scaled(rule.inputs, q, hyper), post, kept)


def _with_gaps(rule: Descent, direction: Direction, sums: Sums, hyper: Hyper, present: Presence) -> Direction:
    takes_part = hyper.upload(present[rule.inputs[0]], torch.bool)
    alone = ~torch.stack([hyper.upload(there, torch.bool) for there in present.values()]).all(0)
    direction = _alone(rule, direction, sums, alone, keeps=True)
    return direction._replace(d=tuple(torch.where(takes_part, x, 0.0) for x in direction.d))


def _alone(rule: Descent, direction: Direction, sums: Sums, alone: Tensor, keeps: bool) -> Direction:
    """d of the rows that are alone is the first input. What is written stays where the rule reads it too; elsewhere it is
    what the formula says (``keeps``), or 0."""

    def only(column: str | None, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """In rows that are alone this column as it is, elsewhere the coefficients."""
        each = zip(rule.inputs, _stacked(rows, sums), strict=True)
        return tuple(torch.where(alone, 1.0 if x == column else 0.0, c) for x, c in each)

    d, q, post, _ = direction
    if q is not None and (rule.writes in rule.inputs or not keeps):
        q = only(rule.writes, q)
    return Direction(only(rule.inputs[0], d), q, None if post is None else only(None, post))


def gaps(rule: str, present: Callable[[str], list[bool]]) -> Presence | None:
    """Which rows have each input of the rule, if some lack one that is not simply 0 there; ``None`` if none does."""
    if rule in ASCENTS:
        first, *others = ASCENTS[rule].inputs
        there = present(first)
        if any(x and not g for name in others for x, g in zip(present(name), there, strict=True)):
            return {first: there}
    elif DESCENTS[rule].along is not None:
        first = DESCENTS[rule].inputs[0]
        return {first: there} if False in (there := present(first)) else None
    elif DESCENTS[rule].whole:
        rows = {x: present(x) for x in DESCENTS[rule].inputs if x not in STORED}
        if any(there != rows[DESCENTS[rule].inputs[0]] for there in rows.values()):
            return rows
    return None


def _unscaled(sums: Sums, hyper: Hyper) -> Sums:
    """The sums of gradients without their loss scale."""
    if not sums.pairs:
        return sums
    powers = (sum(map(carries_scale, pair)) for pair in sums.pairs)
    return Sums(sums.pairs, torch.stack([x * hyper.inv_scale**n for n, x in zip(powers, sums.values, strict=True)]))


def _for_scaled(inputs: tuple[str, ...], rows: Sequence[Row], hyper: Hyper) -> tuple[Row, ...]:
    """Coefficients of unscaled inputs -> coefficients of the inputs as they are."""
    return tuple(c * hyper.inv_scale if carries_scale(x) else c for x, c in zip(inputs, rows, strict=True))


def direction_norm(inputs: tuple[str, ...], d: Sequence[Row], sums: Sums) -> Tensor:
    """||d|| of d = sum_i d_i x_i, over all tensors, from the inner products alone."""
    return _squares(inputs, d, sums).sum().clamp(min=0).sqrt()


def row_norms(inputs: tuple[str, ...], d: Sequence[Row], sums: Sums) -> Tensor:
    """||d_p|| of each tensor, likewise."""
    return _squares(inputs, d, sums).clamp(min=0).sqrt()


def _squares(inputs: tuple[str, ...], d: Sequence[Row], sums: Sums) -> Tensor:
    products: list[Tensor] = [d[i] * d[j] * sums.of(x, y) for i, x in enumerate(inputs) for j, y in enumerate(inputs)]
    return sum(products[1:], start=products[0])


def _stacked(coefficients: Sequence[Row], sums: Sums) -> Tensor:
    return torch.stack([sums.values.new_zeros(sums.values.shape[1]) + c for c in coefficients])
