"""A variant as data: which steps are sharp, their passes, the perturbation before each and the direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from looksam.hyper import Group, Radius, on_host
from looksam_kernels.formulas import ASCENTS, DESCENTS, Ascent, Descent
from looksam_kernels.formulas import rule as rule


class Pass(NamedTuple):
    """One forward and backward: ``ascent`` says by which rule the weights move before it (``None``: not at all),
    ``column`` under which name the gradient enters the rules that follow."""

    column: str
    ascent: str | None = None


class Plan(NamedTuple):
    """One kind of step: its passes, and the rule of the direction. Rules: :mod:`looksam_kernels.formulas`."""

    passes: tuple[Pass, ...]
    descent: str

    @property
    def in_two_calls(self) -> bool:
        """Is it one pass at w and one at w + e, so that the user can run both backward passes by hand?"""
        return len(self.passes) == 2 and self.passes[0].ascent is None

    def measures(self, column: str) -> bool:
        """Does an ascent read it?"""
        return any(column in ASCENTS[x.ascent].inputs for x in self.passes if x.ascent is not None)

    @property
    def writes_everywhere(self) -> bool:
        """Also for the parameters outside a perturb filter?"""
        return DESCENTS[self.descent].everywhere

    @property
    def along(self) -> str | None:
        """The column of the state along which the weights rest perturbed after the step; ``None``: they do not."""
        return DESCENTS[self.descent].along

    @property
    def writes(self) -> str | None:
        """The column of the state that the update writes."""
        return DESCENTS[self.descent].writes


def spent(plan: Plan, current: Pass) -> frozenset[str]:
    """The plan's columns that no rule after this pass's ascent reads."""
    return _spent(
        plan, current, DESCENTS[plan.descent], tuple(ASCENTS[x.ascent] for x in plan.passes if x.ascent is not None)
    )


@cache
def _spent(plan: Plan, current: Pass, descent: Descent, ascents: tuple[Ascent, ...]) -> frozenset[str]:
    """With the rules themselves: a user may define one again under the same name."""
    later = {x.ascent for x in plan.passes[plan.passes.index(current) + 1 :]}
    rules: list[Ascent | Descent] = [descent, *(ASCENTS[name] for name in later if name is not None)]
    read = {column for rule in rules for column in (*rule.inputs, *chain.from_iterable(rule.pairs))}
    return frozenset(x.column for x in plan.passes) - read


def resolved(plan: Plan, groups: Sequence[Group]) -> Plan:
    """With the rules that take the place of the plan's where a group's ``normalization`` or ``strength`` is not 1."""
    if _is_not_one("normalization", groups):
        plan = plan._replace(passes=tuple(x._replace(ascent=x.ascent and _unified(x.ascent)) for x in plan.passes))
    if _is_not_one("strength", groups):
        plan = plan._replace(descent=DESCENTS[plan.descent].blended or plan.descent)
    return plan


def _unified(ascent: str) -> str:
    return ASCENTS[ascent].unified or ascent


def _is_not_one(name: str, groups: Sequence[Group]) -> bool:
    """In one of them. A number on a device may be another. Asked in every step."""
    for g in groups:
        x = g.get(name, 1)
        if on_host(x) != 1 if isinstance(x, Tensor) else x != 1:
            return True
    return False


class Variant(NamedTuple):
    """A sharpness-aware method: every k-th step, from the first on, is a sharp one."""

    sharp: Plan
    between: Plan
    """Of the steps between the sharp ones: reuse steps or plain steps."""
    radius: Radius | None = None
    """The rho that a group has now, where it is not simply the group's ``rho``."""


PLAIN = Plan((Pass("g"),), "at_w")
"""A step of the base optimizer."""
REUSE = Plan((Pass("g"),), "looksam_reuse")
"""LookSAM's reuse step."""


def sharp_plan(ascent: str, descent: str) -> Plan:
    """g at w, s at w + e."""
    return Plan((Pass("g"), Pass("s", ascent)), descent)
