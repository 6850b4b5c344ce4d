"""Rows of one kind, which a launch walks through together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
