"""Hyper-parameters: the values that are allowed, and the groups as the rules of the ops read them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from looksam.messages import did_you_mean, is_slip, shown
from looksam_kernels import Mask, Rounding

Group = dict[str, Any]


Radius = Callable[[Group], Any]
"""A group -> its rho of now, a number or a 0-dim tensor."""


class Range(NamedTuple):
    """The values that a hyper-parameter may have."""

    takes: Callable[[Any], bool]
    """Is it of the right type?"""
    kind: str
    """The type in words."""
    accepts: Callable[[Any, Group], bool]
    """Is it, a Python value, in range, given the others of its group?"""
    text: str
    """The range in words: completes "must be ..."."""


def is_number(x: Any) -> bool:
    """A real number, or a tensor of one. True and False are none."""
    if isinstance(x, Tensor):
        return x.numel() == 1 and not x.is_complex() and x.dtype != torch.bool
    return isinstance(x, Real) and not isinstance(x, bool)


def is_number_or_none(x: Any) -> bool:
    return x is None or is_number(x)


def at_least(low: float) -> Range:
    return Range(is_number, "a number", lambda x, _: bool(x >= low), f"at least {low}")


def within(low: float, high: float, *, without: float | None = None) -> Range:
    """From ``low`` to ``high``, both included but for the one that is ``without``."""
    left, right = "(" if without == low else "[", ")" if without == high else "]"
    text = f"in {left}{low}, {high}{right}"
    return Range(is_number, "a number", lambda x, _: bool(low <= x <= high and x != without), text)


def finite() -> Range:
    return Range(is_number, "a number", lambda x, _: True, "finite")


def tuple_of(count: int) -> Range:
    """A tuple of so many finite numbers, as ``betas``."""

    def takes(x: Any) -> bool:
        return isinstance(x, tuple | list) and len(x) == count and all(map(is_number, x))

    def accepts(x: Any, group: Group) -> bool:
        return all(known is None or isfinite(known) for known in map(on_host, x))

    return Range(takes, f"a tuple of {count} numbers", accepts, "finite")


def whole_at_least(low: int) -> Range:
    def takes(x: Any) -> bool:
        return is_number(x) and not isinstance(x, Tensor)

    text = f"a whole number of at least {low}"
    return Range(takes, "a number", lambda x, _: isinstance(x, Integral) and int(x) >= low, text)


def flag() -> Range:
    return Range(lambda x: isinstance(x, bool), "a flag", lambda x, _: True, "True or False")


def flag_without(other: str) -> Range:
    """A flag that another excludes."""
    text = f"True or False, and False where {other} is True"
    return Range(lambda x: isinstance(x, bool), "a flag", lambda x, group: not (x and group.get(other)), text)


def one_of(*names: str) -> Range:
    text = f"one of {', '.join(map(repr, names))}"
    return Range(lambda x: isinstance(x, str), "a name", lambda x, _: x in names, text)


def none_or_one_of(*names: str) -> Range:
    text = f"{one_of(*names).text}, or None"
    return Range(lambda x: x is None or isinstance(x, str), "a name", lambda x, _: x is None or x in names, text)


def at_most_its(other: str, low: float) -> Range:
    def accepts(x: Any, group: Group) -> bool:
        high = on_host(group[other])
        return bool(x >= low) and (high is None or bool(x <= high))

    return Range(is_number, "a number", accepts, f"at least {low} and at most {other}")


def none_or_above(other: str) -> Range:
    def accepts(x: Any, group: Group) -> bool:
        low = on_host(group[other])
        return low is None or bool(x > low)

    return Range(is_number_or_none, "a number", accepts, f"larger than {other}, or None")


def none_or_positive() -> Range:
    return Range(is_number_or_none, "a number", lambda x, _: bool(x > 0), "positive, or None")


RANGES: dict[str, Range] = {
    "rho": at_least(0),
    "adaptive": flag(),
    "alpha": at_least(0),
    "normalization": within(0, 1),
    "strength": at_least(0),
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
    "decouple": flag(),
    "previous_batch": flag(),
    "sgd_step": flag(),
    "theta": within(0, 1, without=0),
    "sigma": at_least(0),
    "lambda_": within(0, 1),
    "seed": whole_at_least(0),
    "delta": within(0, 1, without=1),
    "total_steps": whole_at_least(1),
    "lambda1": finite(),
    "lambda2": finite(),
    "q_dtype": none_or_one_of("bfloat16"),
    "precondition": flag_without("adaptive"),
    "max_grad_norm": none_or_positive(),
    "nonfinite": one_of("skip", "ignore"),
    "rounding": none_or_one_of("nearest", "stochastic"),
    "rounding_seed": whole_at_least(0),
}
"""Of every hyper-parameter of a variant, and of what all variants have. A class narrows one where its method asks for it."""

STORAGE = ("rounding", "rounding_seed")
"""Says how bfloat16 weights are kept."""
COMMON = (
    *("k", "norm_scope", "layer_scale", "decouple", "perturb_eps", "precondition", "max_grad_norm", "nonfinite"),
    *STORAGE,
)
"""What all groups share. A class adds to it."""


FILTERS: dict[str, Callable[[Tensor], bool]] = {
    "layer_filter": lambda p: True,
    "adaptive_filter": lambda p: p.ndim >= 2,
    "perturb_filter": lambda p: True,
}
"""Functions parameter -> bool of the constructor, and what each says where the user gives none."""


def plain(value: Any) -> Any:
    """Numbers of numpy, 0-dim arrays included, as Python's, which a checkpoint can hold."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    is_numpys = not isinstance(value, Tensor) and getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_numpys else value


