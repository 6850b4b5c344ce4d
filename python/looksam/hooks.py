"""The hooks of ``step``, and its range in the profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.optim import Optimizer, optimizer
from typing_extensions import ParamSpec

from looksam_kernels import snapshot

P = ParamSpec("P")
R = TypeVar("R")


def around(step: Callable[P, R]) -> Callable[P, R]:
    """What torch puts around a class's ``step``, which costs as much as all our kernels on small tensors: here only while
    there are hooks, or a profiler runs. torch leaves what is ``hooked`` as it is.

    A subclass with a ``step`` of its own gets torch's around that, so this one then has none.
    """
    with_hooks: Callable[P, R] = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        self: Any = args[0]
        is_outermost = getattr(type(self), step.__name__) is wrapper
        return (with_hooks if is_outermost and _is_listened_to(self) else step)(*args, **kwargs)

    cast(Any, wrapper).hooked = True
    return wrapper


def _is_listened_to(self: Optimizer) -> bool:
    return bool(
        snapshot.observed()
        or self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )
