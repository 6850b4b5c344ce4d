"""Gradient mode around a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")


def grad_enabled(mode: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """What ``torch.no_grad()`` (``False``) and ``torch.enable_grad()`` (``True``) do as decorators, without the new context
    object and its six calls of Python functions that these cost in every call."""

    def around(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            before = torch.is_grad_enabled()
            torch._C._set_grad_enabled(mode)
            try:
                return function(*args, **kwargs)
            finally:
                torch._C._set_grad_enabled(before)

        return wrapper

    return around
