"""What the tests of this folder minimise: a smooth function whose gradient is written by hand, of awkward tensors.

L(w) = sum_p [ sum(a (w - c)^2) / 2 + sum(b w^4) / 4 ] + S^2 / 2,  S = sum_p sum(u tanh(w)), over the tensors that are
there on this step and in this pass. S couples all tensors, so no gradient is parallel to the one at w + e.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import Parameter

SHAPES = {
    "matrix": (3, 4),
    "vector": (5,),
    "scalar": (),
    "empty": (0,),
    "kernel": (2, 3, 2),
    "never": (3,),
    "flat": (4,),
    "first_only": (2, 2),
    "second_only": (3,),
    "some_steps": (4, 2),
    "lost": (2, 3),
    "from_zero": (3,),
    "empty_matrix": (0, 3),
}
"""Which tensors there are. ``flat``: the gradient is zero. ``from_zero``: the weights begin at zero."""

GROUPS = (
    ("matrix", "vector", "scalar", "empty"),
    ("kernel", "never", "flat", "first_only", "second_only"),
    ("some_steps", "lost", "from_zero", "empty_matrix"),
)


def present(name: str, step: int, number: int) -> bool:
    """Does this tensor have a gradient in pass ``number`` (1 or 2) of this step?"""
    return {
        "never": False,
        "first_only": number == 1,
        "second_only": number == 2,
        "some_steps": step % 4 != 1,  # 1 and 5 are reuse or plain steps, 9 is a sharp one
        "lost": not (number == 2 and step in (0, 6)),  # before it has a q, and when it has one
    }.get(name, True)


class Problem:
    def __init__(
        self, seed: int = 0, names: tuple[str, ...] = tuple(SHAPES), dtype: torch.dtype = torch.float64
    ) -> None:
        rng = np.random.default_rng(seed)
        self.names = names
        self.dtype = dtype
        numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self.w, self.a, self.b, self.c, self.u = [], [], [], [], []
        for name in names:
            shape = SHAPES[name]
            draws = [rng.standard_normal(shape), rng.uniform(0.2, 2, shape), rng.uniform(0, 0.3, shape)]
            draws += [rng.standard_normal(shape), 0.5 * rng.standard_normal(shape)]
            if name == "from_zero":
                draws[0] = 0 * draws[0]
            if name == "flat":
                draws[1:] = [0 * x for x in draws[1:]]
            # In single precision both sides must begin from the same numbers.
            rounded = [np.asarray(x).astype(numpy_dtype).astype(np.float64) for x in draws]
            for column, x in zip((self.w, self.a, self.b, self.c, self.u), rounded, strict=True):
                column.append(x)

        columns = zip(self.a, self.b, self.c, self.u, strict=True)
        self.constants = [[torch.tensor(x, dtype=dtype) for x in row] for row in columns]

    def gradients(
        self, w: list[np.ndarray], step: int, number: int, jitter: Callable[[np.ndarray], np.ndarray] = lambda x: x
    ) -> list[np.ndarray | None]:
        """By hand. ``jitter`` moves every term, because what rounding leaves of a sum is in proportion to its terms."""
        here = [present(name, step, number) for name in self.names]
        t = [jitter(np.tanh(x)) for x in w]
        total = sum(np.sum(jitter(u * tp)) for u, tp, on in zip(self.u, t, here, strict=True) if on)
        return [
            jitter(a * (x - c)) + jitter(b * x**3) + jitter(total * u * (1 - tp**2)) if on else None
            for x, tp, a, b, c, u, on in zip(w, t, self.a, self.b, self.c, self.u, here, strict=True)
        ]

    def parameters(self) -> list[Parameter]:
        return [Parameter(torch.tensor(x, dtype=self.dtype)) for x in self.w]

    def loss(self, params: list[Parameter], step: int = 0, number: int = 1) -> torch.Tensor:
        """For autograd. A tensor that is not there does not occur."""
        total, coupled = torch.zeros((), dtype=self.dtype), torch.zeros((), dtype=self.dtype)
        for i, (name, p) in enumerate(zip(self.names, params, strict=True)):
            if present(name, step, number):
                a, b, c, u = self.constants[i]
                total = total + (a * (p - c) ** 2).sum() / 2 + (b * p**4).sum() / 4
                coupled = coupled + (u * p.tanh()).sum()
        return total + coupled**2 / 2

    def groups(self, params: list[Parameter], hyper: list[dict]) -> list[dict]:
        """torch's param groups; the tensors of GROUPS that this problem has, each group with its hyper-parameters."""
        by_name = dict(zip(self.names, params, strict=True))
        groups = [
            {"params": [by_name[n] for n in names if n in by_name], **h} for names, h in zip(GROUPS, hyper, strict=True)
        ]
        return [group for group in groups if group["params"]]

    def hyper(self, hyper: list[dict]) -> list[dict]:
        """The same for Independent: one dict a tensor."""
        return [next(h for names, h in zip(GROUPS, hyper, strict=True) if name in names) for name in self.names]


class Closure:
    """zero_grad, loss, backward. Counts its calls; knows which pass of which step it is from the optimizer's promise."""

    def __init__(
        self, problem: Problem, params: list[Parameter], k: int = 1, on_call: Callable[[int], None] | None = None
    ) -> None:
        self.problem, self.params, self.k, self.on_call = problem, params, k, on_call
        self.calls = 0
        self.step, self.number = 0, 1

    def begin(self, step: int) -> Closure:
        self.step, self.number = step, 0
        return self

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        self.number += 1
        for p in self.params:
            p.grad = None
        loss = self.problem.loss(self.params, self.step, self.number)
        loss.backward()
        if self.on_call:
            self.on_call(self.number)
        return loss.detach()
