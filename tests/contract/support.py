"""What the contract's tests share: the matrix of backends, variants and bases, and a small thing to train."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from looksam_kernels import backend_info
from tests import bases

BACKENDS = [name for name in ("reference", "native") if backend_info("cpu")[name].available]
VARIANTS = looksam.VARIANTS
REUSING = ["looksam", "looklayersam"]
PERIODIC = [name for name, cls in VARIANTS.items() if "k" in inspect.signature(cls).parameters]
DECIDING = ["aesam", "aelooksam"]
AT_REST = [name for name, cls in VARIANTS.items() if cls.perturbed_at_rest]
"""One pass a step; the weights rest perturbed."""
SHARP = [name for name in VARIANTS if name not in AT_REST]
IN_TWO_CALLS = [name for name in VARIANTS if name not in ("crsam", "sampa", "esam")]
OPTIONS: dict[str, dict[str, Any]] = {
    "esam": {"gamma": 1.0},
    "sampa": {"previous_batch": False},
    "aesam": {"total_steps": 10, "lambda1": -1e3, "lambda2": -1e3},
    "aelooksam": {"total_steps": 10, "lambda1": -1e3, "lambda2": -1e3},
}
"""With which every sharp step has as many passes as :func:`passes` says, and SAMPa's closure is that of the others:
tests/optim/test_selecting.py and test_sampa.py are for the rest."""


class WrappedRMSprop(torch.optim.RMSprop):
    """The class of the name is fused; a user's own is not."""


class WrappedAdagrad(torch.optim.Adagrad):
    """One that creates its state in its constructor."""


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (name, base.options) for name, base in bases.BASES.items()},
    "wrapped rmsprop": (WrappedRMSprop, {"lr": 1e-3, "momentum": 0.9}),
    "wrapped adagrad": (WrappedAdagrad, {"lr": 1e-2}),
}
"""Fused ones by name, and two that are wrapped."""

WRAPPED = tuple(name for name, (base, _) in BASES.items() if not isinstance(base, str))


def works(variant: str, base: str) -> bool:
    """Does this variant work over this base of :data:`BASES`?"""
    return VARIANTS[variant].bases is None or base in VARIANTS[variant].bases


on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_variants = pytest.mark.parametrize("variant", VARIANTS)
HOST_FREE = [name for name in VARIANTS if name not in ("esam", *DECIDING)]
"""AE-SAM and AE-LookSAM read one number a step, to decide whether it is sharp; ESAM's closure is another."""
on_variants_in_two_calls = pytest.mark.parametrize("variant", IN_TWO_CALLS)
on_host_free_pairs = pytest.mark.parametrize(
    ("variant", "base"), [(v, b) for v in HOST_FREE for b in ("sgd", "adamw", "lamb") if works(v, b)]
)
on_periodic_variants = pytest.mark.parametrize("variant", PERIODIC)
on_sharp_variants = pytest.mark.parametrize("variant", SHARP)
on_sharp_variants_in_two_calls = pytest.mark.parametrize("variant", [name for name in SHARP if name in IN_TWO_CALLS])
on_bases = pytest.mark.parametrize("base", BASES)

on_products = pytest.mark.parametrize(
    ("variant", "base"), [(variant, base) for variant in VARIANTS for base in BASES if works(variant, base)]
)
"""Every variant over every base that it works over."""

PAIRS = list(
    dict.fromkeys(
        (
            *((variant, base) for variant in SHARP for base in ("sgd", "wrapped rmsprop")),
            *((variant, base) for variant in AT_REST for base in ("sgd", "adamw")),
            *((variant, base) for variant in ("looksam", "wsam") for base in BASES),
        )
    )
)
"""Every variant over a fused and a wrapped base, every base under one that keeps state and one that adds after the base
update: where it makes no difference how the two meet, every variant over every base, which test_faults.py goes through,
tells no more."""

on_pairs = pytest.mark.parametrize(("variant", "base"), PAIRS)
on_sharp_pairs = pytest.mark.parametrize(("variant", "base"), [(v, b) for v, b in PAIRS if v in SHARP])
on_pairs_in_two_calls = pytest.mark.parametrize(("variant", "base"), [(v, b) for v, b in PAIRS if v in IN_TWO_CALLS])


