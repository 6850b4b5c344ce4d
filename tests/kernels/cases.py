"""The op matrix as data: tables, hyper-parameters, targets, and how far a backend may be from the formula."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from looksam_kernels import TensorTable, backend_info, ops, updates
from looksam_kernels.backends import Adaptive
from looksam_kernels.formulas import Coefficients
from tests.bases import BASES

Columns = dict[str, list[Tensor | None]]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


# Targets ------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    backend: str
    device: str

    @property
    def is_slow(self) -> bool:
        """Triton compiles or interprets for long; the harness of the CUDA kernels runs them thread by thread."""
        return self.backend == "triton" or (self.backend == "native" and "LOOKSAM_HARNESS" in os.environ)


def _targets() -> list[Any]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        pytest.param(Target(name, device), id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in devices
        for name, info in backend_info(device).items()
        if info.available
    ]


TARGETS = _targets()
"""Every backend on every device that it runs on here; Triton on the CPU is its interpreter."""


# Tables -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    memory: str = "contiguous"
    """``contiguous``, ``unaligned`` (one element into its storage), ``channels_last``, or ``strided`` (every other
    element of its storage). ``mixed``: parameters are channels_last, gradients and q contiguous."""
    master: bool = False
    """b is a float32 master copy."""
    absent: tuple[str, ...] = ()
    """Columns with ``None`` in this row."""
    group: int = 0


def _of(dtype: torch.dtype, *shapes: tuple[int, ...], **kwargs: Any) -> list[Row]:
    return [Row(shape, dtype, **kwargs) for shape in shapes]


SMALL = ((3,), (), (33, 5))

CASES: dict[str, list[Row]] = {
    "no tensors": [],
    "shapes": _of(F32, (0,), (1,), (3,), (), (4095,), (4096,), (4097,), (2, 3, 5)),
    "large": _of(F32, (65537,), (7,)),
    "unaligned": [*_of(F32, *SMALL, (4097,), memory="unaligned"), *_of(F32, *SMALL)],
    "channels last": [Row((4, 3, 5, 5), memory=m) for m in ("channels_last", "contiguous", "mixed")],
    "not dense": [*_of(F32, *SMALL, memory="strided"), *_of(F32, *SMALL)],
    "dtypes": [Row(shape, dtype) for shape in ((3,), (), (4097,)) for dtype in (F64, F16, BF16, F32)],
    "master copies": [
        *_of(BF16, *SMALL, (4097,), master=True),
        *_of(F16, *SMALL, master=True),
        Row((64,), F32),
        Row((64,), BF16),
        Row((64,), F16, memory="unaligned", master=True),
    ],
    "groups": [Row((17 + i,), group=i % 3) for i in range(7)],
    "absent": [
        Row((9,), absent=("g",)),
        Row((9,), absent=("s",)),
        Row((9,), absent=("g", "s")),
        Row((9,), absent=("q", "q_norm_sq")),
        Row((9,), absent=("g", "q", "q_norm_sq")),
        Row((9,)),
    ],
}

_SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp_avg_sq": torch.square,
    "sum": torch.square,
    "square_avg": lambda x: x.square() + 1,
    "grad_avg": lambda x: x.tanh() / 2,
    "acc_delta": torch.square,
}
STATES = {state: _SQUARES.get(state, lambda x: x) for base in updates.BASES.values() for state in base.states}
"""The states, made of normal numbers: mean squares are positive, and larger than the squares of means."""
GRADIENTS = ("g", "s")


def columns(rows: Sequence[Row], device: str = "cpu", seed: int = 0) -> Columns:
    """Columns of numbers of size about 1, ``step`` 0, 1, 2, ..., q_norm_sq = ||q||^2."""
    random = torch.Generator().manual_seed(seed)
    made: Columns = {name: [] for name in ("w", "b", *GRADIENTS, "q", *STATES, "step", "q_norm_sq")}
    for index, row in enumerate(rows):
        wide = F32 if row.dtype in (F16, BF16) else row.dtype
        dtypes = {"w": row.dtype, "g": row.dtype, "s": row.dtype, "b": F32 if row.master else row.dtype}
        for name in ("w", "b", *GRADIENTS, "q", *STATES):
            x = torch.randn(row.shape, generator=random, dtype=F64)
            x = STATES[name](x) if name in STATES else x
            memory = row.memory
            if memory == "mixed":
                memory = "contiguous" if name in (*GRADIENTS, "q") else "channels_last"
            made[name].append(place(x.to(dtypes.get(name, wide)), memory, device))
        if row.master:
            made["w"][-1].copy_(made["b"][-1])
        made["step"].append(torch.tensor(float(index), device=device))
        made["q_norm_sq"].append(made["q"][-1].to(F64).square().sum())
        for name in row.absent:
            made[name][-1] = None
    return made


def place(x: Tensor, memory: str, device: str) -> Tensor:
    """A copy of x on the device, laid out as asked."""
    if memory == "channels_last":
        return x.to(device, memory_format=torch.channels_last, copy=True)
    if memory == "unaligned":
        return torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view(x.shape).copy_(x)
    if memory == "strided":
        return torch.zeros(*x.shape, 2, dtype=x.dtype, device=device)[..., 0].copy_(x)
    return x.to(device, copy=True)


def copy(cols: Columns) -> Columns:
    """The same numbers in the same layout in other storage."""
    return {name: [None if x is None else _twin(x) for x in column] for name, column in cols.items()}


def _twin(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    twin = torch.empty(storage.nbytes(), dtype=torch.uint8, device=x.device).untyped_storage()
    twin.copy_(storage)
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(twin, x.storage_offset(), x.size(), x.stride())


def widened(cols: Columns) -> Columns:
    """Everything in float64; a row with a master copy becomes an ordinary row whose w is that copy."""
    wide = {name: [None if x is None else x.to(F64, copy=True) for x in column] for name, column in cols.items()}
    for row, (w, b) in enumerate(zip(cols["w"], cols["b"], strict=True)):
        if b is not None and w is not None and b.dtype != w.dtype:
            wide["w"][row] = b.to(F64)
    return wide


def table(
    rows: Sequence[Row], cols: Columns, backend: str, perturbed: Sequence[bool] | None = None, device: str = "cpu"
) -> TensorTable:
    """device: where it is if it has no rows."""
    made = TensorTable(group=[row.group for row in rows], backend=backend, device=device, **cols)
    if perturbed is not None:
        made.perturbed = list(perturbed)
    return made


def eta(rows: Sequence[Row]) -> list[float | None]:
    """ASAM's T on every other row."""
    return [0.01 * (i + 1) if i % 2 == 0 else None for i in range(len(rows))]