def on_host(x: Any) -> Any:
    """A number as it is; of a tensor the number in it, or ``None`` where reading it would wait for a device."""
    if not isinstance(x, Tensor):
        return x
    return x.item() if type(x) in (Tensor, Parameter) and x.device.type == "cpu" else None


def check(owner: str, name: str, value: Any, group: Group, allowed: Range) -> None:
    """
    Raises:
        TypeError: the value is of the wrong type. ValueError: it is out of range, or not finite.
    """
    if not allowed.takes(value):
        raise TypeError(f"{owner}: {name} must be {allowed.kind}, {allowed.text}, not {shown(value)}")
    known = on_host(value)
    if known is None:
        return
    if isinstance(known, Real) and not isfinite(known):
        text = allowed.text if allowed.text == "finite" else f"finite and {allowed.text}"
        raise ValueError(f"{name} must be {text}, not {known}")
    if not allowed.accepts(known, group):
        hint = did_you_mean(known, allowed.text.split("'")[1::2]) if isinstance(known, str) else ""
        raise ValueError(f"{name} must be {allowed.text}, not {known!r}{hint}")


class GroupChecks:
    """What stands in the groups: every group has all ``names``, with values that they may have. Looks at a value again only
    when it has changed.

    Args:
        owner: the optimizer's class, as errors name it.
        names: the variant's hyper-parameters.
        of_base: the base's.
        counted: further entries of every group, which the optimizer itself moves.
        ranges: of the variant's hyper-parameters; one without a range may have any value.
        shared: those of which all groups have the same value.
        base_ranges: of the base's hyper-parameters, none of which is bounded by another.
    """

    def __init__(
        self,
        owner: str,
        names: Iterable[str],
        of_base: Iterable[str],
        counted: Iterable[str],
        ranges: Mapping[str, Range],
        shared: Iterable[str],
        base_ranges: Mapping[str, Range],
    ) -> None:
        names, counted = [*names], [*counted]
        self._owner, self._base = owner, dict(base_ranges)
        self._ranges = {name: ranges[name] for name in names if name in ranges}
        self._shared = [name for name in shared if name in names]
        self._watched = (*self._ranges, *self._base)
        self.names = frozenset([*names, *of_base, *counted])
        self._keys = ("params", *(self.names - {*counted}))
        self._values, self._counts = operator.itemgetter(*self._keys), operator.itemgetter("params", *counted)
        self._seen: list[tuple[Any, ...]] = []

    def hold(self, groups: list[Group]) -> bool:
        """Is everything there, and as it was when :meth:`follow` saw it? Costs next to nothing: asked in every step."""
        if len(groups) != len(self._seen):
            return False
        try:
            for group, (count, *values) in zip(groups, self._seen, strict=True):
                self._counts(group)
                if len(group) != count or not all(map(operator.is_, self._values(group), values)):
                    return False
        except KeyError:
            return False
        return True

    def incomplete(self, groups: list[Group]) -> list[Group]:
        """Those that lack one of the names."""
        return [group for group in groups if not group.keys() >= self.names]

    def check(self, group: Group, first: Group) -> None:
        """Makes the values of a group Python's, and checks them; those that all groups share against the ``first`` group's.

        Raises:
            TypeError, ValueError: which name the argument, what it may be, and the value.
        """
        for name in self._watched:
            group[name] = plain(group.get(name))
        for name, allowed in (*self._base.items(), *self._ranges.items()):
            check(self._owner, name, group[name], group, allowed)
        for name in self._shared:
            if not _same(group[name], first[name]):
                raise ValueError(f"{name} must be the same in all groups: {first[name]!r} and {group[name]!r}")

    def follow(self, groups: list[Group]) -> None:
        """Checks what has been changed since the last call in groups that are complete.

        Raises:
            TypeError, ValueError: as :meth:`check`.
        """
        never = (0, *(_NEVER,) * len(self._keys))
        seen = self._seen if len(self._seen) == len(groups) else [never] * len(groups)
        for group, old in zip(groups, seen, strict=True):
            if len(group) != old[0]:
                check_keys(self._owner, group, self.names)
            values = zip(self._keys, self._values(group), old[1:], strict=True)
            self._check_again(group, groups[0], [x for x, a, b in values if a is not b and x in self._watched])
        self._seen = [(len(group), *self._values(group)) for group in groups]

    def _check_again(self, group: Group, first: Group, changed: list[str]) -> None:
        if any(name in self._ranges for name in changed):
            self.check(group, first)  # one may bound another
        else:
            for name in changed:
                group[name] = plain(group.get(name))
                check(self._owner, name, group[name], group, self._base[name])


