"""Rules: from sums to coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive, reference
from looksam_kernels.backends.triton import gpu, rules
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.layout import Layout, layout_of
from looksam_kernels.backends.triton.memory import forget_oldest
from looksam_kernels.backends.triton.reductions import moment_of, reading_of, sums_with
from looksam_kernels.backends.triton.rules import Program
from looksam_kernels.backends.triton.tuning import RULE_BLOCK
from looksam_kernels.backends.triton.upload import as_numbers
from looksam_kernels.formulas import (
    ASCENTS,
    DESCENTS,
    Coefficients,
    Groups,
    Hyper,
    Pair,
    Scaling,
    Sums,
    inputs_of,
    keeps_of,
    writes_of,
)
from looksam_kernels.table import TensorTable


class _Hyper(Hyper):
    """Sends the groups' numbers when they change, without waiting for the device."""

    def __init__(self, layout: Layout, groups: Groups, grad_scale: Tensor | None) -> None:
        super().__init__(groups, layout.table.group, layout.device, grad_scale)
        self.layout = layout

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return self.layout.on_device(values, dtype)


def measure(
    table: TensorTable,
    rule: str,
    pairs: Sequence[Pair],
    known: Sums | None,
    groups: Groups,
    adaptive: Adaptive,
    scaling: Scaling,
) -> tuple[Sums, Coefficients]:
    layout, reading = layout_of(table), reading_of(tuple(pairs), moment_of(adaptive))
    every = (*(() if known is None else known.pairs), *pairs)
    found = _rule(layout, rule, every, groups, scaling)
    hyper = layout.update(reading.used, groups, () if found is None else found[0].reads, scaling)
    if known is None or pairs:
        known = Sums(every, sums_with(layout, reading, None if known is None else known.values, adaptive))
    return known, _evaluate(layout, found, hyper, rule, known, groups, scaling)


def coefficients(
    table: TensorTable,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    layout = layout_of(table)
    found = _rule(layout, rule, sums.pairs, groups, scaling)
    hyper = layout.update((), groups, () if found is None else found[0].reads, scaling)
    return _evaluate(layout, found, hyper, rule, sums, groups, scaling)


def _rule(
    layout: Layout, rule: str, pairs: tuple[Pair, ...], groups: Groups, scaling: Scaling
) -> tuple[Program, Launch] | None:
    """The rule's program and the launch that runs it; ``None`` where the reference has to evaluate it."""
    entry = ASCENTS[rule] if rule in ASCENTS else DESCENTS[rule]
    scale, before = scaling.grad_scale, scaling.found_inf
    types = (None if scale is None else scale.dtype, None if before is None else before.dtype)
    key = (rule, pairs, scaling.max_grad_norm is None, scaling.trust_ratio, types)
    known = layout.rules.get(key)
    if known is not None and known[0] is entry and (known[1] is None or known[1][0].fits(groups)):
        return known[1]
    program = rules.program(rule, pairs, groups, scaling)
    found = None
    if program is not None:
        function = rules.function(program.source)
        found = program, Launch(gpu.kernels().evaluate, PAIRS=len(pairs), RULE=function, BLOCK=RULE_BLOCK)
    layout.rules[key] = entry, found
    forget_oldest(layout.rules)
    return found


def _evaluate(
    layout: Layout,
    found: tuple[Program, Launch] | None,
    hyper: Tensor,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    if found is None:
        return reference.evaluate(rule, sums, _Hyper(layout, groups, scaling.grad_scale), scaling)
    (program, launch), device, rows = found, layout.device, len(layout.table)
    scale, before = _number_on(scaling.grad_scale, device), _number_on(scaling.found_inf, device)
    numbers = torch.empty(sum(program.counts), rows, dtype=torch.float64, device=device)
    found_inf = torch.empty((), dtype=torch.float32, device=device)
    launch(
        (1,),
        device,
        as_numbers(sums.values),
        hyper,
        layout.group,
        scale,
        before,
        numbers,
        found_inf,
        rows,
        len(groups),
    )
    only_d = program.counts[0] == len(numbers)
    d, q, post, trust, kept = (numbers,) * 5 if only_d else torch.split_with_sizes(numbers, program.counts)
    return Coefficients(
        inputs_of(rule),
        d,
        q if program.counts[1] else None,
        found_inf,
        post if program.counts[2] else None,
        writes_of(rule) or "q",
        trust[0] if program.counts[3] else None,
        kept[0] if program.counts[4] else None,
        keeps_of(rule) or "",
    )


def _number_on(x: Tensor | None, device: torch.device) -> Tensor | None:
    return x if x is None or (x.device == device and x.dim() == 0) else x.to(device).reshape(())
