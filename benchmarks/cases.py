"""What is measured: each op and each whole step, with the passes over the parameters that it cannot do without."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.shapes import Shape
from looksam import LAMB, MSAM, S2SAM, SAM, LookLayerSAM, LookSAM, SharpnessAware
from looksam.plans import PLAIN, Variant
from looksam_kernels import TensorTable, ops

Closure = Callable[[], Any]
BASE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
"""For every contender; a small lr, because the weights take many steps along one gradient."""


class Run(NamedTuple):
    """One contender, ready to be measured: ``step`` is timed, ``prepare`` before it is not."""

    prepare: Callable[[], Any]
    step: Callable[[], Any]


class Arena:
    """The tensors that the contenders of one parameter list share: the weights and the gradients of both passes.

    One memory for all, and gradients written anew before every run: one that writes over them spoils nothing.
    """

    def __init__(self, shapes: Sequence[Shape], device: str = "cpu", backend: str | None = None) -> None:
        torch.manual_seed(0)
        self.shapes, self.device, self.backend = shapes, torch.device(device), backend
        self.numel = sum(math.prod(shape) for shape in shapes)
        self.params = [Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        self.g, self.s = ([torch.empty_like(p, requires_grad=False) for p in self.params] for _ in "gs")
        # A shift by one element makes two gradients that have nothing to do with each other out of one noise.
        noise = 0.01 * torch.randn(max(map(math.prod, shapes)) + 1, device=device)
        self._fresh_g, self._fresh_s = (
            [noise[shift : shift + math.prod(shape)].view(shape) for shape in shapes] for shift in (0, 1)
        )
        self.refill()

    def refill(self) -> None:
        """Both gradients anew; the first is in place."""
        torch._foreach_copy_(self.s, self._fresh_s)
        torch._foreach_copy_(self.g, self._fresh_g)
        self.hand_over(self.g)

    def hand_over(self, gradients: Sequence[Tensor]) -> None:
        for p, x in zip(self.params, gradients, strict=True):
            p.grad = x

    def closure(self, *gradients: Sequence[Tensor] | None) -> Closure:
        """A closure that does nothing but hand over gradients, one list a call; ``None``: what is in place stays."""
        left = iter(gradients)

        def closure() -> None:
            if (given := next(left)) is not None:
                self.hand_over(given)

        return closure

    @cached_property
    def table(self) -> TensorTable:
        """Every column that an op may ask for. SGD's momentum and Adam's first moment are never needed at once."""

        def column() -> list[Tensor]:
            return [torch.zeros_like(p, requires_grad=False) for p in self.params]

        def scalars(dtype: torch.dtype) -> list[Tensor]:
            return [torch.zeros((), dtype=dtype, device=self.device) for _ in self.params]

        table = TensorTable([p.detach() for p in self.params], backend=self.backend, g=self.g, s=self.s)
        table["exp_avg"] = table["momentum_buffer"] = column()
        for name in ("b", "q", "exp_avg_sq"):
            table[name] = column()
        table["step"], table["q_norm_sq"] = scalars(torch.float32), scalars(torch.float64)
        return table


class Case(NamedTuple):
    """``passes`` names the columns that one step reads (R) and writes (W), pass by pass; see :attr:`bytes_per_param`.

    w weights, b their backup, g and s the gradients of the first and the second pass, q LookSAM's component, y
    S2-SAM's last gradient, m and v Adam's moments (m also SGD's momentum). ``columns``: model-sized buffers that it holds
    beside w, g and s.
    """

    name: str
    passes: str
    build: Callable[[Arena], Run]
    peers: tuple[str, ...] = ()
    columns: int = 4

    @property
    def bytes_per_param(self) -> int:
        """Four for every column of every pass: the fewest bytes that a streaming implementation moves."""
        return 4 * len(re.findall(r"\b[a-z]\b", self.passes))


# Whole steps: the public optimizers with gradients given in place -----------------------------------------------------


def whole(make: Callable[[Arena], SharpnessAware], sharp: bool) -> Callable[[Arena], Run]:
    """One step of the kind asked for, again and again: the phase is set back before each."""

    def build(arena: Arena) -> Run:
        opt = make(arena)

        def prepare(phase: int = 0 if sharp else 1) -> None:
            arena.refill()
            for group in opt.param_groups:
                group["phase"] = phase

        def step() -> None:
            opt.step(arena.closure(None, arena.s) if opt.needs_second_pass else arena.closure(None))

        if "k" in opt.param_groups[0]:  # what a reuse step reads comes from a sharp step
            prepare(phase=0)
            step()
        return Run(prepare, step)

    return build


def plain_adamw(arena: Arena, **options: Any) -> SharpnessAware:
    variant = Variant(sharp=PLAIN, between=PLAIN)
    return SharpnessAware(arena.params, "adamw", variant, {}, backend=arena.backend, base_kwargs=BASE | options)


def sam(arena: Arena, **options: Any) -> SharpnessAware:
    return SAM(arena.params, "adamw", backend=arena.backend, **BASE, **options)


def looksam(arena: Arena) -> SharpnessAware:
    return LookSAM(arena.params, "adamw", k=5, backend=arena.backend, **BASE)


def one_pass(cls: type[SharpnessAware], arena: Arena) -> SharpnessAware:
    return cls(arena.params, "adamw", backend=arena.backend, **BASE)  # type: ignore[arg-type, call-arg]


def lamb(arena: Arena, **options: Any) -> SharpnessAware:
    """Without clipping, which not every peer has."""
    return LAMB(arena.params, max_grad_norm=None, backend=arena.backend, **BASE, **options)


def looklayersam(arena: Arena) -> SharpnessAware:
    return LookLayerSAM(arena.params, "lamb", k=5, max_grad_norm=None, backend=arena.backend, **BASE)


UNCHECKED = {"nonfinite": "ignore"}
"""The cases beside the checked ones: of the steps whose last gradient is read for the check alone."""

STEPS = (
    Case(
        "AdamW",
        "R w,g,m,v W w,m,v",
        whole(plain_adamw, sharp=True),
        ("torch foreach AdamW", "torch.compile AdamW"),
        columns=2,
    ),
    Case(
        "SAM",
        "R g; R w,g W w,b; R b,s,m,v W w,m,v",
        whole(sam, sharp=True),
        ("pytorch_optimizer SAM", "pytorch_optimizer SAM, fused base", "davda54-style SAM"),
        columns=3,
    ),
    Case(
        "SAM, preconditioned",
        "R g,v; R w,g,v W w,b; R b,s,m,v W w,m,v",
        whole(partial(sam, precondition=True), sharp=True),
        columns=3,
    ),
    Case(
        "LookSAM refresh",
        "R g; R w,g W w,b; R g,s; R g,s,b,m,v W w,m,v,q",
        whole(looksam, sharp=True),
        ("pytorch_optimizer LookSAM refresh", "pytorch_optimizer LookSAM refresh, fused base"),
    ),
    Case(
        "LookSAM reuse",
        "R g; R g,q,w,m,v W w,m,v",
        whole(looksam, sharp=False),
        ("pytorch_optimizer LookSAM reuse", "pytorch_optimizer LookSAM reuse, fused base"),
    ),
    Case(
        "LAMB",
        "R g,w,m,v W m,v; R w,m,v W w",
        whole(lamb, sharp=True),
        ("pytorch_optimizer Lamb", "timm Lamb", "apex FusedLAMB"),
        columns=2,
    ),
    Case(
        "Look-LayerSAM refresh + LAMB",
        "R w,g; R w,g W w,b; R g,s; R g,s,b,m,v W m,v,q; R b,m,v W w",
        whole(looklayersam, sharp=True),
    ),
    Case(
        "Look-LayerSAM reuse + LAMB",
        "R g; R g,q,w,m,v W m,v; R w,m,v W w",
        whole(looklayersam, sharp=False),
    ),
    Case(
        "MSAM",
        "R g,m; R w,g,m,v W w,m,v",
        whole(partial(one_pass, MSAM), sharp=True),
        columns=2,
    ),
    Case(
        "S2-SAM",
        "R g; R w,g,y,m,v W w,y,m,v",
        whole(partial(one_pass, S2SAM), sharp=True),
        columns=3,
    ),
    Case(
        "AdamW, unchecked",
        "R w,g,m,v W w,m,v",
        whole(partial(plain_adamw, **UNCHECKED), sharp=True),
        columns=2,
    ),
    Case(
        "SAM, unchecked",
        "R g; R w,g W w,b; R b,s,m,v W w,m,v",
        whole(partial(sam, **UNCHECKED), sharp=True),
        columns=3,
    ),
    Case(
        "LAMB, unchecked",
        "R g,w,m,v W m,v; R w,m,v W w",
        whole(partial(lamb, **UNCHECKED), sharp=True),
        columns=2,
    ),
)


# Ops ------------------------------------------------------------------------------------------------------------------

HYPER: list[dict[str, Any]] = [
    {"rho": 0.05, "alpha": 0.7, "perturb_eps": 1e-12, "norm_scope": "global", "layer_scaled": 1.0}
    | {"betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "maximize": False}
    | {"always_adapt": False, "trust_clip": False, "bias_correction": True}
    | BASE
]


def sums(rule: str, after: str | None = None) -> Callable[[Arena], Run]:
    """What a step calls: the sums of a rule and, from them, its coefficients; ``after``: the rule measured before it."""

    def build(arena: Arena) -> Run:
        known = None if after is None else ops.measure(arena.table, after, HYPER)[0]
        return Run(arena.refill, lambda: ops.measure(arena.table, rule, HYPER, known=known))

    return build


def perturb(arena: Arena) -> Run:
    table = arena.table
    _, up = ops.measure(table, "sam", HYPER)

    def prepare() -> None:
        ops.restore(table)
        arena.refill()

    return Run(prepare, lambda: ops.perturb(table, up))


def step(base: str, rule: str = "at_w") -> Callable[[Arena], Run]:
    """Where d needs s, the weights are perturbed before the update: it reads the backup, and the restore is free."""

    def build(arena: Arena) -> Run:
        table = arena.table
        known, up = ops.measure(table, "sam", HYPER)
        _, down = ops.measure(table, rule, HYPER, known=known)

        def prepare() -> None:
            ops.restore(table)
            arena.refill()
            if "s" in down.inputs:
                ops.perturb(table, up)

        return Run(prepare, lambda: ops.step(table, base, down, HYPER))

    return build


def restore(arena: Arena) -> Run:
    table = arena.table
    _, up = ops.measure(table, "sam", HYPER)

    def prepare() -> None:
        arena.refill()
        ops.perturb(table, up)

    return Run(prepare, lambda: ops.restore(table))


OPS = (
    Case("sums gg", "R g", sums("sam")),
    Case("sums gg, ww", "R w,g", sums("trust_normalized")),
    Case("sums gs", "R g,s", sums("looksam_refresh", after="sam")),
    Case("perturb", "R w,g W w,b", perturb),
    Case("step SGD", "R w,g,m W w,m", step("sgd")),
    Case("step Adam", "R w,g,m,v W w,m,v", step("adam")),
    Case("step AdamW", "R w,g,m,v W w,m,v", step("adamw")),
    Case("step AdamW from b", "R b,s,m,v W w,m,v", step("adamw", "at_perturbed")),
    Case("step AdamW from b, writes q", "R g,s,b,m,v W w,m,v,q", step("adamw", "looksam_refresh")),
    Case("step AdamW with q", "R g,q,w,m,v W w,m,v", step("adamw", "looksam_reuse")),
    Case("step LAMB", "R g,w,m,v W m,v; R w,m,v W w", step("lamb")),
    Case("step LAMB from b, writes q", "R g,s,b,m,v W m,v,q; R b,m,v W w", step("lamb", "looksam_refresh")),
    Case("restore", "R b W w", restore),
)
"""One table serves all of them."""
