"""The three choices of a variant as data: when it looks twice, how far it steps up, which combination it steps down with."""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import NamedTuple

from looksam.hyper import Radius
from looksam_kernels.formulas import ASCENTS, DESCENTS, Ascent, Descent
from looksam_kernels.formulas import rule as rule


class Look(NamedTuple):
    """One forward and backward: ``ascent`` says by which rule the weights move before it (``None``: not at all),
    ``column`` under which name the gradient enters the rules that follow."""

    column: str
    ascent: str | None = None


class Plan(NamedTuple):
    """One kind of step: the looks, and the rule of the way down. Rules: :mod:`looksam_kernels.formulas`."""

    looks: tuple[Look, ...]
    descent: str

    @property
    def in_two_calls(self) -> bool:
        """Is it one look at w and one at w + e, so that the user can run both backward passes by hand?"""
        return len(self.looks) == 2 and self.looks[0].ascent is None

    @property
    def writes(self) -> str | None:
        """The column of the state that the way down writes."""
        return DESCENTS[self.descent].writes


def spent(plan: Plan, look: Look) -> frozenset[str]:
    """The plan's columns that no rule after this look's ascent reads."""
    return _spent(
        plan, look, DESCENTS[plan.descent], tuple(ASCENTS[x.ascent] for x in plan.looks if x.ascent is not None)
    )


@cache
def _spent(plan: Plan, look: Look, descent: Descent, ascents: tuple[Ascent, ...]) -> frozenset[str]:
    """With the rules themselves: a user may define one again under the same name."""
    later = {x.ascent for x in plan.looks[plan.looks.index(look) + 1 :]}
    rules: list[Ascent | Descent] = [descent, *(ASCENTS[name] for name in later if name is not None)]
    read = {column for rule in rules for column in (*rule.inputs, *chain.from_iterable(rule.pairs))}
    return frozenset(x.column for x in plan.looks) - read


class Variant(NamedTuple):
    """A sharpness-aware method: every k-th step, from the first on, is a sharp one, those between are cheap."""

    sharp: Plan
    cheap: Plan
    radius: Radius | None = None
    """The rho that a group has now, where it is not simply the group's ``rho``."""


PLAIN = Plan((Look("g"),), "first")
"""A step of the base optimizer."""
REUSE = Plan((Look("g"),), "looksam_reuse")
"""LookSAM's step along what it knows from the last sharp one."""


def two_looks(ascent: str, descent: str) -> Plan:
    """g at w, s at w + e."""
    return Plan((Look("g"), Look("s", ascent)), descent)
