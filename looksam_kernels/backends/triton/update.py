"""The base update."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from looksam_kernels.backends import reference
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.bucket import Bucket
from looksam_kernels.backends.triton.by_reference import elsewhere, of_rows
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.layout import Layout, layout_of
from looksam_kernels.backends.triton.perturbation import restore_rows, rounding_key, rows_from_b, type_of_count
from looksam_kernels.backends.triton.rules import Read
from looksam_kernels.backends.triton.tuning import ROWS_BLOCK
from looksam_kernels.formulas import Coefficients, Groups
from looksam_kernels.table import TensorTable
from looksam_kernels.updates import BASES, hyper_of


def step(table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
    inputs = coefficients.inputs
    takes_part = table.present(inputs[0])
    if not table.is_full(inputs[0]) and any(table.perturbed):
        restore_rows(table, [moved and not part for moved, part in zip(table.perturbed, takes_part, strict=True)])
    layout = layout_of(table)
    used = _columns_of(base, inputs, None if coefficients.q is None else coefficients.writes)
    hyper = layout.update(used, groups, _reads_of(base))
    buckets, odd = layout.split(used, takes_part, rows_from_b(layout))
    for bucket in buckets:
        _step(layout, bucket, base, coefficients, hyper, len(groups))
    elsewhere(table, odd, lambda part, rows: reference.step(part, base, of_rows(coefficients, rows), groups))


@functools.cache
def _columns_of(base: str, inputs: tuple[str, ...], writes: str | None) -> tuple[str, ...]:
    written = [] if writes is None else [writes, f"{writes}_norm_sq"]
    return (*inputs, *written, *BASES[base].states, *(["step"] if base != "grad" else []))


@functools.cache
def _reads_of(base: str) -> tuple[Read, ...]:
    return tuple(Read(name, hyper_of) for name in BASES[base].read)


class _StepLaunches(NamedTuple):
    advance: Launch
    step: Launch
    finish: Launch
    apply: Launch
    keeps_norm: bool


def _step_launches(
    bucket: Bucket, base: str, inputs: tuple[str, ...], writes: str | None, rounded: bool
) -> _StepLaunches:
    kernels, update = gpu.kernels(), gpu.kernels().UPDATES[base]
    w, b = bucket.types("w", "b")
    norm = None if writes is None else bucket.types(f"{writes}_norm_sq")[0]
    two_phases = base == "lamb"
    numbers = {"HYPER": len(BASES[base].read), "FACTORS": update.factors}
    tensors = {"INPUTS": bucket.types(*inputs), "STATES": bucket.types(*BASES[base].states)}
    origin = {"W": w, "B": b, "FROM_B": bucket.from_b, "MASTER": bucket.master}
    origin["ROUNDED"] = type_of_count(bucket) if rounded and base != "grad" else None
    return _StepLaunches(
        Launch(
            kernels.advance,
            STEP=bucket.types("step")[0] if base != "grad" else None,
            MAKE_FACTORS=update.make_factors,
            HYPER=len(BASES[base].read),
            BLOCK=ROWS_BLOCK,
        ),
        Launch(
            kernels.step,
            UPDATE=update.update,
            TWO_PHASES=two_phases,
            Q=None if writes is None else bucket.types(writes)[0],
            **numbers,
            **origin,
            **tensors,
            **bucket.walk(),
        ),
        Launch(kernels.finish_step, NORM=norm, TWO_PHASES=two_phases),
        Launch(kernels.apply_lamb, **numbers, **origin, **tensors, **bucket.walk()),
        norm is not None,
    )


def _step(layout: Layout, bucket: Bucket, base: str, coefficients: Coefficients, hyper: Tensor, groups: int) -> None:
    device, rows = layout.device, len(layout.table)
    inputs, states = coefficients.inputs, BASES[base].states
    c, c_q, c_post = (
        None if x is None else x.contiguous() for x in (coefficients.d, coefficients.q, coefficients.post)
    )
    writes = None if c_q is None else coefficients.writes
    rounded = layout.table.rounding is not None
    launches: _StepLaunches = bucket.prepared(_step_launches, base, inputs, writes, rounded)
    key, (count,) = rounding_key(layout.table), layout.addresses("step" if base != "grad" else "w")
    found_inf, trust = coefficients.found_inf, coefficients.trust
    two_phases, factor_count = base == "lamb", gpu.kernels().UPDATES[base].factors
    factors = layout.scratch("factors", factor_count, rows)
    partials = layout.scratch("partials", 3, bucket.programs)
    w, b = layout.addresses("w", "b")
    of_inputs, of_states = layout.addresses(*inputs), layout.addresses(*states)
    q, norm = layout.addresses(writes, f"{writes}_norm_sq") if writes is not None else (w, w)

    if base != "grad":
        launches.advance(
            (-(-bucket.size // ROWS_BLOCK),),
            device,
            count,
            factors,
            bucket.members,
            hyper,
            layout.group,
            found_inf,
            bucket.size,
            rows,
            groups,
        )
    launches.step(
        (bucket.programs,),
        device,
        w,
        b,
        of_inputs,
        q,
        of_states,
        c,
        c_q,
        c_post,
        trust,
        found_inf,
        factors,
        hyper,
        layout.group,
        partials,
        key,
        count,
        bucket.chunks,
        layout.sizes,
        rows,
        groups,
    )
    if not launches.keeps_norm and not two_phases:
        return
    trust_ratio = layout.scratch("trust ratio", rows)
    launches.finish(
        (bucket.size,),
        device,
        norm,
        trust_ratio,
        partials,
        hyper,
        layout.group,
        found_inf,
        bucket.members,
        bucket.first_chunk,
        bucket.programs,
        groups,
    )
    if two_phases:
        launches.apply(
            (bucket.programs,),
            device,
            w,
            b,
            of_inputs,
            of_states,
            c_post,
            found_inf,
            factors,
            trust_ratio,
            hyper,
            layout.group,
            key,
            count,
            bucket.chunks,
            layout.sizes,
            rows,
            groups,
        )
