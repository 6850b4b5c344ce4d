"""Two equal models, one under an optimizer of looksam and one under the plain reference, that are treated alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from looksam_kernels import backend_info
from tests.field.reference import NAMED, Reference

BACKENDS = [name for name in ("reference", "native") if backend_info("cpu")[name].available]
STYLES = ("closure", "two calls")

HYPER: dict[str, dict[str, Any]] = {
    "sam": {"rho": 0.1},
    "asam": {"rho": 0.3, "eta": 0.01},
    "looksam": {"rho": 0.1, "k": 2, "alpha": 0.7},
    "layersam": {"rho": 0.1},
    "looklayersam": {"rho": 0.1, "k": 2, "alpha": 0.7},
    "ssam": {"rho": 0.1},
    "gsam": {"rho": 0.1, "alpha": 0.4},
    "wsam": {"rho": 0.1, "gamma": 0.7},
    "vasso": {"rho": 0.1, "theta": 0.4},
}
"""Of the methods. The reference's WSAM is the coupled one."""

ONLY_OURS: dict[str, dict[str, Any]] = {"wsam": {"decouple": False}}


class WrappedSGD(torch.optim.SGD):
    """torch's class is fused; one derived from it is not."""


class WrappedAdamW(torch.optim.AdamW):
    """torch's class is fused; one derived from it is not."""


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": ("adamw", {"lr": 1e-2}),
    "lamb": ("lamb", {"lr": 1e-2}),
    "adam": ("adam", {"lr": 1e-2, "weight_decay": 1e-2}),
    "adagrad": ("adagrad", {"lr": 1e-1}),
    "rmsprop": ("rmsprop", {"lr": 1e-2, "momentum": 0.9, "centered": True, "eps": 1e-2}),
    "adadelta": ("adadelta", {"lr": 1.0}),
    "lars": ("lars", {"lr": 1.0, "trust_coefficient": 0.1, "weight_decay": 1e-2}),
    "lion": ("lion", {"lr": 1e-3, "weight_decay": 0.1}),
    "wrapped sgd": (WrappedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "wrapped adamw": (WrappedAdamW, {"lr": 1e-2}),
}
MAIN = ("sgd", "adamw", "lamb", "wrapped sgd", "wrapped adamw")

on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_styles = pytest.mark.parametrize("style", STYLES)
PAIRS = [
    *(("looksam", base) for base in MAIN),
    ("sam", "adamw"),
    ("sam", "wrapped adamw"),
    ("layersam", "sgd"),
    ("looklayersam", "lamb"),
    ("vasso", "sgd"),
]
on_pairs = pytest.mark.parametrize(("variant", "base"), PAIRS)

TOLERANCE = 1e-9
"""Of float64 results, absolute and relative. The problems here are smooth, their steps small: a gradient moved by a few units
in the last place moves what comes out by less than a tenth of it (test_the_tolerance), and a fault by 1e-4 or more."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(16, 5, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)


class Side:
    """One of the two models with its optimizer."""

    def __init__(self, model: nn.Module, optimizer: Any, jitter: float = 0.0) -> None:
        self.model, self.optimizer, self.jitter = model, optimizer, jitter
        self.x, self.y = data(next(p.dtype for p in model.parameters() if p.requires_grad))
        self.before_pass: Mapping[int, Callable[[Side], None]] = {}
        self.passes = 0

    @property
    def ours(self) -> bool:
        return isinstance(self.optimizer, looksam.SharpnessAware)

    @property
    def inner(self) -> Any:
        """Whose groups and state users see: ours, or the reference's inner optimizer."""
        return self.optimizer if self.ours else self.optimizer.inner

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def params(self) -> list[Tensor]:
        return [*self.model.parameters()]

    def dicts(self, p: Tensor) -> list[dict[str, Any]]:
        """The dictionaries that hold the state of ``p``: the base's and the method's, which may be one."""
        found = [self.inner.state.get(p)] if self.ours else [self.inner.state.get(p), self.optimizer.kept.get(p)]
        return [d for d in found if d is not None]

    def entries(self, p: Tensor) -> dict[str, Any]:
        """The state of ``p`` by the names that papers and torch use."""
        return {short(name): value for d in self.dicts(p) for name, value in d.items()}

    def set_hyper(self, index: int = 0, **values: Any) -> None:
        """Hyper-parameters of the method, which the reference keeps apart."""
        (self.groups[index] if self.ours else self.optimizer.hyper[index]).update(values)

    def backward(self) -> Tensor:
        """One pass: ``.grad`` begins at None."""
        self.before_pass.get(self.passes, lambda side: None)(self)
        self.passes += 1
        for p in self.params:
            p.grad = None
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        if self.jitter:
            for p in self.params:
                if p.grad is not None:
                    p.grad.mul_(1 + self.jitter * torch.rand_like(p).sub_(0.5))
        return loss

    def step(self, style: str, before_pass: Mapping[int, Callable[[Side], None]] | None = None) -> None:
        """``before_pass``: what happens before the first (0) or the second pass (1) of this step."""
        self.passes, self.before_pass = 0, before_pass or {}
        if style == "closure":
            self.optimizer.step(self.backward)
            return
        self.backward()
        if self.optimizer.first_step():
            self.backward()
            self.optimizer.second_step()


