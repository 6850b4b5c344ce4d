"""The sums of a table: inner products of its columns, row by row."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive, reference
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.bucket import Bucket
from looksam_kernels.backends.triton.by_reference import elsewhere
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.layout import Layout, eta_of, layout_of
from looksam_kernels.backends.triton.upload import as_numbers
from looksam_kernels.formulas import Pair, Sums, kept_norm, stretched
from looksam_kernels.table import TensorTable


def sums(table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums:
    layout = layout_of(table)
    reading = reading_of(tuple(pairs))
    layout.update(reading.used)
    return Sums(reading.pairs, sums_with(layout, reading, None, adaptive))


class Reading:
    """What the sums of these pairs take: ``names`` of columns as they stand in the pairs, ``columns`` of the table."""

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
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
        self.used = tuple(
            dict.fromkeys([*self.columns, *(["w"] if with_t else []), *(["g", self.norm] if with_norm else [])])
        )


@functools.lru_cache(maxsize=256)
def reading_of(pairs: tuple[Pair, ...]) -> Reading:
    return Reading(pairs)


def sums_with(layout: Layout, reading: Reading, known: Tensor | None, adaptive: Adaptive) -> Tensor:
    """The known sums, and then those of the pairs: float64 [known + pairs, rows]."""
    table = layout.table
    known = None if known is None else as_numbers(known)
    before = 0 if known is None else len(known)
    count = before + len(reading.pairs)
    if count == 0:
        return torch.empty(0, len(table), dtype=torch.float64, device=table.device)
    eta = eta_of(layout, adaptive) if any(reading.stretched) else None
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
            bucket.prepared(_inner_products, reading, eta is not None)(
                (bucket.programs,),
                table.device,
                layout.addresses(*reading.columns),
                *layout.addresses("w"),
                eta,
                partials,
                bucket.chunks,
                layout.sizes,
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
        eta_of_part = None if adaptive is None else [adaptive[row] for row in rows]
        found = reference.sums(part, reading.pairs, eta_of_part).values
        for row, of_row in zip(rows, found.unbind(1), strict=True):
            values[before:, row] = of_row

    elsewhere(table, odd, by_reference)
    return values


def _inner_products(bucket: Bucket, reading: Reading, with_t: bool) -> Launch:
    return Launch(
        gpu.kernels().inner_products,
        TYPES=bucket.types(*reading.columns),
        STRETCHED=tuple(with_t and x for x in reading.stretched),
        W=bucket.types("w")[0],
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
