"""The rules of the methods with one pass, whose weights rest perturbed between the steps: u = w + c x.

x is a column of state, c_p a number a row, which is kept in :func:`looksam_kernels.formulas.scale_of` this column. The
gradient g is taken at u. One step takes the old perturbation out, updates, and puts the new one in: the bases here are
affine in w, so that both perturbations are one combination of g and x, which is added to what the base makes of u.

Gradients change their sign where groups maximize, stored columns do not: their coefficients get it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.formulas import (
    Descent,
    Direction,
    Hyper,
    Pair,
    Row,
    Sums,
    build_in,
    layer_lengths,
    over_norm,
    ratio,
    row_norms,
    scale_of,
)
from looksam_kernels.updates import hyper_of, own


class Moment(NamedTuple):
    """A base's momentum x, which becomes old x + new (d + weight_decay w), or old x + new d."""

    column: str
    weights: Callable[[Hyper], tuple[Row, Row]]
    """old, new."""
    coupled: bool
    """Is the weight decay in it? Otherwise it shrinks w by 1 - lr weight_decay."""


def _buffer(hyper: Hyper) -> tuple[Row, Row]:
    return hyper.row("momentum", own), 1.0


def _average(hyper: Hyper) -> tuple[Row, Row]:
    beta1 = hyper.row("beta1", hyper_of)
    return beta1, 1 - beta1


MOMENTS = {
    "sgd": Moment("momentum_buffer", _buffer, True),
    "adam": Moment("exp_avg", _average, True),
    "adamw": Moment("exp_avg", _average, False),
}
"""Of the bases that MSAM works with."""
DECAY_IS_COUPLED = {
    **dict.fromkeys(("sgd", "adam", "adagrad", "rmsprop", "adadelta"), True),
    **dict.fromkeys(("adamw", "lion"), False),
}
"""Of the bases that S2-SAM works with: is weight_decay w added to d? Otherwise it shrinks w by 1 - lr weight_decay."""


def msam(base: str, layerwise: bool, sums: Sums, hyper: Hyper) -> Direction:
    """u = w - rho v / (||v|| + perturb_eps), v the base's momentum; layerwise: as LayerSAM's. MSAM, Becker, Altrock & Risse 2024.

    d = g; then w += -D c v + c' v', v' the new momentum, D = 1 - lr weight_decay if that is decoupled, else 1. ||v'|| follows from
    the inner products of v, g and u. A coupled decay is that of u, as in the authors' code.
    """
    v, weights, coupled = MOMENTS[base]
    old, new = weights(hyper)
    sign, clip = hyper.sign(), _clip(sums, hyper)
    moment = [new * clip * sign, old, *([new * hyper.row("weight_decay", own)] if coupled else [])]
    inputs = ("g", v, "w")[: len(moment)]
    c = -_lengths(row_norms(inputs, moment, sums).square(), layerwise, sums, hyper)
    undo = -_scale(v, sums) * (1.0 if coupled else _decay(hyper))
    post = [c * x for x in moment]
    post[1] = post[1] + undo
    return Direction((clip, *[0.0] * (len(inputs) - 1)), None, tuple(sign * x for x in post), c)


def s2sam(coupled: bool, layerwise: bool, sums: Sums, hyper: Hyper) -> Direction:
    """u = w + rho y / (||y|| + perturb_eps), y the gradient of the step before; layerwise: as LayerSAM's. S2-SAM, Ji et al. 2024.

    d = g, without the decay of c y that a base adds which couples it; then w += -D c y + c' g, D as for MSAM; y <- g.
    """
    sign, clip = hyper.sign(), _clip(sums, hyper)
    c = sign * _lengths(sums.of("g", "g"), layerwise, sums, hyper)
    undo = -_scale("y", sums)
    decay = hyper.row("weight_decay", own)
    d = (clip, sign * undo * decay if coupled else 0.0)
    return Direction(d, (1.0, 0.0), (sign * c, sign * (undo if coupled else undo * _decay(hyper))), c)


def _clip(sums: Sums, hyper: Hyper) -> Row:
    """min(1, max_grad_norm / ||g||)."""
    return 1.0 if hyper.limit is None else ratio(hyper.limit, sums.total("g", "g").sqrt()).clamp(max=1)


def _lengths(xx: Tensor, layerwise: bool, sums: Sums, hyper: Hyper) -> Tensor:
    """c_p of a perturbation c_p x_p, from ||x_p||^2; 0 in the rows outside, which are in no norm."""
    inside: Row = 1.0 if hyper.inside is None else torch.where(hyper.inside, 1.0, 0.0)
    xx = inside * xx
    if layerwise:
        return inside * layer_lengths(hyper.common("layer_scale"), xx, sums, hyper)
    return inside * over_norm(hyper.row("rho"), xx.sum().sqrt(), hyper)


def _scale(x: str, sums: Sums) -> Tensor:
    """c_p of now."""
    return sums.of(scale_of(x), scale_of(x))


def _decay(hyper: Hyper) -> Tensor:
    return 1 - hyper.row("lr") * hyper.row("weight_decay", own)


def _both(
    name: str,
    formula: Callable[..., Direction],
    along: str,
    inputs: tuple[str, ...],
    pairs: tuple[Pair, ...],
    **more: Any,
) -> None:
    """The rule, and the same with LayerSAM's scale."""
    kept = (scale_of(along), scale_of(along))
    weights = () if ("w", "w") in pairs else (("w", "w"),)
    build_in(name, Descent(partial(formula, False), inputs, (*pairs, kept), along=along, **more))
    build_in(name + LAYERWISE, Descent(partial(formula, True), inputs, (*pairs, *weights, kept), along=along, **more))


LAYERWISE = "_layerwise"

for _base, _moment in MOMENTS.items():
    _inputs = ("g", _moment.column, "w")[: 3 if _moment.coupled else 2]
    _both(
        f"msam_{_base}", partial(msam, _base), _moment.column, _inputs, tuple(combinations_with_replacement(_inputs, 2))
    )
for _name, _coupled in (("s2sam_coupled", True), ("s2sam_decoupled", False)):
    _both(_name, partial(s2sam, _coupled), "y", ("g", "y"), (("g", "g"),), writes="y")
