"""Moves the weights, and back."""

from __future__ import annotations

from typing import Any

import torch

from looksam_kernels.backends import Adaptive, reference
from looksam_kernels.backends import of_rows as t_of_rows
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.bucket import Bucket
from looksam_kernels.backends.triton.by_reference import elsewhere, of_rows
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.layout import Layout, layout_of, numbers_of
from looksam_kernels.formulas import Coefficients
from looksam_kernels.masks import Mask
from looksam_kernels.preconditioning import Preconditioner
from looksam_kernels.table import TensorTable


def perturb(table: TensorTable, coefficients: Coefficients, adaptive: Adaptive, mask: Mask | None) -> None:
    layout, inputs = layout_of(table), coefficients.inputs
    takes_part = table.present(inputs[0])
    v = adaptive.column if isinstance(adaptive, Preconditioner) else None
    count = () if table.rounding is None else ("step",)
    read = (*inputs, *count) if v is None else (*inputs, v, *count)
    layout.update(read)
    buckets, odd = layout.split(("b", *read), takes_part, rows_from_b(layout))
    c, numbers = coefficients.d.contiguous(), numbers_of(layout, adaptive)
    key, threshold = (0, 0) if mask is None else (_int32(mask.key), _int32(mask.threshold))
    for bucket in buckets:
        bucket.prepared(_perturb, inputs, numbers is not None, v, mask is not None, table.rounding is not None)(
            (bucket.programs,),
            table.device,
            *layout.addresses("w", "b"),
            layout.addresses(*inputs),
            c,
            *layout.addresses("w" if v is None else v),
            numbers,
            key,
            threshold,
            rounding_key(table),
            *layout.addresses(*count or ("w",)),
            bucket.chunks,
            layout.sizes,
            len(table),
        )

    def by_reference(part: TensorTable, rows: list[int]) -> None:
        reference.perturb(part, of_rows(coefficients, rows), t_of_rows(adaptive, rows, table.device), mask, rows)

    elsewhere(table, odd, by_reference)
    if any(table.perturbed):
        table.perturbed = [moved or part for moved, part in zip(table.perturbed, takes_part, strict=True)]
    else:
        table.perturbed = list(takes_part)


def _perturb(
    bucket: Bucket, inputs: tuple[str, ...], with_t: bool, v: str | None, masked: bool, rounded: bool
) -> Launch:
    w, b, *types = bucket.types("w", "b", *inputs)
    return Launch(
        gpu.kernels().perturb,
        W=w,
        B=b,
        TYPES=tuple(types),
        FROM_B=bucket.from_b,
        STRETCHED=with_t and v is None,
        V=None if v is None else bucket.types(v)[0],
        MASKED=masked,
        ROUNDED=type_of_count(bucket) if rounded else None,
        **bucket.walk(),
    )


def type_of_count(bucket: Bucket) -> Any:
    """Of ``step`` where weights are rounded stochastically, in a table whose weights of bfloat16 are."""
    rounds = bucket.dtypes["w"] == torch.bfloat16 and not bucket.master
    return bucket.types("step")[0] if rounds else None


def rounding_key(table: TensorTable) -> int:
    return 0 if table.rounding is None else _int32(table.rounding.key)


def rows_from_b(layout: Layout) -> list[bool]:
    """Which rows start from b: those that are perturbed, and those with a master copy."""
    moved, masters = layout.table.perturbed, layout.masters()
    if not any(moved):
        return masters
    return layout.every if all(moved) else [x or y for x, y in zip(moved, masters, strict=True)]


def _int32(word: int) -> int:
    """32 bits as the signed number that every kernel takes without being compiled again for larger ones."""
    return word - 2**32 if word >= 2**31 else word


def restore(table: TensorTable) -> None:
    restore_rows(table, table.perturbed)


def restore_rows(table: TensorTable, rows: list[bool]) -> None:
    if not any(rows):
        return
    layout = layout_of(table)
    layout.update(())
    buckets, odd = layout.split(("b",), chosen := list(rows), chosen)
    for bucket in buckets:
        bucket.prepared(_restoring)(
            (bucket.programs,),
            table.device,
            *layout.addresses("w", "b"),
            bucket.chunks,
            layout.sizes,
        )
    elsewhere(table, odd, lambda part, _: reference.restore(part))


def _restoring(bucket: Bucket) -> Launch:
    w, b = bucket.types("w", "b")
    return Launch(gpu.kernels().restore, W=w, B=b, ALIGNED=bucket.aligned, CHUNK=bucket.chunk)
