"""Rows of one kind, which a launch walks through together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.backends.triton.columns import Column
from looksam_kernels.table import holds_scalars


class Bucket(NamedTuple):
    size: int
    """How many rows it has."""
    members: Tensor
    """They, int32."""
    chunks: Tensor
    """int32 [2, programs]: the row of each program, and which of the row's chunks it is."""
    first_chunk: Tensor
    """int32 [members + 1]: the programs of the k-th member are those from first_chunk[k] to first_chunk[k + 1]."""
    chunk: int
    """Elements of a program."""
    programs: int
    """How many chunks."""
    dtypes: dict[str, torch.dtype | None]
    aligned: bool
    from_b: bool
    launches: dict[Any, Any]
    """Prepared for this bucket, by what has made them."""

    def types(self, *columns: str) -> tuple[Any, ...]:
        """Triton's names of the columns' element types, ``None`` where the column is not there."""
        import triton.language as tl

        names = {
            torch.float64: tl.float64,
            torch.float32: tl.float32,
            torch.float16: tl.float16,
            torch.bfloat16: tl.bfloat16,
            None: None,
        }
        return tuple(names[self.dtypes[column]] for column in columns)

    def prepared(self, make: Callable[..., Any], *how: Any) -> Any:
        """``make(bucket, *how)``, made once."""
        key = (make, *how)
        if key not in self.launches:
            self.launches[key] = make(self, *how)
        return self.launches[key]

    @property
    def master(self) -> bool:
        """Is b a master copy?"""
        return self.dtypes["b"] not in (None, self.dtypes["w"])

    def walk(self) -> dict[str, Any]:
        """The constexprs of every kernel that walks through chunks."""
        import triton.language as tl

        wide = torch.float64 in (self.dtypes["w"], self.dtypes["b"])
        return {"ACC": tl.float64 if wide else tl.float32, "ALIGNED": self.aligned, "CHUNK": self.chunk}


Dtypes = tuple[tuple[str, torch.dtype | None], ...]
"""By column."""


def alike_rows(
    columns: Mapping[str, Column], names: Sequence[str], from_b: Sequence[bool], rows: Sequence[int]
) -> tuple[dict[tuple[Dtypes, bool, bool], list[int]], list[int]]:
    """The rows of each kind by (types, aligned, from b), and those that no kernel can walk through."""
    alike: dict[tuple[Dtypes, bool, bool], list[int]] = {}
    odd = []
    for row in rows:
        traits = {name: c.traits[row] for name, c in columns.items() if name in ("w", *names) or from_b[row]}
        walked = [t for name, t in traits.items() if t is not None and not holds_scalars(name)]
        orders = {t.order for t in walked}
        if len(orders) > 1 or None in orders:
            odd.append(row)
            continue
        dtypes = tuple((name, t.dtype if (t := traits.get(name)) else None) for name in columns)
        alike.setdefault((dtypes, all(t.aligned for t in walked), from_b[row]), []).append(row)
    return alike, odd


def places_of(members: Sequence[int], chunks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """``members``, ``chunks`` and ``first_chunk`` of a bucket, of how many chunks each member has."""
    counts, rows = torch.tensor(chunks), torch.tensor(members)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    place = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
    return rows, torch.stack([rows.repeat_interleave(counts), place]), first