def check_keys(owner: str, group: Group, known: Iterable[str]) -> None:
    """
    Raises:
        TypeError: a key is one of the ``known`` names but for a letter. (Others belong to other code: ``name``,
            ``initial_lr``, ``lr_scale``, ...)
    """
    names = {"params", "param_names", *(name for name in known if "." not in name)}  # base.lr is no name for users
    for key in group:
        if key not in names and any(is_slip(key, name) for name in names):
            raise TypeError(f"{owner}: a parameter group has no {key!r}{did_you_mean(key, names)}")


_NEVER = object()


def _same(a: Any, b: Any) -> bool:
    """As far as can be told without waiting for a device."""
    known = on_host(a), on_host(b)
    unknown = any(isinstance(x, Tensor) and y is None for x, y in zip((a, b), known, strict=True))
    return a is b or unknown or bool(known[0] == known[1])


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
        inside = g.get("layer_filter") or [True] * len(g["params"])
        rows += [i if ok else i + len(groups) for ok in inside]
    return rows


def inside(groups: list[Group]) -> list[bool] | None:
    """Which parameters the perturb filter takes; ``None``: all."""
    if all(g.get("perturb_filter") is None for g in groups):
        return None
    return [bool(x) for g in groups for x in g.get("perturb_filter") or [True] * len(g["params"])]


def etas(groups: list[Group]) -> list[float | None] | None:
    """ASAM's eta of each tensor of the adaptive groups that the adaptive filter takes; default: those with ndim >= 2."""
    if not any(g.get("adaptive") for g in groups):
        return None
    takes = [g.get("adaptive_filter") or [*map(FILTERS["adaptive_filter"], g["params"])] for g in groups]
    return [g["eta"] if g["adaptive"] and x else None for g, flags in zip(groups, takes, strict=True) for x in flags]


def mask(groups: list[Group]) -> Mask | None:
    """ESAM's mask of the sharp step that comes; ``None`` where every element is kept."""
    first = groups[0]
    if "draws" not in first or first["beta"] == 1:
        return None
    return Mask(first["beta"], first["seed"], first["draws"])


def rounding(groups: list[Group]) -> Rounding | None:
    """Of new bfloat16 weights; ``None``: to nearest."""
    if not groups or groups[0].get("rounding") != "stochastic":
        return None
    return Rounding(groups[0].get("rounding_seed", 0))
