"""Hyper-parameters: the values that are allowed, and the groups as the rules of the ops read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, NamedTuple

from looksam_kernels import Mask

Group = dict[str, Any]


Radius = Callable[[Group], Any]
"""A group -> its rho of now, a number or a 0-dim tensor."""


class Range(NamedTuple):
    """The values that a hyper-parameter may have, given the others of its group."""

    accepts: Callable[[Any, Group], bool]
    text: str
    """Completes "must be ..."."""


def at_least(low: float) -> Range:
    return Range(lambda x, _: bool(x >= low), f"at least {low}")


def within(low: float, high: float, *, without: float | None = None) -> Range:
    """From ``low`` to ``high``, both included but for the one that is ``without``."""
    left, right = "(" if without == low else "[", ")" if without == high else "]"
    return Range(lambda x, _: bool(low <= x <= high and x != without), f"in {left}{low}, {high}{right}")


def whole_at_least(low: int) -> Range:
    return Range(lambda x, _: isinstance(x, int) and x >= low, f"a whole number of at least {low}")


def one_of(*names: str) -> Range:
    return Range(lambda x, _: x in names, f"one of {', '.join(map(repr, names))}")


def at_most_its(other: str, low: float) -> Range:
    return Range(lambda x, group: bool(low <= x <= group[other]), f"at least {low} and at most {other}")


def none_or_above(other: str) -> Range:
    return Range(lambda x, group: x is None or bool(x > group[other]), f"larger than {other}, or None")


RANGES: dict[str, Range] = {
    "rho": at_least(0),
    "alpha": at_least(0),
    "eta": at_least(0),
    "perturb_eps": at_least(0),
    "k": whole_at_least(1),
    "norm_scope": one_of("global", "tensor"),
    "layer_scale": one_of("trust_normalized", "trust", "trust_global", "unit"),
    "rho_min": at_most_its("rho", low=0),
    "lr_min": at_least(0),
    "lr_max": none_or_above("lr_min"),
    "beta": at_least(0),
    "gamma": at_least(0),
    "theta": within(0, 1, without=0),
    "sigma": at_least(0),
    "lambda_": within(0, 1),
    "seed": whole_at_least(0),
    "delta": within(0, 1, without=1),
    "total_steps": whole_at_least(1),
    "lambda1": Range(lambda x, _: isfinite(x), "finite"),
    "lambda2": Range(lambda x, _: isfinite(x), "finite"),
    "max_grad_norm": Range(lambda x, _: x is None or x > 0, "positive or None"),
}
"""Of every hyper-parameter of a variant. A class narrows one where its method asks for it."""

COMMON = ("k", "norm_scope", "layer_scale", "decouple", "perturb_eps", "max_grad_norm")
"""What all groups share. A class adds to it."""


def check(group: Group, names: Iterable[str], first: Group, ranges: Mapping[str, Range], shared: Iterable[str]) -> None:
    """Are the values of ``names`` in range, and those that all groups share the same as in the ``first`` group?

    Raises:
        ValueError: which names the argument, what it may be, and the value.
    """
    for name in names:
        if name in ranges and not ranges[name].accepts(group[name], group):
            raise ValueError(f"{name} must be {ranges[name].text}, not {group[name]!r}")
    for name in shared:
        if name in group and group[name] != first[name]:
            raise ValueError(f"{name} must be the same in all groups: {first[name]!r} and {group[name]!r}")


def for_ops(groups: list[Group], radius: Radius | None = None) -> list[Group]:
    """The groups as the ops read them, with the ``radius`` of now for rho; twice where a layer filter keeps some tensors
    out of the layer-wise scale."""
    if radius is not None:
        groups = [{**g, "rho": radius(g)} for g in groups]
    if not any("layer_filter" in g for g in groups):
        return groups
    return [{**g, "layer_scaled": scaled} for scaled in (1.0, 0.0) for g in groups]


def row_groups(groups: list[Group]) -> list[int]:
    """The index into :func:`for_ops` of each parameter's group."""
    rows = []
    for i, g in enumerate(groups):
        inside = g.get("layer_filter", [True] * len(g["params"]))
        rows += [i if ok else i + len(groups) for ok in inside]
    return rows


def etas(groups: list[Group]) -> list[float | None] | None:
    """ASAM's eta of each weight tensor (ndim >= 2) of the adaptive groups."""
    if not any(g.get("adaptive") for g in groups):
        return None
    return [g["eta"] if g["adaptive"] and p.ndim >= 2 else None for g in groups for p in g["params"]]


def mask(groups: list[Group]) -> Mask | None:
    """ESAM's mask of the sharp step that comes; ``None`` where every element is kept."""
    first = groups[0]
    if "draws" not in first or first["beta"] == 1:
        return None
    return Mask(first["beta"], first["seed"], first["draws"])
