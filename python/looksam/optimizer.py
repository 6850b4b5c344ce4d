"""SharpnessAware: the optimizer as its users see it. It decides which plan a step follows; :class:`RunningStep` executes it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import ParamSpec, Self

from looksam import bases, hooks
from looksam.amp import LOSS_SCALE, ScaledGradients
from looksam.binding import UNSUPPORTED, Binding, kind, own_entries
from looksam.checkpoint import from_another_variant, generations, load_exactly
from looksam.filters import Filters
from looksam.grad_mode import grad_enabled
from looksam.hyper import COMMON, RANGES, Group, GroupChecks, Range, check_keys
from looksam.masters import NOT_FLOAT16
from looksam.messages import arguments, check_backend, shown
from looksam.passes import PassRunner
from looksam.plans import Plan, Variant, resolved
from looksam.shards import refuse_flat, refuse_shard_of_optimizer
from looksam.skipped import Skipped
from looksam.steps import RunningStep
from looksam.trainers import count_step
from looksam.types import BackendName, BaseOptimizer, Closure
from looksam_kernels import notice
from looksam_kernels.formulas import scale_of

Loss = TypeVar("Loss")
P = ParamSpec("P")
R = TypeVar("R")


def all_or_nothing(part: Callable[P, R]) -> Callable[P, R]:
    """A part of a step: whatever is raised inside leaves every weight as before the step."""

    @functools.wraps(part)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return part(*args, **kwargs)
        except BaseException:
            self: Any = args[0]
            self._abandon()
            self._hand_back()
            raise

    return wrapper


class SharpnessAware(ScaledGradients, Optimizer):
    """A base optimizer whose gradient is taken, or corrected, at perturbed weights.

    Two call styles. ``loss = opt.step(closure)``, where the closure zeroes the gradients, computes the loss, calls
    ``backward`` and returns the loss: called twice on sharp steps, once on the others; the first loss is returned.
    Or, after ``loss.backward()``::

        if opt.first_step(zero_grad=True):  # False: a reuse or plain step, which is done
            loss_function(model(x), y).backward()
            opt.second_step(zero_grad=True)

    Args:
        params: parameters or groups, as for torch.optim; every hyper-parameter may be given per group.
        base_optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"adagrad"``, ``"rmsprop"``, ``"adadelta"``, ``"lamb"``,
            ``"lars"``, ``"lion"``, ``"adan"`` or a ``torch.optim.Optimizer`` subclass.
        variant: the three choices.
        hyper: the variant's own hyper-parameters and their defaults.
        backend: ``"native"``, ``"triton"``, ``"reference"``; default: the fastest that is there.
        base_kwargs: the base's arguments; ``base_<name>`` where the variant has an argument of that name. All bases
            take ``max_grad_norm``: the norm of the direction is clipped there (``None``: not; 1.0 for LAMB). And, for
            the passes, ``model``, ``same_rng`` and ``m_sharpness``: see :class:`looksam.passes.PassRunner`. And
            ``perturb_filter``, a function parameter -> bool: the method is about these parameters, as if there were no others
            (default: all). The others are not perturbed and enter no norm of the method; in every step their direction is
            the last gradient. And ``nonfinite``: ``"skip"`` leaves a step out if one of its gradients is infinite or NaN;
            ``"ignore"`` does not look, and updates the weights with what is there, as torch.optim does (with a GradScaler
            every step is checked). The check reads the last gradient once more where no norm that the method, the clipping
            or LARS needs has read it: steps of the base alone, second gradients of SAM. Elsewhere it costs nothing.

    bfloat16 and float16 parameters have float32 master copies, unless ``rounding`` is given: then bfloat16 parameters hold
    the only copy of the weights (docs/amp.md). ``rounding="stochastic"`` rounds what a perturbation or an update makes of them up
    or down by chance, so that moves which are small against 2^-9 of a weight count in the mean; a hash of ``rounding_seed``,
    the parameter and its count of updates decides. ``rounding="nearest"`` loses such moves. For fused bases; not for
    float16.

    What stores a q also takes ``q_dtype="bfloat16"``: half the memory and traffic of q, each element rounded to 8 bits
    (default ``None``: float32, or the parameter's dtype where that is wider). It counts where a q is made anew.

    State per parameter: the base's, and ``q``, ``q_norm_sq`` = ||q||^2 where the variant reuses a gradient component; the
    norm follows what other code does to ``q`` (but through ``q.data``, which leaves no trace). The place in the cycle of
    k steps is ``phase`` in every group.

    Raises:
        ValueError: a hyper-parameter out of range, or different between groups where it must agree; unknown names.
        TypeError: as torch.optim.Optimizer; sparse or complex parameters.
    """

    ranges: ClassVar[Mapping[str, Range]] = RANGES
    """The values that the variant's hyper-parameters may have."""
    shared: ClassVar[tuple[str, ...]] = COMMON
    """Those that all groups share."""
    counted: ClassVar[tuple[str, ...]] = ("phase",)
    """What the groups, all alike, carry from step to step."""
    bases: ClassVar[tuple[str, ...] | None] = None
    """The names of the fused bases that it works over; ``None``: all, and every class."""
    perturbed_at_rest: ClassVar[bool] = False
    """Are the weights perturbed between the steps? Then ``eval()`` and ``train()`` move them: :mod:`looksam.at_rest`."""
    per_sample: ClassVar[bool] = False
    """Does the closure return the losses of single samples, and leave backward to the optimizer?"""

    _binding: Binding | None
    _step: RunningStep | None
    """The step under way."""
    _done_in_first: bool

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        variant: Variant,
        hyper: Mapping[str, Any],
        *,
        backend: BackendName | None = None,
        base_kwargs: Mapping[str, Any],
    ) -> None:
        self.variant = variant
        self._requested = backend
        check_backend(backend)
        refuse_shard_of_optimizer()
        owner, base_kwargs = type(self).__name__, dict(base_kwargs)
        self._passes = PassRunner(**{name: base_kwargs.pop(name) for name in PASSES if name in base_kwargs})
        filters = {"perturb_filter": base_kwargs.pop("perturb_filter", None)} if _perturbs(variant) else {}
        checked = {"nonfinite": base_kwargs.pop("nonfinite", "skip")}
        checked |= {"rounding": base_kwargs.pop("rounding", None), "rounding_seed": base_kwargs.pop("rounding_seed", 0)}
        if "q" in self._written:
            checked["q_dtype"] = base_kwargs.pop("q_dtype", None)
        hyper = {**hyper, **filters, **checked}
        params = _listed(params)
        example = next((g for g in params if isinstance(g, dict)), None) if isinstance(params, list) else None
        ours = bases.Ours(frozenset({"phase", LOSS_SCALE, *hyper}), frozenset(self._own_state))
        mine = [*(x for x in arguments(type(self)) if x != "base_optimizer"), *filters, *checked, *PASSES]
        self._base = bases.resolve(base_optimizer, base_kwargs, ours, owner, mine, example)
        if hyper.get("precondition") is True:
            bases.refuse_precondition(self._base, owner)
        self._forget()
        own = {"phase": 0, **hyper} | ({"max_grad_norm": self._base.max_grad_norm} if self._base.clips else {})
        self._filters = Filters(own)
        self._checks = self._checks_of(own)
        if not isinstance(params, Iterable):  # after the errors of the other arguments, as in torch's classes
            raise TypeError(f"params: {type(params).__name__!r} object is not iterable; give model.parameters()")
        super().__init__(params, own | self._base.defaults)
        self._base.share(self.param_groups, self.state)
        notice.first_optimizer((p.device for g in self.param_groups for p in g["params"]), backend)

    def _checks_of(self, own: Iterable[str]) -> GroupChecks:
        """For the groups; ``own`` are the variant's names, beside those of the base."""
        base = self._base
        return GroupChecks(type(self).__name__, own, base.defaults, self.counted, self.ranges, self.shared, base.ranges)

    def _forget(self) -> None:
        """Everything that is not configuration, groups or state, and can be made anew."""
        self._self: weakref.ref[Any] = weakref.ref(self)
        self._binding = self._step = None
        self._done_in_first = False
        self._skipped = Skipped()

    # What the user calls --------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[..., Loss]) -> Loss: ...

    @hooks.around
    @grad_enabled(False)
    def step(self, closure: Closure | None = None) -> Any:
        """One optimization step; see the class for the two call styles.

        Returns:
            The loss of the first closure call, at the unperturbed weights; ``None`` without a closure.

        Raises:
            RuntimeError: no closure on a step that needs a second pass, or a closure between ``first_step`` and
                ``second_step``. Whatever the closure raises is passed on; every weight is then as before the step.
        """
        if closure is None:
            self._step_on_gradients()
            return None
        if not callable(closure):
            raise TypeError(
                f"step takes a function that computes the loss, not {shown(closure)}: call step(closure) with a closure that "
                "zeroes the gradients, computes the loss, calls backward and returns the loss"
            )
        if self._moved:
            raise RuntimeError("step(closure) between first_step and second_step; call second_step() to end the step")
        return self._step_with(closure)

    @grad_enabled(False)
    def first_step(self, zero_grad: bool = False) -> bool:
        """To be called with the gradients at w. On a sharp step moves the weights to w + e; on another one does all of it.

        Args:
            zero_grad: afterwards set the gradients to ``None``. Otherwise they stay, and the second backward adds to them.

        Returns:
            Whether a second backward, and ``second_step``, must follow.
        """
        own = self._original()
        if own._moved:
            raise RuntimeError("first_step() twice; call second_step() after the second backward")
        plan = own._plan
        if len(plan.passes) > 1 and not plan.in_two_calls:
            raise RuntimeError(
                f"{type(own).__name__} cannot be split into first_step and second_step: its {len(plan.passes)} passes are not "
                "one at the weights and one at perturbed weights; call step(closure)"
            )
        sharp = own._first_of_two(keep_grad=not zero_grad)
        if not sharp:
            own._complete()
            own._done_in_first = True
            count_step(self)
            if zero_grad:
                own.zero_grad()
        return sharp

    @grad_enabled(False)
    def second_step(self, zero_grad: bool = False) -> None:
        """To be called with the gradients at w + e: restores w and updates it. Nothing is left to do on another step.

        Raises:
            RuntimeError: no ``first_step`` came before, or no second backward.
        """
        own = self._original()
        if own._moved:
            own._complete()
            count_step(self)
        elif not own._done_in_first:
            raise RuntimeError("second_step() without first_step(); call first_step() after the first backward")
        own._done_in_first = False
        if zero_grad:
            own.zero_grad()

    @grad_enabled(False)
    def abandon(self) -> None:
        """Goes back to where the step began: for a second forward or backward, after ``first_step``, that failed."""
        self._original()._abandon()

    @property
    def needs_second_pass(self) -> bool:
        """Does the step that is coming, or under way, need a second forward and backward?"""
        return len(self._plan.passes) > 1

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps this optimizer has left out because a gradient was not finite: an int64 tensor of shape [] on the
        parameters' device, which only the reader waits for. Ten in a row are worth a warning, once."""
        return self._skipped.count

    @property
    def base_optimizer(self) -> Optimizer:
        """What to hand to a scheduler that wants the base: the wrapped optimizer, or this one where the base is fused.

        Both share groups and state. Other methods of a wrapped class are called here: ``opt.base_optimizer.eval()``.
        """
        self._base.share(self.param_groups, self.state)
        return self._base.inner or self

    @property
    def backend(self) -> str:
        """The backend that runs the ops: ``"native"``, ``"triton"`` or ``"reference"``."""
        return self._bound().table.backend_name

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; fills in every default, the base's included, and checks the values."""
        given = {}
        if isinstance(param_group, dict):
            bases.rename_given(self._base, param_group)
            given = {**self.defaults, **param_group}
            check_keys(type(self).__name__, given, self.defaults)
            self._checks.check(given, self.param_groups[0] if self.param_groups else given)
            self._base.check(given)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update({name: given[name] for name in self.defaults})
        refuse_flat(group["params"])
        for p in group["params"]:
            if p.requires_grad and (p.is_complex() or p.layout is not torch.strided):
                self.param_groups.pop()
                raise TypeError(f"{kind(p)} is among the parameters: {UNSUPPORTED}")
            if p.requires_grad and group["rounding"] is not None and p.dtype == torch.float16:
                self.param_groups.pop()
                raise ValueError(NOT_FLOAT16)
        group.update({name: self.param_groups[0][name] for name in self.counted})
        self._filters.settle(self.param_groups)

    def settle(self) -> None:
        """Completes groups that were put together by hand: defaults, the place in the cycle, filters."""
        for group in self._checks.incomplete(self.param_groups):
            bases.rename_given(self._base, group)
            for name in self.counted:
                counts = [g[name] for g in self.param_groups if name in g]
                group.update({name: counts[0]} if counts and name not in group else {})
            for name in self._checks.names:
                group.setdefault(name, self.defaults[name])
        self._filters.settle(self.param_groups)

    # The parts of a step --------------------------------------------------------------------------------------------

    def _original(self) -> Self:
        """This optimizer, also where a method is called on an imitation of it, as Lightning's: that has its class and hands
        on the attributes which it lacks, but keeps those that are set."""
        original: Self | None = self._self()
        assert original is not None
        return original

    @property
    def _plan(self) -> Plan:
        group = self.param_groups[0]
        return self.variant.sharp if group.get("phase", 0) % self._period(group) == 0 else self.variant.between

    def _period(self, group: Group) -> int:
        """The k of a variant that has one; another k in the group is the base's."""
        return group.get("k", self.defaults["k"]) if "k" in self._base.ours.in_groups else 1

    @property
    def _moved(self) -> bool:
        """Are the weights away from where the step began?"""
        return self._step is not None and self._step.perturbed

    @all_or_nothing
    def _step_with(self, closure: Closure) -> Any:
        step, scale = self._begun(), self._grad_scale(new_gradients=True)
        first_loss = self._run_passes(closure, step, scale)
        self._finish(step, scale)
        return first_loss

    @all_or_nothing
    def _first_of_two(self, keep_grad: bool) -> bool:
        """What :meth:`first_step` does where two passes follow each other. Do they?"""
        step = self._begun()
        self._decide(step, scale := self._probable_scale())
        if len(step.plan.passes) == 1:
            return False
        first, second = step.plan.passes
        step.take_gradients(first, keep_grad)
        step.perturb(second, scale)
        self._passes.open()
        return True

    def _run_passes(self, closure: Closure, step: RunningStep, grad_scale: Tensor | None) -> Any:
        """All passes of a step, one after the other; returns the first loss."""
        first_loss, number = None, 0
        while number < len(step.plan.passes):
            current = step.plan.passes[number]
            if current.ascent is not None:
                step.perturb(current, grad_scale)
            loss = self._pass(closure, number, len(step.plan.passes))
            if number == 0:
                first_loss = loss
                self._decide(step, grad_scale)
            step.take_gradients(step.plan.passes[number])
            number += 1
        return first_loss

    @grad_enabled(True)
    def _pass(self, closure: Closure, number: int, of: int) -> Any:
        """Runs the closure for pass ``number`` of ``of``: the gradients are then in ``.grad``. Returns the loss."""
        return self._passes.run(closure, number, of)

    def _decide(self, step: RunningStep, grad_scale: Tensor | None) -> None:
        """After the first gradient, before the step takes it: may choose another plan that begins with the same pass."""

    def _advance(self, plan: Plan) -> None:
        """A step of this plan is done: moves what ``counted`` names, in all groups alike."""
        for group in self.param_groups:
            group["phase"] = (group["phase"] + 1) % self._period(group)

    def _bound(self) -> Binding:
        if self._binding is None:
            self._binding = Binding(weakref.proxy(self), self._base, self._written, self._requested, self._numbers)
        return self._binding

    @property
    def _written(self) -> list[str]:
        """The columns of state that the variant's plans write."""
        return [x for x in dict.fromkeys(plan.writes for plan in self.variant[:2]) if x is not None]

    @property
    def _numbers(self) -> list[str]:
        """The numbers that they keep in the state of each parameter."""
        return [scale_of(x) for x in dict.fromkeys(plan.along for plan in self.variant[:2]) if x is not None]

    @property
    def _own_state(self) -> list[str]:
        """The entries of the state that are the variant's."""
        return [*own_entries(self._written), *self._numbers]

    @hooks.around
    def _complete(self) -> None:
        """What ``step()`` does, its hooks and its range in the profiler included, but not by its name: a trainer may have
        put something else in its place, which makes new gradients."""
        self._opt_called = True  # what a scheduler puts in the place of step notes, for its warning
        self._step_on_gradients()

    @all_or_nothing
    def _step_on_gradients(self) -> None:
        """step() without a closure: ends a two-call step, does a reuse or plain step, or only creates the state."""
        step = self._begun()
        passes = step.plan.passes
        if step.perturbed or len(passes) == 1:
            self._passes.close()
            step.take_gradients(passes[-1])
            self._finish(step, self._grad_scale(new_gradients=False))
        elif self._no_gradient():
            step.create_state()
            self._step = None
        else:
            by_hand = "; or call first_step(), then backward again, then second_step()"
            raise RuntimeError(
                f"this step needs the gradient {'twice' if len(passes) == 2 else f'{len(passes)} times'}: call "
                "step(closure) with a closure that zeroes the gradients, computes the loss, calls backward and "
                f"returns the loss{by_hand if step.plan.in_two_calls else ''}"
            )

    def _no_gradient(self) -> bool:
        """Are all gradients zero, or not there?"""
        binding = self._bound()
        binding.follow()
        return all(g is None or not g.any() for g in binding.gradients())

    def _finish(self, step: RunningStep, grad_scale: Tensor | None) -> None:
        check = self._scaler is not None or grad_scale is not None or self.param_groups[0]["nonfinite"] == "skip"
        found_inf = step.update(grad_scale, check)
        self._report(found_inf)
        self._step = None
        self._skipped.note(found_inf)
        self._advance(step.plan)

    def _begun(self) -> RunningStep:
        """The step under way, or a new one."""
        if self._step is None:
            if not self._checks.hold(self.param_groups):
                self.settle()
                self._checks.follow(self.param_groups)
                for group in self.param_groups:
                    self._base.check(group)
            if self.param_groups[0].get("precondition"):
                bases.refuse_precondition(self._base, type(self).__name__)
            plan = self._plan
            if "strength" in self._base.ours.in_groups:
                plan = resolved(plan, self.param_groups)
            self._step = RunningStep(plan, self._bound(), self._base, self._passes, self.variant.radius)
        return self._step

    def _abandon(self) -> None:
        if self._step is not None:
            self._step.abandon()
        self._step = None

    # Copies and checkpoints -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self._moved:
            raise RuntimeError("cannot copy or pickle between first_step and second_step: the weights are perturbed")
        own = {name: getattr(self, name) for name in ("variant", "_requested", "_passes", "_base", "_filters")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)
        if "differentiable" not in self._base.defaults:
            self.defaults.pop("differentiable", None)  # torch's default for classes of before it had the option
        self._checks = self._checks_of(name for name in self.defaults if name in self._base.ours.in_groups)
        self.settle()
        self._base.share(self.param_groups, self.state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, when the weights are perturbed.
        """
        if self._moved:
            raise RuntimeError("state_dict() between first_step and second_step: the weights are perturbed")
        self.settle()
        self._base.share(self.param_groups, self.state)
        return {**super().state_dict(), **self._base.extras()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the dtype it was saved with.

        A checkpoint of the base alone, or of another variant, gives the base's hyper-parameters and state; this
        variant's own stay, and its cycle begins anew.

        Raises:
            TypeError, ValueError: this is no state_dict of an optimizer. ValueError: as torch's.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict takes what state_dict() returned, not {shown(state_dict)}")
        for name in ("param_groups", "state"):
            if name not in state_dict:
                keys = f"only the keys {', '.join(map(repr, state_dict))}"[:80] if state_dict else "nothing at all"
                raise ValueError(
                    f"load_state_dict takes what state_dict() of an optimizer returned; this dict has no {name!r}, but {keys}"
                )
        ours, owner = self._base.ours, type(self).__name__

        def translate(given: dict[str, Any]) -> dict[str, Any]:
            given = bases.under_our_names(self._base, given)
            mine = generations(type(self), ours.in_groups)
            classes = _subclasses(SharpnessAware)
            known = [x for cls in classes for x in generations(cls, {*arguments(cls), *cls.counted})]
            return from_another_variant(given, self.param_groups, owner, ours.in_groups, ours.in_state, mine, known)

        loaded = load_exactly(
            self,
            super().load_state_dict,
            state_dict,
            moves=isinstance(self._base, bases.Fused),
            translate=translate,
        )
        self._base.load(loaded)
        self._base.share(self.param_groups, self.state)


def _subclasses(cls: type[SharpnessAware]) -> Iterator[type[SharpnessAware]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


PASSES = ("model", "same_rng", "m_sharpness")


def _perturbs(variant: Variant) -> bool:
    return any(plan.along is not None or any(x.ascent is not None for x in plan.passes) for plan in variant[:2])


def _listed(params: Any) -> Any:
    """Parameters or groups in a list, as they are needed twice; torch has the errors for what is none of both.

    Raises:
        TypeError: a model or a dict in the place of parameters. ValueError: a group without any.
    """
    if isinstance(params, Module):
        raise TypeError(f"params must be parameters or groups of them, not {shown(params)}: give model.parameters()")
    if isinstance(params, Mapping):
        remedy = "[group]" if "params" in params else "its .values(), or its .items() to keep the names"
        raise TypeError(f"params must be a list of parameters or of groups, not a dict: give {remedy}")
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params
    params = list(params)
    for i, group in enumerate(params):
        if isinstance(group, Mapping) and "params" not in group:
            raise ValueError(f"parameter group {i} has no 'params': give {{'params': model.parameters(), ...}}")
    return params
