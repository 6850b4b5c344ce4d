"""SharpnessAware: the driver of the passes. It knows when to look twice, but no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from looksam import bases
from looksam.amp import ScaledGradients
from looksam.distributed import Replicas, Whole, shards_of
from looksam.masters import Masters
from looksam.passes import Passes
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


class SharpnessAware(ScaledGradients, Optimizer):
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
            take ``max_grad_norm``: the norm of the direction is clipped there (``None``: not; 1.0 for LAMB). And, for
            the passes, ``model``, ``same_rng`` and ``m_sharpness``: see :class:`looksam.passes.Passes`.

    State per parameter: the base's, and ``q``, ``q_norm_sq`` where the variant reuses a gradient component. The place in
    the cycle of k steps is ``phase`` in every group.

    Raises:
        ValueError: a hyper-parameter out of range, or different between groups where it must agree; unknown names.
        TypeError: as torch.optim.Optimizer; sparse or complex parameters.
    """

    _table: TensorTable | None
    _pointers: list[int]
    """Where the parameters of the table were: a model that moves its parameters gets a new table."""
    _shards: Whole
    _masters: Masters
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
        base_kwargs = dict(base_kwargs)
        self._passes = Passes(**{name: base_kwargs.pop(name) for name in PASSES if name in base_kwargs})
        self._base = bases.resolve(base_optimizer, base_kwargs, reserved=set(hyper) | {"k", "phase"})
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
            scale = self._grad_scale(new_gradients=True)
            for number, look in enumerate(plan.looks):
                if look.ascent is not None:
                    self._ascend(look.ascent, scale)
                with torch.enable_grad():
                    loss = self._passes.run(closure, number, len(plan.looks))
                first_loss = loss if number == 0 else first_loss
                self._collect(plan, look)
            self._descend(plan, scale)
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
            self._ascend(second.ascent, None)
            self._passes.open()
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

    @torch.no_grad()
    def abandon(self) -> None:
        """Goes back to where the step began: for a second forward or backward, after ``first_step``, that failed."""
        self._restore()

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
        self._apply_layer_filter(group)
        for p in group["params"]:
            if p.is_complex() or p.layout is not torch.strided:
                self.param_groups.pop()
                raise TypeError(
                    f"{p.dtype} parameters of layout {p.layout} are not supported; only dense real ones are"
                )
        if len(self.param_groups) > 1:
            group["phase"] = self.param_groups[0]["phase"]
        self._table = None

    @staticmethod
    def _apply_layer_filter(group: Group) -> None:
        """The function of the constructor -> what it says of each parameter, which a checkpoint can hold."""
        accepts = group.get("layer_filter", [])
        if not isinstance(accepts, list):
            group["layer_filter"] = [accepts is None or bool(accepts(p)) for p in group["params"]]

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
        if keep_grad or (not last and _are_views(table[look.column])):
            table[look.column] = [g if g is None else g.clone() for g in table[look.column]]
        if not (keep_grad or last):
            for p in self._params:
                p.grad = None

    def _ascend(self, rule: str | None, grad_scale: Tensor | None) -> None:
        """Measures the gradients collected so far and moves the weights."""
        assert rule is not None
        table, adaptive = self._bound(), self._adaptive()
        if adaptive is not None and rule == "sam":
            rule = "asam"
        coefficients = self._measure(rule, self._hyper(), grad_scale, adaptive)
        self._moved = True
        ops.perturb(table, coefficients, adaptive)
        self._weights_changed()

    def _descend(self, plan: Plan, grad_scale: Tensor | None) -> None:
        """Measures what is still unknown, combines, restores and updates; ends the step."""
        table, groups, base = self._bound(), self._hyper(), self._base
        if self._passes.m_sharpness and self._moved:
            replicas = Replicas(self._passes.model)
            self._found_inf = replicas.agree(table, plan.descent, plan.looks[-1].column, self._found_inf)
            self._sums = None
        if isinstance(base, bases.Wrapped) and any(g.get("maximize") for g in groups):
            groups = [{**g, "maximize": False} for g in groups]  # the wrapped optimizer turns the direction itself
        clip = self.param_groups[0]["max_grad_norm"]
        coefficients = self._measure(plan.descent, groups, grad_scale, None, clip)
        if isinstance(base, bases.Fused):
            self._shards.step(table, base.name, coefficients, groups)
        else:
            self._step_wrapped(coefficients, groups)
        self._report(coefficients.found_inf)
        self._weights_changed()
        self._masters.written()
        self._end()
        for group in self.param_groups:
            group["phase"] = (group["phase"] + 1) % group.get("k", 1)

    def _measure(
        self,
        rule: str,
        groups: list[Group],
        grad_scale: Tensor | None,
        adaptive: list[float | None] | None,
        max_grad_norm: float | None = None,
    ) -> Coefficients:
        """The scalars of a rule; sums and found_inf go on from one look to the next."""
        self._sums, coefficients = ops.measure(
            self._bound(),
            rule,
            groups,
            known=self._sums,
            adaptive=adaptive,
            all_reduce=self._shards.all_reduce,
            grad_scale=grad_scale,
            found_inf=self._found_inf,
            max_grad_norm=max_grad_norm,
        )
        self._found_inf = coefficients.found_inf
        return coefficients

    def _step_on_gradients(self) -> None:
        """step() without a closure: ends a two-call step, does a cheap one, or only creates the state."""
        plan = self._plan
        with self._all_or_nothing():
            if self._moved or len(plan.looks) == 1:
                self._passes.close()
                self._collect(plan, plan.looks[-1])
                self._descend(plan, self._grad_scale(new_gradients=False))
            elif all(g is None or not g.any() for g in self._shards_of_now().local([p.grad for p in self._params])):
                self._create_state()
            else:
                raise RuntimeError(
                    "this step needs the gradient twice: call step(closure) with a closure that zeroes the gradients, "
                    "computes the loss, calls backward and returns the loss; or call first_step(), then backward "
                    "again, then second_step()"
                )

    def _step_wrapped(self, coefficients: Coefficients, groups: list[Group]) -> None:
        """d goes to ``.grad``; the wrapped optimizer does the rest. If it raises, what was written is as before."""
        table = self._bound()
        names = () if coefficients.q is None else (coefficients.writes, f"{coefficients.writes}_norm_sq")
        written = [(x, x.clone()) for name in names for x in table[name] if x is not None]
        try:
            self._shards.step(table, "grad", coefficients, groups)
            if not bool(coefficients.found_inf):  # the one read of the host: no wrapped optimizer can skip by itself
                self._step_inner()
        except BaseException:
            for x, before in written:
                x.copy_(before)
            raise

    def _step_inner(self) -> None:
        assert isinstance(self._base, bases.Wrapped)
        assert self._inner is not None
        self._base.step(self._inner, self.param_groups, self.state)
        for p in [p for p in self._aside if p.grad is not None]:
            self.state[p].update(self._aside.pop(p))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Whatever is raised inside leaves every weight as before the step."""
        try:
            yield
        except BaseException:
            self._restore()
            self._hand_back()
            raise

    def _restore(self) -> None:
        if self._table is not None:
            ops.restore(self._table)
        if self._moved:
            self._weights_changed()
        self._masters.written()
        self._end()

    def _weights_changed(self) -> None:
        """Copies of the weights that others keep are out of date: autocast's casts, gathered shards."""
        torch.clear_autocast_cache()
        self._shards.reshard(self._passes.model)

    def _end(self) -> None:
        self._moved, self._sums, self._found_inf = False, None, None
        self._passes.close()
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
        self._pointers = []
        self._shards, self._masters = Whole(), Masters([])
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
            weights = self._shards_of_now().local([p.detach() for p in self._params])
            self._pointers = _pointers(weights)
            self._table = TensorTable([w for w in weights if w is not None], group, backend=self._requested)
            self._prepared = []
            self._set_columns(self._table)
        return self._table

    def _shards_of_now(self) -> Whole:
        if self._table is None:
            self._shards = shards_of(self._params)
        return self._shards

    def _follow(self) -> None:
        """At the begin of a step: what has changed outside since the last one."""
        if self._table is not None and self._pointers != _pointers(self._shards.local(self._params)):
            self._table, self._backup = None, {}
        self._masters.follow()

    def _bind(self, column: str, need_backup: bool = False, writes: str | None = None) -> TensorTable:
        """The table with the gradients of now in ``column`` and with all that the parameters which have one need."""
        if not self._moved:
            self._follow()
        table = self._bound()
        table[column] = grads = self._shards.local([p.grad for p in self._params])
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
        new_master = bases.is_low_precision(p) and "master_param" not in state
        if isinstance(self._base, bases.Fused) and ("step" not in state or new_momentum or new_master):
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
            table[name] = self._shards.local([row.get(name) for row in rows])
        backups = [row.get("master_param", self._backup.get(p)) for p, row in zip(self._params, rows, strict=True)]
        table["b"] = self._shards.local(backups)
        own = zip(self._params, table["w"], table["b"], rows, strict=True)
        self._masters = Masters((p, w, b) for p, w, b, row in own if "master_param" in row)
        if not self._moved:
            self._masters.follow()

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
                self._step_inner()
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
        own = {name: getattr(self, name) for name in ("variant", "_requested", "_passes", "_base", "_inner")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)  # a checkpoint of the base alone can be loaded
            self._apply_layer_filter(group)
        if self._inner is not None:
            self._inner.param_groups, self._inner.state = self.param_groups, self.state

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
                mine = self.state[p].get(name)
                if isinstance(value, Tensor) and isinstance(mine, Tensor) and value.dtype != mine.dtype:
                    self.state[p][name] = mine = value.to(p.device, copy=True)
                if isinstance(self._base, bases.Fused) and isinstance(mine, Tensor):
                    self.state[p][name] = mine.to(p.device)  # torch leaves ``step`` where it was saved


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    return [x.data_ptr() for x in tensors if x is not None]


def _are_views(gradients: Sequence[Tensor | None]) -> bool:
    """Do gradients live in a larger buffer, which the next backward overwrites (DDP's ``gradient_as_bucket_view``)?

    Buckets take all parameters of a model, so the first and the last gradient tell.
    """
    there = [g for g in gradients if g is not None]
    return any(g.untyped_storage().nbytes() > g.numel() * g.element_size() for g in (*there[:1], *there[-1:]))


PASSES = ("model", "same_rng", "m_sharpness")
LAYER_SCALES = ("trust_normalized", "trust", "trust_global", "unit")