def factor(kind: str | None, rows: Sequence[Row], made: TensorTable) -> Adaptive:
    """What T is: 1, ASAM's, or that of a base's case, of gradients with a loss scale of 4."""
    if kind == "asam":
        return eta(rows)
    if kind is None:
        return None
    name, groups = BASE_CASES[kind]
    return ops.preconditioner(made, name, groups, torch.tensor(4.0, device=made.device))


def kept_elements(keep: float, seed: int, draw: int, row: int, w: Tensor) -> Tensor:
    """The mask of a row."""
    return hashes((0x9E3779B9, seed % 2**32, seed // 2**32, draw, row, 0), w) < round(keep * 2**32)


def hashes(words: Sequence[int], w: Tensor) -> Tensor:
    """The hash of each element of w under these words, the first of which is the start; from the description alone, in NumPy."""

    def mix(x: Any) -> Any:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = np.multiply(x ^ (x >> np.uint32(shift)), np.uint32(factor))
        return x ^ (x >> np.uint32(16))

    key = np.array([words[0]], np.uint32)
    for word in words[1:]:
        key = mix(key ^ np.uint32(word))
    drawn = mix(mix(np.arange(w.numel(), dtype=np.uint32) ^ key) + key).astype(np.int64)
    dense = w.numel() == 0 or 1 + sum((n - 1) * s for n, s in zip(w.shape, w.stride(), strict=True)) == w.numel()
    by_place = sorted(range(w.ndim), key=lambda d: -w.stride(d)) if dense else range(w.ndim)
    shape = [w.shape[d] for d in by_place]
    return torch.from_numpy(drawn).view(shape).permute([*map(list(by_place).index, range(w.ndim))]).to(w.device)


# Hyper-parameters ---------------------------------------------------------------------------------------------------

_SHARED = {
    "perturb_eps": 1e-12,
    "theta": 0.9,
    "sigma": 1.0,
    "lambda_": 0.2,
    "gamma": 0.6,
    "beta": 0.1,
    "momentum": 0.9,
    "normalization": 0.4,
    "strength": 1.7,
    "betas": (0.9, 0.99),
    "layer_scale": "trust_normalized",
}


def _lars(weight_decay: float, always_adapt: bool, trust_clip: bool) -> dict[str, Any]:
    own = {"weight_decay": weight_decay, "always_adapt": always_adapt, "trust_clip": trust_clip}
    return {**own, "trust_coefficient": 0.02, "eps": 1e-3}


RULE_GROUPS: list[dict[str, Any]] = [
    {**_SHARED, **_lars(0.1, False, False), "rho": 0.05, "alpha": 0.7, "lr": 0.01, "layer_scaled": 1.0},
    {**_SHARED, **_lars(0.0, False, True), "rho": 0.2, "alpha": 0.0, "lr": 0.02, "layer_scaled": 0.0, "maximize": True},
    {**_SHARED, **_lars(0.0, True, True), "rho": 0.1, "alpha": 1.3, "lr": 0.03, "layer_scaled": 1.0},
]
"""What the rules read."""


def _three(**options: Any) -> list[dict[str, Any]]:
    """Three groups with different learning rates and decays."""
    return [{**options, "lr": lr, "weight_decay": wd} for lr, wd in ((0.01, 0.1), (0.02, 0.0), (0.003, 0.01))]


BASE_CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{case: (name, _three(**options)) for name, base in BASES.items() for case, options in base.kernels.items()},
    "grad": ("grad", [{}, {}, {}]),
}


class Combination(NamedTuple):
    """Coefficients of each input; a row's are these times 1, 1.25, 1.5, ..."""

    inputs: tuple[str, ...]
    d: tuple[float, ...]
    q: tuple[float, ...] | None = None
    post: tuple[float, ...] | None = None
    writes: str = "q"
    at_w: bool = False
    """Is w where the gradient was taken, or moved away from its backup?"""

    def coefficients(self, rows: Sequence[Row], device: str, found_inf: float = 0.0) -> Coefficients:
        of_row = 1 + torch.arange(len(rows), dtype=F64, device=device) / 4
        d, q, post = (
            None if c is None else torch.tensor(c, dtype=F64, device=device)[:, None] * of_row
            for c in (self.d, self.q, self.post)
        )
        return Coefficients(self.inputs, d, q, torch.tensor(found_inf, device=device), post, self.writes)


def for_base(c: Coefficients, base: str) -> Coefficients:
    """LARS takes its trust ratios from there: 0.5, 0.75, ..."""
    if base != "lars":
        return c
    return c._replace(trust=0.5 + torch.arange(c.d.shape[1], dtype=F64, device=c.d.device) / 4)


COMBINATIONS = {
    "s": Combination(("s",), (1.0,)),
    "s, q = s - c g": Combination(("s", "g"), (1.0, 0.0), q=(1.0, -0.3)),
    "g + c q": Combination(("g", "q"), (0.5, 0.2), at_w=True),
    "g, then w += c (g - s)": Combination(("s", "g"), (0.0, 1.0), post=(-0.01, 0.01)),
    "mean of s and g, q = s": Combination(("s", "g"), (0.2, 0.8), q=(1.0, 0.0)),
    "s + c q, q <- mean of g": Combination(("s", "g", "q"), (1.0, 0.0, 0.3), q=(0.0, 0.1, 0.9)),
    "g + c x, then w += c (g + x + w)": Combination(
        ("g", "exp_avg", "w"), (1.0, 0.1, 0.0), post=(-0.01, 0.03, 0.02), at_w=True
    ),
    "g, then w += c x": Combination(("g", "momentum_buffer"), (1.0, 0.0), post=(0.0, 0.03), at_w=True),
}


def fits(combination: str, base: str) -> bool:
    """One that reads a state, as it was before the step, is for the bases that have it and step in one phase."""
    read = set(COMBINATIONS[combination].inputs) & set(STATES)
    return not read or (read <= set(updates.BASES[base].states) and base != "lamb")


# Tolerances ---------------------------------------------------------------------------------------------------------

FEW_ULPS = 4
"""An element's way through the longest formula (lamb) has about eight roundings, each of half an ulp of a number of
size 1; a backend may contract or reorder any of them."""

CHAIN = 1024
"""The longest run of float32 additions in a chunk: 16 K elements in 16 lanes. Rounding errors of a sum of n terms are
below lambda sqrt(n) u sum |terms| with probability 1 - 2 exp(-lambda^2 / 2) (Higham & Mary 2019), lambda = 4 here."""


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def assert_close(name: str, found: Tensor, baseline: Tensor, truth: Tensor) -> None:
    """error(found) <= 2 error(baseline) + a few ulps.

    ``truth`` is the formula in float64, ``baseline`` the same formula by plain PyTorch in the precision of ``found``.
    Both errors are maxima over the tensor. The baseline's error holds the rounding at the store; the ulps are those of
    the arithmetic, at the largest intermediate: columns hold numbers of size 1, so it is 1 or the result.
    """
    if truth.numel() == 0:
        return
    found, baseline, truth = (x.detach().cpu() for x in (found, baseline, truth))
    ulp = torch.finfo(arithmetic(found.dtype)).eps * max(1.0, truth.abs().max().item())
    error = (found.double() - truth.double()).abs().max().item()
    allowed = 2 * (baseline.double() - truth.double()).abs().max().item() + FEW_ULPS * ulp
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


def sum_tolerance(x: Tensor, y: Tensor, precision: torch.dtype) -> float:
    """For <x, y>: factors, products and additions in a chunk rounded to the precision, the rest in float64."""
    chain = max(1, min(x.numel(), CHAIN))
    unit = torch.finfo(precision).eps / 2
    return 4 * (chain**0.5 + 3) * unit * (x.double() * y.double()).abs().sum().item()


def same_bits(a: Mapping[str, Sequence[Tensor | None]], b: Mapping[str, Sequence[Tensor | None]]) -> bool:
    return all(_bits(x) == _bits(y) for name in a for x, y in zip(a[name], b[name], strict=True))


def _bits(x: Tensor | None) -> bytes | None:
    return None if x is None else x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
