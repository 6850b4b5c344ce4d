"""Words for errors: short forms of values, and the names that were probably meant."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from looksam_kernels import BACKENDS

LONGEST = 60


def shown(value: Any) -> str:
    """A value as an error says it: never a whole tensor, model or optimizer."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.ndim else f"a tensor ({value.dtype})"
    if isinstance(value, Module | torch.optim.Optimizer) or callable(value):
        name = getattr(value, "__qualname__", None)
        return f"an instance of {type(value).__name__}" if name is None else name
    text = repr(value)
    if len(text) > LONGEST or "\n" in text:
        return f"an instance of {type(value).__name__}"
    return text if value is None or isinstance(value, int | float) else f"{text} ({type(value).__name__})"


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """``"; did you mean 'rho'?"``, or nothing where no name is near."""
    name = str(name)
    slips = [other for other in names if is_slip(name, other)]
    near = slips or difflib.get_close_matches(name.lower(), list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_slip(name: str, other: str) -> bool:
    """Is one the other but for a letter too many, too few, wrong, or in its neighbour's place? (To names of two letters
    too much is near: ``other`` is none of them.)"""
    if name == other or len(name) < 2 or len(other) < 3:
        return False
    short, long = sorted((name, other), key=len)
    if len(long) == len(short):
        odd = [i for i, (a, b) in enumerate(zip(short, long, strict=True)) if a != b]
        swapped = (
            len(odd) == 2 and odd[1] == odd[0] + 1 and short[odd[0] : odd[1] + 1] == long[odd[0] : odd[1] + 1][::-1]
        )
        return len(odd) == 1 or swapped
    return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a constructor's arguments, without the parameters to optimize."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds and p.name != "params"]


def takes_any(function: Callable[..., Any]) -> bool:
    """Has it ``**kwargs``, so that only itself knows what it takes?"""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def refuse(unknown: Mapping[str, Any], cls: type) -> None:
    """Keyword arguments that ``cls`` does not have.

    Raises:
        TypeError: there is one.
    """
    for name in unknown:
        known = arguments(cls)
        meant = did_you_mean(name, known) or "."
        raise TypeError(f"{cls.__name__} has no argument {name!r}{meant} It takes {', '.join(known)}.")


def check_backend(name: Any) -> None:
    """Of a backend that is asked for by argument, or else by the environment.

    Raises:
        ValueError: there is no such backend. (Whether it runs is known when the tensors are.)
    """
    given = ""
    if name is None and (name := os.environ.get("LOOKSAM_BACKEND") or None):
        given = "LOOKSAM_BACKEND: "
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"{given}unknown backend {shown(name)}; choose one of {', '.join(map(repr, BACKENDS))}{did_you_mean(name, BACKENDS)}"
        )
