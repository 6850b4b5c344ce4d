"""SharpnessAware: the driver of the passes. It knows when to look twice, but no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from looksam import bases
from looksam_kernels import TensorTable, ops
from looksam_kernels.formulas import DESCENTS, Coefficients, Sums

Closure = Callable[[], Any]
Group = dict[str, Any]


class Look(NamedTuple):
    """One forward and backward: ``ascent`` says by which rule the weights move before it (``None``: not at all),
    ``column`` under which name the gradient enters the rules that follow."""

    column: str
    ascent: str | None = None


class Plan(NamedTuple):
    """One kind of step: the looks, and the rule of the way down. Rules: :mod:`looksam_kernels.formulas`."""

    looks: tuple[Look, ...]
    descent: str


class Variant(NamedTuple):
    """A sharpness-aware method: every k-th step, from the first on, is a sharp one, those between are cheap."""

    sharp: Plan
    cheap: Plan


PLAIN = Plan((Look("g"),), "first")
"""A step of the base optimizer."""


class SharpnessAware(Optimizer):
    """A base optimizer that steps down along a gradient taken further up.

    Two call styles. ``loss = opt.step(closure)``, where the closure zeroes the gradients, computes the loss, calls
    ``backward`` and returns the loss: called twice on sharp steps, once on the others; the first loss is returned.
    Or, after ``loss.backward()``::

        if opt.first_step(zero_grad=True):  # False: this step was a cheap one and is done
            loss_function(model(x), y).backward()
            opt.second_step(zero_grad=True)

    Args:
        params: parameters or groups, as for torch.optim; every hyper-parameter may be given per group.
        base_optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"lamb"`` or a ``torch.optim.Optimizer`` subclass.
        variant: the three choices.
        hyper: the variant's own hyper-parameters and their defaults.
        backend: ``"native"``, ``"triton"``, ``"reference"``; default: the fastest that is there.
        base_kwargs: the base's arguments; ``base_<name>`` where the variant has an argument of that name. All bases
            take ``max_grad_norm``: the norm of the direction is clipped there (``None``: not; 1.0 for LAMB).

    State per parameter: the base's, and ``q``, ``q_norm_sq`` where the variant reuses a gradient component. The place in
    the cycle of k steps is ``phase`` in every group.

    Raises:
        ValueError: a hyper-parameter out of range, or different between groups where it must agree; unknown names.
        TypeError: as torch.optim.Optimizer; sparse or complex parameters.
    """

    _table: TensorTable | None
    _backup: dict[Tensor, Tensor]
    _aside: dict[Tensor, dict[str, Tensor]]
    _prepared: list[Any]
    """What :meth:`_bind` has already prepared for: it looks at single parameters only when something is new."""
    _moved: bool
    """Are the weights away from where the step began?"""
    _sums: Sums | None
    _found_inf: Tensor | None
    _done_in_first: bool

    COMMON = ("k", "phase", "norm_scope", "layer_scale", "perturb_eps", "max_grad_norm")
    """Hyper-parameters that all groups share."""

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: str | type[Optimizer],
        variant: Variant,
        hyper: Mapping[str, Any],
        *,
        backend: str | None = None,
        base_kwargs: Mapping[str, Any],
    ) -> None:
        self.variant = variant
        self._requested = backend
        self._base = bases.resolve(base_optimizer, dict(base_kwargs), reserved=set(hyper) | {"k", "phase"})
        self._forget()
        super().__init__(params, {"phase": 0, **hyper, **self._base.defaults})
        self._inner = None
        if isinstance(self._base, bases.Wrapped):
            self._inner = self._base.build(self.param_groups, self.state)

    # What the user calls --------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        if self._moved:
            raise RuntimeError("step(closure) between first_step and second_step; call second_step() to end the step")
        plan, first_loss = self._plan, None
        with self._all_or_nothing():
            for look in plan.looks:
                if look.ascent is not None:
                    self._ascend(look.ascent)
                with torch.enable_grad():
                    loss = closure()
                first_loss = loss if look is plan.looks[0] else first_loss
                self._collect(plan, look)
            self._descend(plan)
        return first_loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> bool:
        """To be called with the gradients at w. On a sharp step moves the weights to w + e; on a cheap one does it all.

        Args:
            zero_grad: afterwards set the gradients to ``None``. Otherwise they stay, and the second backward adds to them.

        Returns:
            Whether a second backward, and ``second_step``, must follow.
        """
        if self._moved:
            raise RuntimeError("first_step() twice; call second_step() after the second backward")
        plan = self._plan
        if len(plan.looks) == 1:
            self.step()
            self._done_in_first = True
            if zero_grad:
                self.zero_grad()
            return False
        first, second = self._two_looks(plan)
        with self._all_or_nothing():
            self._collect(plan, first, keep_grad=not zero_grad)
            self._ascend(second.ascent)
        return True

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """To be called with the gradients at w + e: restores w and updates it. Nothing is left to do on a cheap step.

        Raises:
            RuntimeError: no ``first_step`` came before.
        """
        if self._moved:
            self.step()
        elif not self._done_in_first:
            raise RuntimeError("second_step() without first_step(); call first_step() after the first backward")
        self._done_in_first = False
        if zero_grad:
            self.zero_grad()

    @property
    def needs_second_pass(self) -> bool:
        """Does the step that is coming, or under way, need a second forward and backward?"""
        return len(self._plan.looks) > 1

    @property
    def base_optimizer(self) -> Optimizer:
        """What to hand to a scheduler that wants the base: the wrapped optimizer, or this one where the base is fused.
        Both share their groups."""
        return self if self._inner is None else self._inner

    @property
    def backend(self) -> str:
        """The backend that runs the ops: ``"native"``, ``"triton"`` or ``"reference"``."""
        return self._bound().backend_name

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; fills in every default, the base's included, and checks the values."""
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if callable(accepts := group.get("layer_filter", 0)) or accepts is None:
            group["layer_filter"] = [accepts is None or bool(accepts(p)) for p in group["params"]]
        if len(self.param_groups) > 1:
            group["phase"] = self.param_groups[0]["phase"]
        self._table = None

    # The parts of a step --------------------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        group = self.param_groups[0]
        return self.variant.sharp if group["phase"] % group.get("k", 1) == 0 else self.variant.cheap

    def _two_looks(self, plan: Plan) -> tuple[Look, Look]:
        if len(plan.looks) != 2 or plan.looks[0].ascent is not None:
            raise RuntimeError(f"{type(self).__name__} has no first_step and second_step; call step(closure)")
        return plan.looks[0], plan.looks[1]

    def _collect(self, plan: Plan, look: Look, keep_grad: bool = False) -> None:
        """Takes the gradients of now into the table: the tensors themselves, or copies where they must also stay."""
        ascends = any(other.ascent is not None for other in plan.looks)
        last = look is plan.looks[-1]
        table = self._bind(look.column, ascends, DESCENTS[plan.descent].writes if last else None)
        if keep_grad:
            table[look.column] = [g if g is None else g.clone() for g in table[look.column]]
        elif not last:
            for p in self._params:
                p.grad = None

    def _ascend(self, rule: str | None) -> None:
        """Measures the gradients collected so far and moves the weights."""
        assert rule is not None
        table, adaptive = self._bound(), self._adaptive()
        if adaptive is not None and rule == "sam":
            rule = "asam"
        coefficients = self._measure(rule, adaptive)
        self._moved = True
        ops.perturb(table, coefficients, adaptive)
        torch.clear_autocast_cache()

    def _descend(self, plan: Plan) -> None:
        """Measures what is still unknown, combines, restores and updates; ends the step."""
        table, groups = self._bound(), self._hyper()
        coefficients = self._measure(plan.descent, None, self.param_groups[0]["max_grad_norm"])
        if isinstance(self._base, bases.Fused):
            ops.step(table, self._base.name, coefficients, groups)
        else:
            ops.step(table, "grad", coefficients, groups)
            self._step_inner(coefficients)
        if self._moved:
            torch.clear_autocast_cache()
        self._end()
        for group in self.param_groups:
            group["phase"] = (group["phase"] + 1) % group.get("k", 1)

    def _measure(
        self, rule: str, adaptive: list[float | None] | None, max_grad_norm: float | None = None
    ) -> Coefficients:
        """The scalars of a rule; sums and found_inf go on from one look to the next."""
        self._sums, coefficients = ops.measure(
            self._bound(),
            rule,
            self._hyper(),
            known=self._sums,
            adaptive=adaptive,
            found_inf=self._found_inf,
            max_grad_norm=max_grad_norm,
        )
        self._found_inf = coefficients.found_inf
        return coefficients

    def _step_on_gradients(self) -> None:
        """step() without a closure: ends a two-call step, does a cheap one, or only creates the state."""
        plan = self._plan
        if self._moved or len(plan.looks) == 1:
            with self._all_or_nothing():
                self._collect(plan, plan.looks[-1])
                self._descend(plan)
        elif all(p.grad is None or not p.grad.any() for p in self._params):
            self._create_state()
        else:
            raise RuntimeError(
                "this step needs the gradient twice: call step(closure) with a closure that zeroes the gradients, "
                "computes the loss, calls backward and returns the loss; or call first_step(), then backward again, "
                "then second_step()"
            )

    def _step_inner(self, coefficients: Coefficients) -> None:
        """The wrapped optimizer's step. Skipping it after an overflow takes the host: one read of found_inf."""
        assert isinstance(self._base, bases.Wrapped)
        assert self._inner is not None
        if not bool(coefficients.found_inf):
            self._base.step(self._inner, self.param_groups, self.state)
        for p, extra in self._aside.items():
            self.state[p].update(extra)
        self._aside.clear()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Whatever is raised inside leaves every weight as before the step."""
        try:
            yield
        except BaseException:
            ops.restore(self._bound())
            torch.clear_autocast_cache()
            self._end()
            raise

    def _end(self) -> None:
        self._moved, self._sums, self._found_inf = False, None, None
        if self._table is not None:
            for look in (*self.variant.sharp.looks, *self.variant.cheap.looks):
                self._table.drop(look.column)

    # The table and the state ----------------------------------------------------------------------------------------

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _forget(self) -> None:
        """Everything that is not configuration, groups or state, and can be made anew."""
        self._table = None
        self._backup = {}
        self._aside = {}
        self._prepared = []
        self._moved, self._sums, self._found_inf = False, None, None
        self._done_in_first = False

    def _bound(self) -> TensorTable:
        """The table of all parameters, in the order of the groups."""
        if self._table is None:
            group = [i for i, g in enumerate(self.param_groups) for _ in g["params"]]
            outside = [not ok for g in self.param_groups for ok in g.get("layer_filter", [True] * len(g["params"]))]
            offset = len(self.param_groups)
            group = [i + offset * out for i, out in zip(group, outside, strict=True)]
            self._table = TensorTable([p.detach() for p in self._params], group, backend=self._requested)
            self._prepared = []
            self._set_columns(self._table)
        return self._table

    def _bind(self, column: str, need_backup: bool = False, writes: str | None = None) -> TensorTable:
        """The table with the gradients of now in ``column`` and with all that the parameters which have one need."""
        table = self._bound()
        table[column] = grads = [p.grad for p in self._params]
        momentum = [bool(g.get("momentum")) for g in self.param_groups]
        asked = (need_backup, writes, momentum, [g is not None for g in grads])
        if asked not in self._prepared:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._prepare(p, group, need_backup, writes)
            self._set_columns(table)
            self._prepared = [*self._prepared[-7:], asked]
        return table

    def _prepare(self, p: Tensor, group: Group, need_backup: bool, writes: str | None) -> None:
        """Creates whatever p still lacks. A wrapped optimizer must find no state of ours when it creates its own, so
        ours stays aside until it has."""
        state = self.state.get(p, {})
        new_momentum = group.get("momentum") and "momentum_buffer" not in state
        if isinstance(self._base, bases.Fused) and ("step" not in state or new_momentum):
            self.state[p] = state = {**self._base.state_for(p, group), **state}
        if need_backup and p not in self._backup and "master_param" not in state:
            self._backup[p] = torch.empty_like(p)
        if writes is not None and writes not in state:
            mine = state if isinstance(self._base, bases.Fused) else self._aside.setdefault(p, {})
            mine[writes] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            mine[f"{writes}_norm_sq"] = torch.zeros((), dtype=torch.float64, device=p.device)

    def _set_columns(self, table: TensorTable) -> None:
        rows = [{**self.state.get(p, {}), **self._aside.get(p, {})} for p in self._params]
        written = {DESCENTS[plan.descent].writes for plan in self.variant} - {None}
        names = [f"{column}{suffix}" for column in written for suffix in ("", "_norm_sq")]
        if isinstance(self._base, bases.Fused):
            names += ["step", *ops.BASES[self._base.name]]
        for name in names:
            table[name] = [row.get(name) for row in rows]
        table["b"] = [row.get("master_param", self._backup.get(p)) for p, row in zip(self._params, rows, strict=True)]

    def _create_state(self) -> None:
        """Creates the state of all parameters that have a gradient; moves no weight and no phase.

        torch.distributed.checkpoint asks for this, by a step with zero gradients on a fresh optimizer.
        """
        self._bind("g", writes=DESCENTS[self.variant.sharp.descent].writes)
        if isinstance(self._base, bases.Wrapped):
            lrs = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            try:
                self._step_inner(Coefficients((), torch.empty(0), None, torch.zeros(())))
            finally:
                for group, lr in zip(self.param_groups, lrs, strict=True):
                    group["lr"] = lr
        self._end()

    # Hyper-parameters -----------------------------------------------------------------------------------------------

    def _hyper(self) -> list[Group]:
        """The groups as the ops read them; twice where a layer filter keeps some tensors out of the layer-wise scale."""
        if not any("layer_filter" in g for g in self.param_groups):
            return self.param_groups
        return [{**g, "layer_scaled": scaled} for scaled in (1.0, 0.0) for g in self.param_groups]

    def _adaptive(self) -> list[float | None] | None:
        """ASAM's eta of each weight tensor (ndim >= 2) of the adaptive groups."""
        if not any(g.get("adaptive") for g in self.param_groups):
            return None
        return [g["eta"] if g["adaptive"] and p.ndim >= 2 else None for g in self.param_groups for p in g["params"]]

    def _check(self, group: Group) -> None:
        for name, low in (("rho", 0), ("alpha", 0), ("eta", 0), ("perturb_eps", 0), ("k", 1)):
            if name in self.defaults and not group[name] >= low:
                raise ValueError(f"{name} must be at least {low}, not {group[name]!r}")
        if "k" in self.defaults and not isinstance(group["k"], int):
            raise ValueError(f"k must be a whole number of steps, not {group['k']!r}")
        for name, allowed in (("norm_scope", ("global", "tensor")), ("layer_scale", LAYER_SCALES)):
            if name in self.defaults and group[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {group[name]!r}")
        if isinstance(self._base, bases.Fused):
            for option in bases.NOT_FUSED:
                if group.get(option):
                    raise ValueError(f"{option}=True in one group only is not supported; give it to the optimizer")
        first = self.param_groups[0] if self.param_groups else group
        for name in self.COMMON:
            if name != "phase" and name in group and group[name] != first[name]:
                raise ValueError(f"{name} must be the same in all groups: {first[name]!r} and {group[name]!r}")

    # Copies and checkpoints -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self._moved:
            raise RuntimeError("cannot copy or pickle between first_step and second_step: the weights are perturbed")
        own = {name: getattr(self, name) for name in ("variant", "_requested", "_base", "_inner")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, when the weights are perturbed.
        """
        if self._moved:
            raise RuntimeError("state_dict() between first_step and second_step: the weights are perturbed")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the dtype it was saved with.

        Torch casts state to the parameter's dtype, which would round the float32 state of low-precision parameters.
        """
        final: dict[str, Any] = {}

        def capture(_: Optimizer, given: dict[str, Any]) -> None:
            final.update(given)

        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = chain.from_iterable(g["params"] for g in final["param_groups"])
        for key, p in zip(ids, self._params, strict=True):
            for name, value in final["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(p.device, copy=True)


LAYER_SCALES = ("trust_normalized", "trust", "trust_global", "unit")
