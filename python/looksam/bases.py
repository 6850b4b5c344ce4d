"""Base updates: fused ones by name, and any other ``torch.optim.Optimizer`` as it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from looksam.binding import Binding, State
from looksam.hyper import Group, Range, check, finite, flag, plain, tuple_of
from looksam.masters import needs_master
from looksam.messages import arguments, did_you_mean, shown, takes_any
from looksam.names import BaseEntries, BaseStates, inner, outer
from looksam_kernels import ops
from looksam_kernels.preconditioning import with_second_moment
from looksam_kernels.updates import BASES, FLAGS, INITIAL

NOT_FUSED = ("amsgrad",)
"""Options of torch's classes that the fused updates leave to the class itself."""


class Ours(NamedTuple):
    """The names that are the variant's, not the base's."""

    in_groups: frozenset[str]
    in_state: frozenset[str]


class Fused(NamedTuple):
    """A base update that runs inside :func:`looksam_kernels.step`."""

    name: str
    defaults: Group
    """The base's own hyper-parameters, by their names in our groups."""
    ours: Ours
    max_grad_norm: float | None
    clips: bool = True
    """Does ``max_grad_norm`` in the groups clip the direction? Not where the base has an argument of that name."""

    @property
    def reads(self) -> frozenset[str]:
        """The names in a group that a step of ours reads: not the place in the cycle, which changes in every step."""
        return (self.ours.in_groups - {"phase"}) | self.defaults.keys()

    @property
    def inner(self) -> None:
        """No optimizer of its own."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("step", *BASES[self.name].states)

    @property
    def ranges(self) -> dict[str, Range]:
        """What the arguments must be, by our names."""
        return {outer(name, self.ours.in_groups): allowed for name, allowed in _ranges(self.name).items()}

    @property
    def takes_trust_ratio(self) -> bool:
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

    def share(self, groups: list[Group], state: MutableMapping[Tensor, State]) -> None:
        """Nothing is kept of either."""

    def extras(self) -> dict[str, Any]:
        """Nothing is kept elsewhere."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:
        """Groups and state are all there is."""

    def missing(self, p: Tensor, group: Group, state: State) -> State:
        names = ("step", *self.states(group), *(("master_param",) if needs_master(p, group.get("rounding")) else ()))
        lacking = {name for name in names if state.get(name) is None}
        if not lacking:
            return {}
        fresh = self.state_for(p, group)
        if self.columns == (
            "step",
            "momentum_buffer",
        ):  # their step only says whether the buffer is new: it takes d undamped
            if "momentum_buffer" in lacking:
                lacking.add("step")
            elif state.get("momentum_buffer") is not None:
                fresh["step"].fill_(1)
        return {name: fresh[name] for name in names if name in lacking}

    def update(self, binding: Binding, rule: str, groups: list[Group], **how: Any) -> Tensor:
        """Updates the parameters with the direction of a descent rule; ``how`` are the arguments of
        :func:`looksam_kernels.ops.measure_and_step`. Returns found_inf."""
        return binding.shards.measure_and_step(binding.table, rule, self.name, groups, inside=binding.inside, **how)

    def create_state(self, binding: Binding) -> None:
        """Nothing is missing: the binding has asked for it."""

    def state_for(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Fresh state: float32 (float64 for float64 parameters), in the parameter's memory order.

        A float16 or bfloat16 parameter gets a float32 ``master_param``, unless its rounding is chosen: a perturbation of
        rho = 0.05 would mostly be rounded away otherwise.
        """
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        for name in self.states(group):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            if name in INITIAL:
                state[name].fill_(ops.own(group, INITIAL[name]))
        if needs_master(p, group.get("rounding")):
            state["master_param"] = p.detach().to(dtype)
        return state


class Wrapped:
    """Any optimizer class: the direction goes to ``.grad`` and the class's own ``step`` follows.

    The instance works on views of our groups and state (:mod:`looksam.names`): it sees what it would see alone.

    Args:
        kwargs: the class's arguments.
        defaults, ours, max_grad_norm, clips: as of :class:`Fused`.
    """

    columns: tuple[str, ...] = ()
    takes_trust_ratio = False

    def __init__(
        self,
        cls: type[Optimizer],
        kwargs: Group,
        defaults: Group,
        ours: Ours,
        max_grad_norm: float | None,
        clips: bool,
    ) -> None:
        self.cls, self.kwargs, self.defaults, self.ours = cls, kwargs, defaults, ours
        self.max_grad_norm, self.clips = max_grad_norm, clips
        self.inner: Optimizer | None = None
        self._eager = False
        """Does the class create its state in its constructor?"""

    @property
    def reads(self) -> frozenset[str]:
        return (self.ours.in_groups - {"phase"}) | {"lr", "maximize"}

    @property
    def ranges(self) -> dict[str, Range]:
        """The class has its own checks."""
        return {}

    def check(self, group: Group) -> None:
        """The class has its own checks, but for the rounding, which is not in its hands.

        Raises:
            ValueError: a rounding is given.
        """
        if group.get("rounding") is not None:
            raise ValueError(
                f"rounding={group['rounding']!r} is for fused bases, and {self.cls.__name__} writes the weights itself: leave it "
                "out, or give one of the bases by name"
            )

    def share(self, groups: list[Group], state: MutableMapping[Tensor, State]) -> None:
        """The inner optimizer, made at the first call, sees the groups and the state of now; its constructor's errors are
        raised as they are."""
        if self.inner is None:
            self.inner = self._made(groups, state)
        shared = _holder(self.inner)
        if not isinstance(shared.state, BaseStates):  # the class has put a new dict there
            BaseStates(state, self.ours.in_state).replace(shared.state)
        if getattr(shared.state, "of", None) is not state:
            shared.state = BaseStates(state, self.ours.in_state)
        views = shared.param_groups
        for made, group in zip(views, groups, strict=False):
            if not isinstance(made, BaseEntries):  # as the class's load_state_dict leaves them
                self._own(group).update({name: value for name, value in made.items() if name != "params"})
        if len(views) != len(groups) or any(
            getattr(v, "of", None) is not g for v, g in zip(views, groups, strict=True)
        ):
            shared.param_groups = [self._own(g) for g in groups]

    def _made(self, groups: list[Group], state: MutableMapping[Tensor, State]) -> Any:
        """A new instance. What is in groups and state already holds; the constructor adds what is not."""
        new = self.cls([dict(self._own(g)) for g in groups], **self.kwargs)
        holder = _holder(new)
        for made, group in zip(holder.param_groups, groups, strict=True):
            for name, value in made.items():
                self._own(group).setdefault(name, value)
        eager, holder.state = holder.state, BaseStates(state, self.ours.in_state)
        self._eager = any(isinstance(key, Tensor) for key in eager)
        for key, entries in eager.items():
            if isinstance(entries, MutableMapping):
                for name, value in entries.items():
                    holder.state[key].setdefault(name, value)
            elif key not in holder.state:
                holder.state[key] = entries
        return new

    def _own(self, group: Group) -> BaseEntries:
        return BaseEntries(group, self.ours.in_groups)

    def __getstate__(self) -> dict[str, Any]:
        """The instance is made anew by :meth:`share`: it shares its groups and state with whoever has this base."""
        return {**self.__dict__, "inner": None}

    def states(self, group: Group) -> tuple[str, ...]:
        return ()

    def extras(self) -> dict[str, Any]:
        """What the class's own ``state_dict`` holds beside groups and state: counters that it keeps elsewhere."""
        if self.cls.state_dict is Optimizer.state_dict or self.inner is None:
            return {}
        own = self.inner.state_dict()
        return {name: x for name, x in own.items() if name not in _CHECKPOINT and not _is_checkpoint(x)}

    def load(self, saved: dict[str, Any]) -> None:
        """The class's own ``load_state_dict``, where it has one, reads what it would have saved alone."""
        if self.cls.load_state_dict is Optimizer.load_state_dict or self.inner is None:
            return
        extras = {name: saved[name] for name in self.extras() if name in saved}
        if extras.keys() != self.extras().keys():
            return  # an older checkpoint, of groups and state only
        states = {
            key: dict(BaseEntries(state, self.ours.in_state)) if isinstance(state, dict) else state
            for key, state in saved["state"].items()
        }
        own = {"state": states, "param_groups": [dict(self._own(group)) for group in saved["param_groups"]]}
        within = [name for name, x in self.inner.state_dict().items() if _is_checkpoint(x)]
        self.inner.load_state_dict(extras | (dict.fromkeys(within, own) if within else own))

    def missing(self, p: Tensor, group: Group, state: State) -> State:
        """What a class that creates its state in its constructor would not create any more."""
        if not self._eager or BaseEntries(state, self.ours.in_state):
            return {}
        fresh = self.cls([{**self._own(group), "params": [p]}], **self.kwargs).state[p]
        return {outer(name, self.ours.in_state): value for name, value in fresh.items()}

    def update(self, binding: Binding, rule: str, groups: list[Group], **how: Any) -> Tensor:
        """As of :class:`Fused`. If the class's step raises, what was written is as before, and so are the weights after a
        sharp step; after another step they are as the class leaves them."""
        table, inside = binding.table, binding.inside
        _, coefficients = ops.measure(table, rule, groups, all_reduce=binding.shards.all_reduce, inside=inside, **how)
        first = coefficients.inputs[0]
        names = () if coefficients.q is None else (coefficients.writes, f"{coefficients.writes}_norm_sq")
        written = [(x, x.clone()) for name in names for x in table[name] if x is not None]
        saved = [b for b, perturbed in zip(table["b"], table.perturbed, strict=True) if perturbed]
        moved = [row for row, perturbed in enumerate(table.perturbed) if perturbed]
        added = ops.addition(table, coefficients)
        table[first] = _writable(binding.params, table[first])
        try:
            binding.shards.step(table, "grad", coefficients, groups)
            if not bool(coefficients.found_inf):  # the one read of the host: no wrapped optimizer can skip by itself
                self.step(binding)
                for w, x in zip(binding.weights(), added, strict=True):  # where the class has left them
                    if x is not None:
                        w.add_(x)
        except BaseException:
            weights = binding.weights()
            for x, before in (*written, *((weights[row], b) for row, b in zip(moved, saved, strict=True))):
                x.copy_(before)
            raise
        return coefficients.found_inf

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
        groups = binding.groups
        self.share(groups, binding.state)
        shared: Any = self.inner
        for p in binding.params:
            if p.numel() == 0:
                p.grad = None  # nothing to update, and some classes divide by the number of elements
        step = self.cls.step
        if getattr(step, "hooked", False):
            step = inspect.unwrap(step, stop=lambda f: not getattr(f, "hooked", False))
        with _not_maximized(groups):
            step(shared)
        shared._opt_called = True  # what a scheduler on the inner optimizer asks for
        self.share(groups, binding.state)


def _writable(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, which the direction is written over: those whose memory holds several elements get one of their own."""
    seen: set[int] = set()
    new: list[Tensor | None] = list(gradients)
    for row, (p, x) in enumerate(zip(params, gradients, strict=True)):
        if x is None or x.numel() == 0:
            continue
        if x.data_ptr() in seen or any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
            p.grad = new[row] = x.clone(memory_format=torch.contiguous_format)
        seen.add(x.data_ptr())
    return new


_CHECKPOINT = ("state", "param_groups")


def _is_checkpoint(x: Any) -> bool:
    """Is it the state_dict of an optimizer, which a class may have within its own?"""
    return isinstance(x, dict) and x.keys() >= set(_CHECKPOINT)


def _holder(optimizer: Any) -> Any:
    """The optimizer that has the groups and the state: a class may show those of another that it works with."""
    while isinstance(getattr(type(optimizer), "param_groups", None), property):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def _not_maximized(groups: list[Group]) -> Iterator[None]:
    """For a step along a direction that is turned round already where it is to be maximized."""
    turned = [g for g in groups if g.get("maximize")]
    for g in turned:
        g["maximize"] = False
    try:
        yield
    finally:
        for g in turned:
            g["maximize"] = True


def refuse_precondition(base: Fused | Wrapped, owner: str) -> None:
    """
    Raises:
        ValueError: the base keeps no second moment that a preconditioned ascent could read.
    """
    names = with_second_moment()
    what = (
        f"{base.name} has none"
        if isinstance(base, Fused)
        else f"none of {base.cls.__name__}, which is wrapped, is known"
    )
    if isinstance(base, Wrapped) or base.name not in names:
        raise ValueError(
            f"{owner}: precondition=True needs the base's second moment, and {what}; give base_optimizer one of "
            f"{', '.join(map(repr, names))} (without {', '.join(NOT_FUSED)}), or leave precondition out"
        )


def under_our_names(base: Fused | Wrapped, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the base alone, as one of ours; one that is ours as it is."""
    ours = base.ours.in_groups
    marks = ours & {"phase", "perturb_eps"}
    if all(marks <= group.keys() for group in state_dict["param_groups"]):
        return state_dict
    groups = [{outer(name, ours): value for name, value in group.items()} for group in state_dict["param_groups"]]
    states = {
        key: {outer(name, base.ours.in_state): value for name, value in state.items()}
        if isinstance(state, dict)
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": groups, "state": states}


def rename_given(base: Fused | Wrapped, group: Group) -> None:
    """``base_<name>``, as users give it and older checkpoints hold it, -> ``base.<name>``."""
    for name in base.ours.in_groups:
        if f"base_{name}" in group and outer(name, (name,)) in base.defaults:
            value = group.pop(f"base_{name}")
            group.setdefault(outer(name, (name,)), value)


def resolve(
    base_optimizer: str | type[Optimizer],
    kwargs: Group,
    ours: Ours,
    owner: str,
    mine: Sequence[str],
    example: Mapping[str, Any] | None = None,
) -> Fused | Wrapped:
    """The base for ``base_optimizer`` and its arguments; ``base_<name>`` gives an argument whose name is one of ``ours``.

    Args:
        owner, mine: the optimizer's class and its own arguments, as errors name them.
        example: options of a group, which some classes need to tell their defaults.

    Raises:
        ValueError: unknown name, ``differentiable=True``, or what the base's own constructor refuses.
        TypeError: not a name and not a class, an argument that the base does not have, or a number of the wrong type.
    """
    if kwargs.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the step is not a function that autograd can follow")
    base = _name_or_class(base_optimizer, kwargs, owner)
    if isinstance(base, str):
        _check_names(_NAMED[base], kwargs, ours, f"{owner} over {base}", mine)
        return _fused(base, kwargs, ours, owner)
    _check_names(base, kwargs, ours, f"{owner} over {base.__name__}", mine)
    return _wrapped(base, kwargs, ours, example or {})


def fused_name(base_optimizer: Any, kwargs: Mapping[str, Any], owner: str) -> str | None:
    """The name of the fused base that :func:`resolve` would return, and ``None`` for a class that would be wrapped.

    Raises:
        ValueError, TypeError: as :func:`resolve`, of ``base_optimizer`` alone.
    """
    base = _name_or_class(base_optimizer, {**kwargs}, owner)
    if base == "adam" and kwargs.get("decoupled_weight_decay"):
        return "adamw"
    return base if isinstance(base, str) else None


def _name_or_class(base_optimizer: Any, kwargs: Group, owner: str) -> str | type[Optimizer]:
    """The name of a fused base, or a class to wrap."""
    if isinstance(base_optimizer, str):
        if base_optimizer not in _NAMED:
            raise ValueError(
                f"unknown base_optimizer {base_optimizer!r}; choose one of {', '.join(map(repr, _NAMED))}"
                f"{did_you_mean(base_optimizer, _NAMED)}"
            )
        return base_optimizer
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"{owner}: base_optimizer must be a name or a subclass of torch.optim.Optimizer, not {shown(base_optimizer)}; "
            "give the class, and its arguments by keyword"
        )
    fused: str | None = getattr(base_optimizer, "fused_base", None) or _FUSED_CLASSES.get(base_optimizer)
    return base_optimizer if fused is None or any(kwargs.get(option) for option in NOT_FUSED) else fused


def _check_names(constructor: Callable[..., Any], kwargs: Group, ours: Ours, what: str, mine: Sequence[str]) -> None:
    """
    Raises:
        TypeError: an argument that neither the variant nor the base has.
    """
    theirs = [f"base_{name}" if _both_have(name, ours) else name for name in arguments(constructor)]
    theirs = list(dict.fromkeys([*theirs, "max_grad_norm"]))
    unknown = [name for name in kwargs if name not in theirs and name not in arguments(constructor)]
    if unknown and not takes_any(constructor):
        raise TypeError(
            f"{what} has no argument {unknown[0]!r}{did_you_mean(unknown[0], [*mine, *theirs]) or '.'} "
            f"It takes {', '.join(mine)}, and for the base {', '.join(theirs)}."
        )


def _both_have(name: str, ours: Ours) -> bool:
    """Is this argument of the base one of the variant too?"""
    return name in ours.in_groups or name in ARGUMENTS


def _fused(name: str, kwargs: Group, ours: Ours, owner: str) -> Fused:
    kwargs = {x: plain(value) for x, value in kwargs.items()}
    max_grad_norm = kwargs.pop("max_grad_norm", BASES[name].max_grad_norm)
    ours = Ours(ours.in_groups | {"max_grad_norm"}, ours.in_state)
    kwargs = _own_arguments(_NAMED[name], kwargs, ours)
    check_arguments(name, kwargs, owner)
    defaults = _NAMED[name](**kwargs)
    if name == "adam" and defaults.get("decoupled_weight_decay"):
        name = "adamw"
    return Fused(name, _our_names(defaults, ours), ours, max_grad_norm)


def _wrapped(cls: type[Optimizer], kwargs: Group, ours: Ours, example: Mapping[str, Any]) -> Wrapped:
    kwargs = dict(kwargs)
    clips, max_grad_norm = "max_grad_norm" not in inspect.signature(cls).parameters, None
    if clips:
        max_grad_norm = kwargs.pop("max_grad_norm", None)
        ours = Ours(ours.in_groups | {"max_grad_norm"}, ours.in_state)
    kwargs = _own_arguments(cls, kwargs, ours)
    group = {inner(name): value for name, value in example.items() if name not in ours.in_groups}
    defaults = cls([{**group, "params": [_probe()]}], **kwargs).defaults
    if kwargs.get("maximize") and "maximize" not in defaults:
        raise ValueError(
            f"maximize=True is not supported over {cls.__name__}, which does not keep it in its groups: the perturbation "
            "would go the wrong way; negate the loss"
        )
    return Wrapped(cls, kwargs, _our_names(defaults, ours), ours, max_grad_norm, clips)


ARGUMENTS = ("model", "same_rng", "m_sharpness", "backend", "process_group")
"""Of our constructors, beside the hyper-parameters."""


def _own_arguments(constructor: Callable[..., Any], kwargs: Group, ours: Ours) -> Group:
    """``base_<name>`` -> name, where name is an argument of both."""
    own = inspect.signature(constructor).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in own.values())

    def name_of(given: str) -> str:
        name = given.removeprefix("base_")
        both = (name in own or takes_all) and _both_have(name, ours)
        return name if given not in own and both else given

    return {name_of(given): value for given, value in kwargs.items()}


def _our_names(entries: Mapping[str, Any], ours: Ours) -> Group:
    return {outer(name, ours.in_groups): value for name, value in entries.items()}


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


def check_arguments(base: str, given: Mapping[str, Any], owner: str) -> None:
    """
    Raises:
        TypeError, ValueError: an argument of a fused base is of the wrong type, or not finite.
    """
    for name, allowed in _ranges(base).items():
        if name in given and not isinstance(
            given[name], Tensor
        ):  # torch has an error for those of more than one element
            check(owner, name, given[name], {}, allowed)


@functools.cache
def _ranges(base: str) -> dict[str, Range]:
    """What the arguments of a fused base must be, as their defaults are: numbers, tuples of them, flags."""
    found = {}
    for p in inspect.signature(_NAMED[base]).parameters.values():
        if p.name in (*FLAGS, "maximize"):  # the others that are True or False say how torch's own class computes
            found[p.name] = flag()
        elif isinstance(p.default, tuple):
            found[p.name] = tuple_of(len(p.default))
        elif isinstance(p.default, int | float) and not isinstance(p.default, bool):
            found[p.name] = finite()
    return found


FUSED = tuple(_NAMED)
"""The names of the fused bases."""
