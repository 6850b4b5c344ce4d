"""The three choices of a variant as data: when it looks twice, how far it steps up, which combination it steps down with."""

from __future__ import annotations

from typing import NamedTuple

from looksam_kernels.formulas import DESCENTS


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
    def ascends(self) -> bool:
        """Do the weights move before a look?"""
        return any(look.ascent is not None for look in self.looks)

    @property
    def writes(self) -> str | None:
        """The column of the state that the way down writes."""
        return DESCENTS[self.descent].writes


class Variant(NamedTuple):
    """A sharpness-aware method: every k-th step, from the first on, is a sharp one, those between are cheap."""

    sharp: Plan
    cheap: Plan


PLAIN = Plan((Look("g"),), "first")
"""A step of the base optimizer."""
