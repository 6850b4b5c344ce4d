"""The sums of a table: inner products of its columns, row by row."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive, of_rows, reference
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.bucket import Bucket
from looksam_kernels.backends.triton.by_reference import elsewhere
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.layout import Layout, layout_of, numbers_of
from looksam_kernels.backends.triton.upload import as_numbers
from looksam_kernels.formulas import Pair, Sums, kept_norm, stretched
from looksam_kernels.preconditioning import Preconditioner
from looksam_kernels.table import TensorTable


def sums(table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums:
    layout = layout_of(table)
    reading = reading_of(tuple(pairs), moment_of(adaptive))
    layout.update(reading.used)
    return Sums(reading.pairs, sums_with(layout, reading, None, adaptive))


class Reading:
    """What the sums of these pairs take: ``names`` of columns as they stand in the pairs, ``columns`` of the table.

    Args:
        moment: the column that a preconditioner's T is made of.
    """

    def __init__(self, pairs: tuple[Pair, ...], moment: str | None = None) -> None:
        self.pairs = pairs
        self.cached = next((i for i, pair in enumerate(pairs) if kept_norm(pair)), -1)
        """The pair that a column of norms holds."""
        self.norm = (kept_norm(pairs[self.cached]) if self.cached >= 0 else None) or "q_norm_sq"
        names = list(dict.fromkeys(x for i, pair in enumerate(pairs) if i != self.cached for x in pair))
        self.columns = [stretched(x) or x for x in names]
        self.stretched = tuple(stretched(x) is not None for x in names)
        self.places = tuple(
            None if i == self.cached else (names.index(x), names.index(y)) for i, (x, y) in enumerate(pairs)
        )
        with_t, with_norm = any(self.stretched), self.cached >= 0
        self.of_t = moment or "w"
        """The column that T is made of; where it is not w, with g, the ``gradient``-th of the columns."""
        self.gradient = _gradient(self.columns) if moment is not None and with_t else None
        self.used = tuple(
            dict.fromkeys([*self.columns, *([self.of_t] if with_t else []), *(["g", self.norm] if with_norm else [])])
        )


def _gradient(columns: list[str]) -> int:
    if "g" not in columns:
        raise ValueError("a preconditioner's T is made of g: take the sums of Tg together with those of other Tx")
    return columns.index("g")


@functools.lru_cache(maxsize=256)
def reading_of(pairs: tuple[Pair, ...], moment: str | None = None) -> Reading:
    return Reading(pairs, moment)


def moment_of(adaptive: Adaptive) -> str | None:
    return adaptive.column if isinstance(adaptive, Preconditioner) else None


def sums_with(layout: Layout, reading: Reading, known: Tensor | None, adaptive: Adaptive) -> Tensor:
    """The known sums, and then those of the pairs: float64 [known + pairs, rows]."""
    table = layout.table
    known = None if known is None else as_numbers(known)
    before = 0 if known is None else len(known)
    count = before + len(reading.pairs)
    if count == 0:
        return torch.empty(0, len(table), dtype=torch.float64, device=table.device)
    numbers = numbers_of(layout, adaptive) if any(reading.stretched) else None
    buckets, odd = layout.split(reading.used, _any_present(table, reading.used), layout.none)
    if sum(bucket.size for bucket in buckets) == len(table):
        values = torch.empty(count, len(table), dtype=torch.float64, device=table.device)
    else:  # rows that no launch writes
        values = torch.zeros(count, len(table), dtype=torch.float64, device=table.device)
        if known is not None:
            values[:before] = known
    for bucket in buckets:
        partials = layout.scratch("partials", len(reading.pairs), bucket.programs)
        if reading.columns:
            bucket.prepared(_inner_products, reading, numbers is not None)(
                (bucket.programs,),
                table.device,
                layout.addresses(*reading.columns),
                *layout.addresses("w" if numbers is None else reading.of_t),
                numbers,
                partials,
                bucket.chunks,
                layout.sizes,
                len(table),
            )
        bucket.prepared(_add_partials, reading, before)(
            (bucket.size, count),
            table.device,
            values,
            partials,
            known,
            *layout.addresses(reading.norm if reading.cached >= 0 else "w"),
            bucket.members,
            bucket.first_chunk,
            bucket.programs,
            len(table),
        )

    def by_reference(part: TensorTable, rows: list[int]) -> None:
        found = reference.sums(part, reading.pairs, of_rows(adaptive, rows, table.device)).values
        for row, of_row in zip(rows, found.unbind(1), strict=True):
            values[before:, row] = of_row

    elsewhere(table, odd, by_reference)
    return values


def _inner_products(bucket: Bucket, reading: Reading, with_t: bool) -> Launch:
    # A row without g is in no sum of a preconditioned ascent.
    made = with_t and (reading.gradient is None or bucket.dtypes["g"] is not None)
    return Launch(
        gpu.kernels().inner_products,
        TYPES=bucket.types(*reading.columns),
        STRETCHED=tuple(made and x for x in reading.stretched),
        OF_T=bucket.types(reading.of_t)[0] if made else None,
        GRADIENT=reading.gradient if made else None,
        PAIRS=reading.places,
        **bucket.walk(),
    )


def _add_partials(bucket: Bucket, reading: Reading, before: int) -> Launch:
    has_norm = reading.cached >= 0 and bucket.dtypes["g"] is not None
    return Launch(
        gpu.kernels().add_partials,
        KNOWN=before,
        CACHED=before + reading.cached if reading.cached >= 0 else -1,
        NORM=bucket.types(reading.norm)[0] if has_norm else None,
    )


def _any_present(table: TensorTable, columns: Sequence[str]) -> list[bool]:
    """Which rows have a tensor in one of the columns."""
    found = [False] * len(table)
    for column in columns:
        present = table.present(column)
        if table.is_full(column):
            return present
        found = [x or y for x, y in zip(found, present, strict=True)]
    return found
