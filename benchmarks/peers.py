"""What others offer for the same steps, and the copy that says what the memory can do.

Each is given the options under which it is fastest. A peer that cannot run raises :class:`Missing`, and the report says why.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.cases import BASE, Arena, Run


class Missing(Exception):
    """Why a peer is not measured."""


class Peer(NamedTuple):
    """``columns``: model-sized buffers that it holds at its peak, temporaries included, beside w, g and s."""

    build: Callable[[Arena], Run]
    columns: int


# torch ----------------------------------------------------------------------------------------------------------------


def adamw(**options: Any) -> Callable[[Arena], Run]:
    def build(arena: Arena) -> Run:
        return Run(arena.refill, AdamW(arena.params, **BASE, **options).step)

    return build


def compiled_adamw(arena: Arena) -> Run:
    """``torch.compile(opt.step)``; the step that compiles comes before any that is measured."""
    if len(arena.params) > 1000:
        raise Missing(f"compiling a step over {len(arena.params):,} tensors takes longer than all of this benchmark")
    torch._dynamo.reset()
    return Run(arena.refill, torch.compile(AdamW(arena.params, **BASE, foreach=True).step))


COPIED = 2**26


def copy(device: str, numel: int = COPIED) -> Run:
    """A copy between two buffers far larger than any cache: 8 bytes an element, one read and one write."""
    source, target = torch.randn(numel, device=device), torch.zeros(numel, device=device)
    return Run(lambda: None, lambda: target.copy_(source))


# pytorch_optimizer ----------------------------------------------------------------------------------------------------


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(str(error)) from error


def po_sam(fused: bool) -> Callable[[Arena], Run]:
    """Its foreach path, which is off by default on the CPU. The base gets ``foreach`` from the group, so that
    ``fused=True`` is not refused beside it, and then prefers fused."""

    def build(arena: Arena) -> Run:
        cls = _installed("pytorch_optimizer").SAM
        opt = cls([{"params": arena.params, "foreach": True}], AdamW, **BASE, fused=fused)
        return Run(arena.refill, lambda: opt.step(arena.closure(arena.s)))

    return build


def po_looksam(refresh: bool, fused: bool) -> Callable[[Arena], Run]:
    """As documented: the first gradients are in place and the closure is called in every step, in a reuse step too, for
    gradients at the same weights. Only the optimizer's own time counts here, so that pass costs it nothing."""

    def build(arena: Arena) -> Run:
        cls = _installed("pytorch_optimizer").LookSAM
        opt = cls(arena.params, AdamW, k=5, foreach=True, **BASE, fused=fused)

        def prepare(step: int = 0 if refresh else 1) -> None:
            arena.refill()
            for group in opt.param_groups:
                group["looksam_step"] = step

        def step() -> None:
            opt.step(arena.closure(arena.s if refresh else arena.g))

        prepare(step=0)
        opt.step(arena.closure(arena.s))
        return Run(prepare, step)

    return build


def po_lamb(arena: Arena) -> Run:
    cls = _installed("pytorch_optimizer").Lamb
    return Run(arena.refill, cls(arena.params, **BASE, weight_decouple=False, foreach=True).step)


# Others ---------------------------------------------------------------------------------------------------------------


def timm_lamb(arena: Arena) -> Run:
    """timm's ``optim`` folder as a package of its own: timm itself cannot be imported without torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.submodule_search_locations is None:
        raise Missing("No module named 'timm'")
    if "timm_optim" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("timm_optim", None, is_package=True)
        spec.submodule_search_locations = [f"{place}/optim" for place in found.submodule_search_locations]
        sys.modules["timm_optim"] = importlib.util.module_from_spec(spec)
    cls = _installed("timm_optim.lamb").Lamb
    try:
        opt = cls(arena.params, **BASE, max_grad_norm=None, foreach=True)
    except TypeError:  # a release before its foreach path
        opt = cls(arena.params, **BASE, max_grad_norm=None)
    return Run(arena.refill, opt.step)


def apex_lamb(arena: Arena) -> Run:
    if arena.device.type != "cuda":
        raise Missing("runs on CUDA only")
    cls = _installed("apex.optimizers").FusedLAMB
    return Run(arena.refill, cls(arena.params, **BASE, max_grad_norm=0.0).step)


class LoopSAM:
    """SAM as the widely copied single-file versions write it: one tensor at a time, a clone of each weight as backup."""

    def __init__(self, params: list[torch.nn.Parameter], base: Optimizer, rho: float = 0.05) -> None:
        self.params, self.base, self.rho = params, base, rho
        self.saved: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:
        norm = torch.stack([p.grad.norm() for p in self.params if p.grad is not None]).norm()
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            self.saved[p] = p.clone()
            p.add_(p.grad * scale)
        self.base.zero_grad()
        closure()
        for p in self.params:
            p.copy_(self.saved[p])
        self.base.step()


def loop_sam(arena: Arena) -> Run:
    """Over AdamW as torch picks it by default: a loop on the CPU, foreach on CUDA."""
    opt = LoopSAM(arena.params, AdamW(arena.params, **BASE))
    return Run(arena.refill, lambda: opt.step(arena.closure(arena.s)))


YARDSTICK = "torch fused AdamW"
"""Measured beside every case."""

PEERS = {
    YARDSTICK: Peer(adamw(fused=True), 2),
    "torch foreach AdamW": Peer(adamw(foreach=True), 4),
    "torch.compile AdamW": Peer(compiled_adamw, 4),
    "pytorch_optimizer SAM": Peer(po_sam(fused=False), 5),
    "pytorch_optimizer SAM, fused base": Peer(po_sam(fused=True), 4),
    "davda54-style SAM": Peer(loop_sam, 3),
    "pytorch_optimizer LookSAM refresh": Peer(po_looksam(True, fused=False), 9),
    "pytorch_optimizer LookSAM refresh, fused base": Peer(po_looksam(True, fused=True), 9),
    "pytorch_optimizer LookSAM reuse": Peer(po_looksam(False, fused=False), 9),
    "pytorch_optimizer LookSAM reuse, fused base": Peer(po_looksam(False, fused=True), 9),
    "pytorch_optimizer Lamb": Peer(po_lamb, 3),
    "timm Lamb": Peer(timm_lamb, 4),
    "apex FusedLAMB": Peer(apex_lamb, 2),
}