class Pair:
    """Both sides.

    Args:
        variant, base: names of :data:`HYPER` and :data:`BASES`.
        model: makes the model, twice.
        groups: the parameter groups of a model; default: one group of all.
        options: of the base, in place of the table's.
        hyper: of the method, beside the table's.
    """

    def __init__(
        self,
        variant: str,
        base: str | tuple[Any, dict[str, Any]],
        backend: str,
        style: str = "closure",
        model: Callable[[], nn.Module] = network,
        groups: Callable[[nn.Module], list[dict[str, Any]]] = lambda model: [{"params": [*model.parameters()]}],
        hyper: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        optimizer, defaults = BASES[base] if isinstance(base, str) else base
        options = {**defaults, **options}
        own = {**HYPER[variant], **(hyper or {})}
        self.variant, self.backend, self.style = variant, backend, style
        cls = looksam.VARIANTS[variant]
        mine, other = model(), model()
        self.mine = Side(
            mine,
            cls(groups(mine), optimizer, backend=backend, **own, **ONLY_OURS.get(variant, {}), **options),
        )
        self.theirs = Side(other, reference(groups(other), variant, optimizer, own, options))

    def __iter__(self) -> Iterator[Side]:
        return iter((self.mine, self.theirs))

    def both(self, change: Callable[[Side], None]) -> None:
        for side in self:
            change(side)

    def steps(self, number: int, before_pass: Mapping[int, Callable[[Side], None]] | None = None) -> None:
        for _ in range(number):
            self.both(lambda side: side.step(self.style, before_pass))

    def assert_equal(self, state: bool = True) -> None:
        """The weights, and with ``state`` every entry that the reference has."""
        for i, (a, b) in enumerate(zip(self.mine.params, self.theirs.params, strict=True)):
            assert_close(a.detach(), b.detach(), f"parameter {i}")
            if state:
                assert_entries(self.mine.entries(a), self.theirs.entries(b), f"parameter {i}")


def reference(
    groups: list[dict[str, Any]], variant: str, base: Any, hyper: Mapping[str, Any], options: Mapping[str, Any]
) -> Reference:
    own = dict(hyper)
    options = dict(options)
    if base == "lamb":
        own = {"max_grad_norm": options.pop("max_grad_norm", 1.0), **own}
    elif "max_grad_norm" in options and (isinstance(base, str) or base in NAMED.values()):
        own["max_grad_norm"] = options.pop("max_grad_norm")
    return Reference((NAMED[base] if isinstance(base, str) else base)(groups, **options), variant, **own)


def short(name: str) -> str:
    """Our names beside a wrapped class's own may have a prefix."""
    return name.rsplit(".", 1)[-1]


def assert_close(a: Any, b: Any, where: str) -> None:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{where}: {text}")


def assert_entries(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    for name, value in theirs.items():
        if value is None:
            continue
        assert name in mine, f"{where}: no {name} in the state, which has {sorted(mine)}"
        if isinstance(value, Tensor | int | float):
            assert_close(mine[name], value, f"{where}, {name}")
