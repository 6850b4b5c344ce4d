"""Base updates: fused ones by name, and any other ``torch.optim.Optimizer`` as it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from looksam.binding import Binding, State
from looksam.hyper import Group
from looksam.masters import needs_master
from looksam_kernels import ops
from looksam_kernels.formulas import Coefficients
from looksam_kernels.updates import BASES, INITIAL

NOT_FUSED = ("amsgrad",)
"""Options of torch's classes that the fused updates leave to the class itself."""


class Fused(NamedTuple):
    """A base update that runs inside :func:`looksam_kernels.step`."""

    name: str
    defaults: Group
    renamed: dict[str, str]
    """The base's name of an argument -> its name in our groups, where the variant has an argument of the same name."""

    @property
    def comes_first(self) -> bool:
        return False

    @property
    def inner(self) -> None:
        """No optimizer of its own."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("step", *BASES[self.name].states)

    @property
    def lars(self) -> bool:
        """Is the direction scaled by LARS's trust ratio?"""
        return BASES[self.name].takes_trust_ratio

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ops.states(self.name, group)

    def check(self, group: Group) -> None:
        """
        Raises:
            ValueError: an option of torch's class that the fused update does not have.
        """
        for option in NOT_FUSED:
            if group.get(option):
                raise ValueError(f"{option}=True in one group only is not supported; give it to the optimizer")

    def share(self, groups: list[Group], state: dict[Tensor, State]) -> None:
        """Nothing is kept of either."""

    def missing(self, p: Tensor, group: Group, state: State) -> State:
        names = ("step", *self.states(group), *(("master_param",) if needs_master(p) else ()))
        return self.state_for(p, group) if any(name not in state for name in names) else {}

    def update(self, binding: Binding, coefficients: Coefficients, groups: list[Group]) -> None:
        """Updates the parameters with the direction."""
        binding.shards.step(binding.table, self.name, coefficients, groups)

    def create_state(self, binding: Binding) -> None:
        """Nothing is missing: the binding has asked for it."""

    def state_for(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Fresh state: float32 (float64 for float64 parameters), in the parameter's memory order.

        A float16 or bfloat16 parameter gets a float32 ``master_param``: a perturbation of rho = 0.05 would mostly be
        rounded away otherwise.
        """
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        for name in self.states(group):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            if name in INITIAL:
                state[name].fill_(ops.own(group, INITIAL[name]))
        if needs_master(p):
            state["master_param"] = p.detach().to(dtype)
        return state


class Wrapped:
    """Any optimizer class: the direction goes to ``.grad`` and the class's own ``step`` follows.

    Args:
        renamed: as in :class:`Fused`.
    """

    columns: tuple[str, ...] = ()
    comes_first = True
    lars = False

    def __init__(self, cls: type[Optimizer], kwargs: Group, defaults: Group, renamed: dict[str, str]) -> None:
        self.cls, self.kwargs, self.defaults, self.renamed = cls, kwargs, defaults, renamed
        self.inner: Optimizer | None = None

    def check(self, group: Group) -> None:
        """The class has its own checks."""

    def share(self, groups: list[Group], state: dict[Tensor, State]) -> None:
        """The inner optimizer, made at the first call, works on our own groups and state; its constructor's errors are
        raised as they are."""
        if self.inner is None:
            self.inner = self.cls([{"params": list(g["params"])} for g in groups], **self.kwargs)
            for p, eager in self.inner.state.items():
                state[p].update(eager)
        self.inner.param_groups, self.inner.state = groups, state  # type: ignore[assignment]

    def states(self, group: Group) -> tuple[str, ...]:
        return ()

    def missing(self, p: Tensor, group: Group, state: State) -> State:
        return {}

    def update(self, binding: Binding, coefficients: Coefficients, groups: list[Group]) -> None:
        """Updates the parameters with the direction. If the class's step raises, what was written is as before."""
        table = binding.table
        names = () if coefficients.q is None else (coefficients.writes, f"{coefficients.writes}_norm_sq")
        written = [(x, x.clone()) for name in names for x in table[name] if x is not None]
        added = ops.addition(table, coefficients)
        try:
            binding.shards.step(table, "grad", coefficients, groups)
            if not bool(coefficients.found_inf):  # the one read of the host: no wrapped optimizer can skip by itself
                self.step(binding)
                for w, x in zip(table["w"], added, strict=True):
                    if x is not None:
                        w.add_(x)
        except BaseException:
            for x, before in written:
                x.copy_(before)
            raise

    def create_state(self, binding: Binding) -> None:
        """A step of the class with lr = 0."""
        lrs = [group["lr"] for group in binding.groups]
        for group in binding.groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        try:
            self.step(binding)
        finally:
            for group, lr in zip(binding.groups, lrs, strict=True):
                group["lr"] = lr

    def step(self, binding: Binding) -> None:
        """The class's ``step`` without torch's wrapper around it: hooks and profiler ranges belong to the outer step."""
        groups, inner = binding.groups, self.inner
        assert inner is not None
        self.share(groups, binding.state)
        for p in [p for g in groups for p in g["params"] if p.numel() == 0]:
            p.grad = None  # nothing to update, and some classes divide by the number of elements
        step = self.cls.step
        if getattr(step, "hooked", False):
            step = inspect.unwrap(step, stop=lambda f: not getattr(f, "hooked", False))
        with self._own_names(groups):
            step(inner)
        inner._opt_called = True  # type: ignore[attr-defined]  # what a scheduler on the inner optimizer asks for
        binding.hand_over()

    @contextmanager
    def _own_names(self, groups: list[Group]) -> Iterator[None]:
        """Puts the base's arguments under the names it reads, for the time of its step. The direction is turned round
        already where it is to be maximized."""
        names = [*self.renamed, "maximize"]
        ours = [{name: g[name] for name in names if name in g} for g in groups]
        for g in groups:
            g.update({name: g[renamed] for name, renamed in self.renamed.items()})
            if "maximize" in g:
                g["maximize"] = False
        try:
            yield
        finally:
            for g, values in zip(groups, ours, strict=True):
                g.update(values)


def take_over(base: Fused | Wrapped, group: Group) -> None:
    """The group of a checkpoint of the base alone: its arguments, under our names."""
    for name, outer in base.renamed.items():
        if name in group:
            group[outer] = group.pop(name)


def resolve(base_optimizer: str | type[Optimizer], kwargs: Group, reserved: set[str]) -> Fused | Wrapped:
    """The base for ``base_optimizer`` and its arguments; ``base_<name>`` gives an argument whose name is in ``reserved``.

    Raises:
        ValueError: unknown name, ``differentiable=True``, or what the base's own constructor refuses.
        TypeError: not a name and not a class, or an argument that the base does not have.
    """
    if kwargs.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the step is not a function that autograd can follow")
    if isinstance(base_optimizer, str):
        if base_optimizer not in _NAMED:
            raise ValueError(f"unknown base_optimizer {base_optimizer!r}; choose one of {', '.join(map(repr, _NAMED))}")
        return _fused(base_optimizer, kwargs, reserved)
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a name or a subclass of torch.optim.Optimizer, not {base_optimizer!r}; "
            "give the class, and its arguments by keyword"
        )
    name = getattr(base_optimizer, "fused_base", None) or _FUSED_CLASSES.get(base_optimizer)
    if name is not None and not any(kwargs.get(option) for option in NOT_FUSED):
        return _fused(name, kwargs, reserved)
    return _wrapped(base_optimizer, kwargs, reserved)