def build(params: Any, variant: str = "looksam", base: str = "sgd", **kwargs: Any) -> looksam.SharpnessAware:
    """An optimizer with k = 2 where there is a k, unless told otherwise."""
    optimizer, defaults = BASES[base]
    options = {"k": 2, "rho": 0.1, **OPTIONS.get(variant, {}), **defaults, **kwargs}
    if variant not in PERIODIC:
        del options["k"]
    return VARIANTS[variant](params, optimizer, **options)


def passes(variant: str, step: int, k: int = 2) -> int:
    """How often the closure is called in this step, counted from 0."""
    cheap = variant in AT_REST or (variant in PERIODIC and step % k != 0)
    return 1 if cheap else 3 if variant == "crsam" else 2


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float32, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 5, generator=generator).to(dtype), torch.randint(3, (rows,), generator=generator)


class Closure:
    """Zeroes, forward, backward; counts its calls and keeps its losses. ``before`` is called with the call's number, and
    ``after``, when the gradients are there.

    For an optimizer that wants the losses of single samples it leaves backward out, and its losses are their means.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        before: Callable[[int], None] = lambda call: None,
        after: Callable[[int], None] = lambda call: None,
    ) -> None:
        self.model, self.optimizer, self.scale, self.before, self.after = model, optimizer, scale, before, after
        self.losses: list[float] = []

    def __call__(self, kept: Tensor | None = None) -> Tensor:
        call = len(self.losses)
        self.before(call)
        self.optimizer.zero_grad()
        x, y = data(dtype := next(self.model.parameters()).dtype)
        if kept is not None:
            x, y = x[kept], y[kept]
        per_sample = getattr(self.optimizer, "per_sample", False)
        logits = self.model(x).to(torch.promote_types(dtype, torch.float32))
        loss = F.cross_entropy(logits, y, reduction="none" if per_sample else "mean")
        if per_sample:
            loss = self.scale(loss)  # which the optimizer calls backward of
            self.losses.append(loss.mean().item())
            if loss.requires_grad:
                at_the_end = torch.autograd.Variable._execution_engine.queue_callback
                loss.register_hook(lambda _: at_the_end(lambda: self.after(call)))
            return loss
        self.losses.append(loss.item())
        self.scale(loss).backward()
        self.after(call)
        return loss


def backward(optimizer: Any, loss: Tensor, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """What a closure ends with. For an optimizer that wants the losses of single samples, this is the one sample's."""
    if optimizer.per_sample:
        return scale(loss).reshape(1)
    scale(loss).backward()
    return loss


def train(model: nn.Module, optimizer: Any, steps: int) -> list[float]:
    """The losses that ``step`` returned."""
    closure = Closure(model, optimizer)
    return [optimizer.step(closure).item() for _ in range(steps)]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A copy of the state of every parameter, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in params]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit; a state that is not there equals one of zeros (the buffers that a first step creates)."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in a.keys() | b.keys():
            x, y = a.get(key), b.get(key)
            if x is None or y is None:
                there = x if y is None else y
                assert key == "master_param" or not torch.as_tensor(there).any(), f"{where}{key} appeared"
            else:
                assert_same(x, y, f"{where}{key}/")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, Iterable) and not isinstance(a, str):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}{i}/")
    else:
        assert a == b, where


def assert_goes_on_from_a_checkpoint(
    run: tuple[nn.Module, Any], fresh: tuple[nn.Module, Any], train: Callable[[nn.Module, Any, int], Any], steps: int
) -> None:
    """A model and its optimizer, saved and loaded into others, make the same next steps bit for bit."""
    buffer = io.BytesIO()
    torch.save([x.state_dict() for x in run], buffer)
    buffer.seek(0)
    for x, saved in zip(fresh, torch.load(buffer, weights_only=True), strict=True):
        x.load_state_dict(saved)
    for model, optimizer in (run, fresh):
        train(model, optimizer, steps)
    assert_same(weights(run[0]), weights(fresh[0]))
    assert_same(states(run[1]), states(fresh[1]))
