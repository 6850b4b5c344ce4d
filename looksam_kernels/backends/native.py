"""C++ on CPU tensors, CUDA on CUDA tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from looksam_kernels import extension
from looksam_kernels.backends import Adaptive, reference
from looksam_kernels.formulas import ASCENTS, DESCENTS, Coefficients, Groups, Pair, Scaling, Sums
from looksam_kernels.masks import Mask
from looksam_kernels.table import TensorTable

_C: Any
_cuda: Any
_why_not: str | None
_why_not_cuda: str | None
_RULES: frozenset[str]


def reload() -> None:
    """Looks for the compiled modules again, after a build."""
    global _C, _why_not, _cuda, _why_not_cuda, _RULES
    _C, _why_not = extension.load(extension.CPU)[:2]
    _cuda, _why_not_cuda = extension.load(extension.CUDA)[:2]
    _RULES = frozenset(_C.rules() if _C is not None else ())


reload()


def unavailable(device: torch.device) -> str | None:
    if _C is None:
        return _why_not
    if device.type == "cuda":
        return _why_not_cuda if _cuda is None else _refusal(device)
    return None if device.type == "cpu" else f"there is no code for {device.type} tensors"


def compiled() -> Any:
    """The compiled module, for what is not of one device; ``None`` where there is none."""
    return _C


def _refusal(device: torch.device) -> str | None:
    """Why this GPU runs none of the kernels: the driver's word on the code that was built, and on the driver itself."""
    try:
        why = _refusal_of(_cuda, torch.cuda.current_device() if device.index is None else device.index)
    except RuntimeError as error:
        why = str(error)
    return None if why is None else why.splitlines()[0]  # torch's own reasons end in advice on debugging


@functools.cache
def _refusal_of(module: Any, index: int) -> str | None:
    why: str | None = module.refusal(index)
    return why


def first_misfit(tensors: list[Tensor | None], weights: list[Tensor | None], scalar: bool) -> int:
    """The first row whose tensor may not fit its parameter (``scalar``: may not be 0-dim), or -1."""
    return _C.first_misfit(tensors, weights, scalar)


def take_gradients(table: TensorTable, column: str, params: Sequence[Tensor]) -> Any:
    """Sets a column to ``p.grad`` of each, at once: True where all have one, else a flag for each; ``None`` where a list is
    to be made instead."""
    native = _synced(table)
    return native.take_gradients(column, params) if hasattr(native, "take_gradients") else None


def sums(table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums:
    return Sums(tuple(pairs), _synced(table).sums(pairs, adaptive))


def coefficients(
    table: TensorTable,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    native = _synced(table)
    if not _evaluates(native, rule, groups, scaling):
        return reference.coefficients(table, rule, sums, groups, scaling)
    return _named(rule, native.coefficients(rule, sums.pairs, sums.values, groups, *scaling))


def measure(
    table: TensorTable,
    rule: str,
    pairs: Sequence[Pair],
    known: Sums | None,
    groups: Groups,
    adaptive: Adaptive,
    scaling: Scaling,
) -> tuple[Sums, Coefficients]:
    native = _synced(table)
    if not _evaluates(native, rule, groups, scaling):
        found = sums(table, pairs, adaptive)
        found = found if known is None else known + found
        return found, coefficients(table, rule, found, groups, scaling)
    values, scalars = native.measure(rule, pairs, known, groups, adaptive, *scaling)
    all_pairs = (known.pairs if known is not None else ()) + tuple(pairs)
    return Sums(all_pairs, values), _named(rule, scalars)


def measure_and_perturb(
    table: TensorTable,
    rule: str,
    pairs: Sequence[Pair],
    known: Sums | None,
    groups: Groups,
    adaptive: Adaptive,
    scaling: Scaling,
    mask: Mask | None,
) -> tuple[Sums, Tensor] | None:
    native = _synced(table)
    if rule not in _RULES or not hasattr(native, "measure_and_perturb"):
        return None
    key, threshold = (0, 0) if mask is None else (mask.key, mask.threshold)
    values, found_inf = native.measure_and_perturb(
        rule, pairs, known, groups, adaptive, *scaling, key, threshold, table.perturbed
    )
    return Sums((known.pairs if known is not None else ()) + tuple(pairs), values), found_inf


def measure_and_step(
    table: TensorTable,
    rule: str,
    pairs: Sequence[Pair],
    known: Sums | None,
    groups: Groups,
    scaling: Scaling,
    base: str,
    check: bool,
) -> Tensor | None:
    native = _synced(table)
    if rule not in _RULES or not hasattr(native, "measure_and_step"):
        return None
    writes = DESCENTS[rule].writes or "q"
    return native.measure_and_step(rule, pairs, known, groups, *scaling, base, writes, check, table.perturbed)


def perturb(table: TensorTable, coefficients: Coefficients, adaptive: Adaptive, mask: Mask | None) -> None:
    key, threshold = (0, 0) if mask is None else (mask.key, mask.threshold)
    _synced(table).perturb(coefficients.inputs, coefficients.d, adaptive, key, threshold, table.perturbed)


def step(table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
    _synced(table).step(base, *coefficients[:7], groups, table.perturbed)  # what is kept, ops.py writes


def restore(table: TensorTable) -> None:
    _synced(table).restore(table.perturbed)


def forget(table: TensorTable, column: str) -> None:
    """The C++ table holds tensors, too."""
    if table.handle is not None:
        table.handle.set(column, None)
        table.dirty.discard(column)


def _named(rule: str, scalars: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]) -> Coefficients:
    d, q, found_inf, post, trust = scalars
    if rule in ASCENTS:
        return Coefficients(ASCENTS[rule].inputs, d, q, found_inf)
    return Coefficients(DESCENTS[rule].inputs, d, q, found_inf, post, DESCENTS[rule].writes or "q", trust)


def _evaluates(native: Any, rule: str, groups: Groups, scaling: Scaling) -> bool:
    """False where the formulas must run as torch operations: for rules that are written in Python alone, and for a rule's
    hyper-parameters on the GPU, or very many groups."""
    if rule not in _RULES:
        return False
    return not hasattr(native, "evaluates") or native.evaluates(rule, groups, scaling.trust_ratio)


def _synced(table: TensorTable) -> Any:
    """The C++ table, with the columns that were set since the last op."""
    if table.handle is None:
        table.handle = (_cuda if table.device.type == "cuda" else _C).Table(table.group, str(table.device))
        if table.rounding is not None:
            table.handle.round_stochastically(table.rounding.key)
    for name in table.dirty:
        table.handle.set(name, table[name] if name in table else None)
    table.dirty.clear()
    return table.handle