def _fused(name: str, kwargs: Group, reserved: set[str]) -> Fused:
    max_grad_norm = kwargs.get("max_grad_norm", BASES[name].max_grad_norm)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, not {max_grad_norm}")
    renamed = _renamed(_NAMED[name], reserved)
    kwargs = _own_names({k: v for k, v in kwargs.items() if k != "max_grad_norm"}, renamed)
    defaults = _our_names(_NAMED[name](**kwargs), renamed)
    if name == "adam" and defaults.get("decoupled_weight_decay"):
        name = "adamw"
    return Fused(name, defaults | {"max_grad_norm": max_grad_norm}, renamed)


def _wrapped(cls: type[Optimizer], kwargs: Group, reserved: set[str]) -> Wrapped:
    own = inspect.signature(cls).parameters
    kwargs = dict(kwargs)
    max_grad_norm = None if "max_grad_norm" in own else kwargs.pop("max_grad_norm", None)
    renamed = _renamed(cls, reserved)
    kwargs = _own_names(kwargs, renamed)
    defaults = _our_names(cls([_probe()], **kwargs).defaults, renamed)
    return Wrapped(cls, kwargs, {"max_grad_norm": max_grad_norm} | defaults, renamed)


def _renamed(constructor: Callable[..., Any], reserved: set[str]) -> dict[str, str]:
    return {name: f"base_{name}" for name in inspect.signature(constructor).parameters if name in reserved}


def _own_names(kwargs: Group, renamed: dict[str, str]) -> Group:
    ours = {outer: name for name, outer in renamed.items()}
    return {ours.get(name, name): value for name, value in kwargs.items()}


def _our_names(defaults: Group, renamed: dict[str, str]) -> Group:
    return {renamed.get(name, name): value for name, value in defaults.items()}


def _probe() -> torch.nn.Parameter:
    """A parameter to construct an optimizer with, only to see its defaults and hear its errors (2-D: Muon asks for it)."""
    return torch.nn.Parameter(torch.zeros(1, 1))


def _of_torch(cls: type[Optimizer]) -> Callable[..., Group]:
    """torch's own constructor, for its defaults and its errors."""

    @functools.wraps(cls)
    def defaults(**kwargs: Any) -> Group:
        if any(kwargs.get(option) for option in NOT_FUSED):
            raise ValueError(
                f"the fused update has no {', '.join(NOT_FUSED)}; give base_optimizer=torch.optim.{cls.__name__}"
            )
        return dict(cls([_probe()], **kwargs).defaults)

    return defaults


_FUSED_CLASSES = {row.options: name for name, row in BASES.items() if isinstance(row.options, type)}
_NAMED: dict[str, Callable[..., Group]] = {
    name: _of_torch(row.options) if isinstance(row.options, type) else row.options
    for name, row in BASES.items()
    if row.options is not None
}
FUSED = tuple(_NAMED)
"""The names of the fused bases."""
