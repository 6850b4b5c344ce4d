"""Triton: for GPUs without a compiled extension, NVIDIA's and AMD's. The kernels stand in ``triton_kernels``.

On a machine without a GPU the kernels run on CPU tensors in Triton's interpreter, for tests, and only when asked for.

Rows of the same element types, with the same columns present, form a *bucket*; each op is one to four launches a
bucket. Rows that no kernel can walk through (not dense, or laid out differently from column to column) take the
reference. The coefficients are formulas.py on device tensors: nothing waits for the device, and every rule has its
formula in one place.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive, reference
from looksam_kernels.formulas import Coefficients, Groups, Hyper, Pair, Scaling, Sums, kept_norm, stretched
from looksam_kernels.masks import Mask
from looksam_kernels.table import TensorTable, holds_scalars
from looksam_kernels.updates import BASES, hyper_of

CHUNK = 2048
"""Elements of a program, a power of two: 8 a thread, one 16-byte word of bfloat16. With 16 Triton 3.6 spills registers."""
THREADS = 256
ROWS_BLOCK = 128
"""Rows of a program of ``advance``."""
OLDEST = (3, 6)
"""The first Triton that has what the kernels use."""


# Where it runs --------------------------------------------------------------------------------------------------------


def unavailable(device: torch.device) -> str | None:
    if (why := _not_usable()) is not None:
        return why
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU with a driver here"
        return "TRITON_INTERPRET is set, and the interpreter runs on CPU tensors only" if _interpreting() else None
    if device.type != "cpu":
        return f"Triton has no code for {device.type} tensors"
    if torch.cuda.is_available() and not _interpreting():
        return "its kernels are compiled for the GPU here; with TRITON_INTERPRET=1 they run on CPU tensors"
    if "triton" in sys.modules and not _interpreting():
        return "triton was imported before TRITON_INTERPRET=1 was set: there is no GPU, so only its interpreter can run"
    return None


@functools.cache
def _not_usable() -> str | None:
    """Why, if so. PyTorch 2.6 installs Triton 3.2. Triton is not imported here: after that it could not be told any more
    to interpret."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "the package triton is not installed"
    source = Path(spec.origin).read_text() if spec.origin else ""
    found = re.search(r"""^__version__ = ['"](\d+)\.(\d+)""", source, re.MULTILINE)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST:
        return f"triton {found[1]}.{found[2]} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    return None


def only_on_request(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "runs in Triton's interpreter, which is slow and meant for tests; only when asked for"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _kernels() -> ModuleType:
    """Imported late: whether kernels are compiled or interpreted is settled when triton is first imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if _interpreting():
        warnings.warn(
            "the Triton kernels run in Triton's interpreter: slow, for tests only", RuntimeWarning, stacklevel=2
        )
    from looksam_kernels.backends import triton_kernels

    return triton_kernels


# A table on the device ------------------------------------------------------------------------------------------------


class _Trait(NamedTuple):
    """What the kernels must know of a tensor at compile time, and of its strides."""

    dtype: torch.dtype
    aligned: bool
    order: tuple[int, ...] | None


class _Column(NamedTuple):
    seen: list[Any]
    """Address, dtype and strides of each row when it was last looked at."""
    traits: tuple[_Trait | None, ...]
    kind: int
    """A number for the traits: columns with the same traits have the same."""
    addresses: Tensor


class _Bucket(NamedTuple):
    members: Tensor
    """Its rows, int32."""
    chunks: Tensor
    """int32 [2, programs]: the row of each program, and which of the row's chunks it is."""
    first_chunk: Tensor
    """int32 [members + 1]: the programs of the k-th member are those from first_chunk[k] to first_chunk[k + 1]."""
    dtypes: dict[str, torch.dtype | None]
    aligned: bool
    from_b: bool

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

    @property
    def programs(self) -> int:
        return self.chunks.shape[1]

    @property
    def master(self) -> bool:
        """Is b a master copy?"""
        return self.dtypes["b"] not in (None, self.dtypes["w"])

    def walk(self) -> dict[str, Any]:
        """The constexprs of every kernel that walks through chunks."""
        import triton.language as tl

        wide = torch.float64 in (self.dtypes["w"], self.dtypes["b"])
        return {"ACC": tl.float64 if wide else tl.float32, "ALIGNED": self.aligned, "CHUNK": CHUNK}


class _Graphs:
    """What captured CUDA graphs of a table read when they are replayed. They do not say when they end: it is kept as long as
    the table. A graph that is captured again, from the same tensors, needs nothing more."""

    COLUMNS = 64
    """Columns of addresses that captures may lack before the next eager op; besides, the places of all chunks."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._sources: dict[Any, Tensor] = {}
        """Page-locked numbers that a copy within a graph reads."""
        self._room = torch.empty(0, dtype=torch.uint8)

    def hold(self, x: Tensor) -> None:
        """Something that an eager op has put on the device, where it is never written again."""
        self._held[x.data_ptr()] = x

    def reserve(self, size: int, device: torch.device) -> None:
        """At least half as many bytes of page-locked memory, which torch before 2.8 does not allocate in a capture."""
        if len(self._room) < size // 2:
            self._room = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def send(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy on the device that is made anew in every replay."""
        key = (x.dtype, x.shape, tuple(x.flatten().tolist()))
        if key not in self._sources:
            size = x.numel() * x.element_size()
            if size > len(self._room):
                raise RuntimeError(
                    f"the graphs captured since the last eager step read {size} bytes more of addresses than the Triton "
                    "backend has page-locked memory for; take an eager step between captures"
                )
            self._sources[key] = self._room[:size].view(x.dtype).view(x.shape).copy_(x)
            self._room = self._room[-(-size // 8) * 8 :]
        return self._sources[key].to(device, non_blocking=True, copy=True)


class _Layout:
    """Where the tensors of a table are, as far as the device must know. Made anew when a parameter moves.

    What is on the device is not written again: new numbers get new memory, and a graph holds on to the old. What is first
    seen in a capture is copied in the graph and forgotten after the op, since the next may be another graph's.
    """

    def __init__(self, table: TensorTable, graphs: _Graphs) -> None:
        self.table, self.device, self.graphs = table, table.device, graphs
        self.capturing = False
        """Is the op under way being captured?"""
        self.stream: Any = None
        self.streams: set[Any] = set()
        """On which ops ran: memory belongs to one, and may be given up while another still reads it."""
        self.w = [w.data_ptr() for w in table["w"]]
        self.columns: dict[str, _Column] = {}
        self.seen_in_capture: dict[str, _Column] = {}
        """By the op under way."""
        self.kinds: OrderedDict[Any, int] = OrderedDict()
        self.new_kind = itertools.count()
        self.buckets: OrderedDict[Any, tuple[list[_Bucket], list[int]]] = OrderedDict()
        self.copies: OrderedDict[Any, Tensor] = OrderedDict()
        self.numel = [w.numel() for w in table["w"]]
        self.sizes = self.on_device(self.numel, torch.int64)
        self.group = self.on_device(table.group, torch.int32)

    def begin(self, capturing: bool) -> None:
        """An op."""
        self.capturing = capturing
        self.seen_in_capture.clear()
        self.stream = _stream(self.device)
        self.streams.add(self.stream)
        if not capturing:
            chunks = sum(-(-n // CHUNK) for n in self.numel)
            self.graphs.reserve(8 * (_Graphs.COLUMNS * len(self.numel) + chunks), self.device)
        self.read(self.sizes, self.group)

    def read(self, *kept: Tensor) -> None:
        """The op under way reads memory that may be given up before it has run."""
        for x in kept:
            if self.capturing:
                self.graphs.hold(x)
            elif len(self.streams) > 1:
                x.record_stream(self.stream)

    def on_device(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers on the device, sent when they change."""
        key = (dtype, tuple(values))
        if key in self.copies:
            self.read(self.copies[key])
            return self.copies[key]
        copy = self.send(torch.tensor(values, dtype=dtype))
        if not self.capturing:
            self.copies[key] = copy
            _forget_oldest(self.copies)
        return copy

    def send(self, x: Tensor) -> Tensor:
        """A copy on the device, without waiting for it."""
        if self.capturing:
            return self.graphs.send(x, self.device)
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def column(self, name: str) -> _Column:
        if name in self.seen_in_capture:
            return self.seen_in_capture[name]
        known = self.columns.get(name)
        if known is None or name in self.table.dirty:
            rows = self.table[name]
            seen = [None if x is None else (x.data_ptr(), x.dtype, x.stride()) for x in rows]
            if known is None or seen != known.seen:
                traits = tuple(None if x is None else _trait(x, holds_scalars(name)) for x in rows)
                addresses = self.on_device([0 if x is None else x[0] for x in seen], torch.int64)
                found = _Column(seen, traits, self.kind(traits), addresses)
                if self.capturing:
                    self.seen_in_capture[name] = found
                    return found
                known = self.columns[name] = found
            if not self.capturing:
                self.table.dirty.discard(name)
        self.read(known.addresses)
        return known

    def kind(self, traits: tuple[_Trait | None, ...]) -> int:
        if traits not in self.kinds:
            self.kinds[traits] = next(self.new_kind)
            _forget_oldest(self.kinds)
        return self.kinds[traits]

    def addresses(self, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.column(name).addresses for name in names)

    def split(
        self, names: Sequence[str], rows: Sequence[bool], from_b: Sequence[bool]
    ) -> tuple[list[_Bucket], list[int]]:
        """The chosen rows in buckets by their tensors in these columns, and the rows that no kernel can walk through.

        Rows not ``from_b`` still write b where b is among the names.
        """
        columns = {name: self.column(name) for name in dict.fromkeys(["w", "b", *names])}
        key = (tuple(names), tuple(column.kind for column in columns.values()), tuple(rows), tuple(from_b))
        if key in self.buckets:
            buckets, odd = self.buckets[key]
            for bucket in buckets:
                self.read(bucket.members, bucket.chunks, bucket.first_chunk)
        else:
            alike: dict[Any, list[int]] = {}
            odd = []
            for row in (row for row, chosen in enumerate(rows) if chosen):
                traits = {name: c.traits[row] for name, c in columns.items() if name in ("w", *names) or from_b[row]}
                walked = [t for name, t in traits.items() if t is not None and not holds_scalars(name)]
                orders = {t.order for t in walked}
                if len(orders) > 1 or None in orders or self.table["w"][row].device != self.device:
                    odd.append(row)
                    continue
                dtypes = tuple((name, t.dtype if (t := traits.get(name)) else None) for name in columns)
                alike.setdefault((dtypes, all(t.aligned for t in walked), from_b[row]), []).append(row)
            buckets = [self._bucket(members, *kind) for kind, members in alike.items()]
            if not self.capturing:
                self.buckets[key] = buckets, odd
                _forget_oldest(self.buckets)
        return buckets, odd

    def _bucket(self, members: list[int], dtypes: Any, aligned: bool, from_b: bool) -> _Bucket:
        counts = torch.tensor([-(-self.numel[row] // CHUNK) for row in members])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        row = torch.tensor(members).repeat_interleave(counts)
        place = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
        rows, chunks = torch.tensor(members), torch.stack([row, place])
        return _Bucket(
            self.send(rows.to(torch.int32)),
            self.send(chunks.to(torch.int32)),
            self.send(first.to(torch.int32)),
            dict(dtypes),
            aligned,
            from_b,
        )


def _forget_oldest(kept: OrderedDict[Any, Any], limit: int = 64) -> None:
    if len(kept) > limit:
        kept.popitem(last=False)


def _trait(x: Tensor, scalar: bool) -> _Trait:
    return _Trait(x.dtype, x.data_ptr() % 16 == 0, () if scalar else _memory_order(x))


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """Which element lies where: the strides of the dimensions longer than 1; ``None`` if x is not dense."""
    strides = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected and x.numel() > 0:
            return None
        expected *= size
    return tuple(stride for stride, _ in strides) if x.numel() > 0 else ()


class _Handle:
    """What the backend keeps for a table."""

    def __init__(self) -> None:
        self.layout: _Layout | None = None
        self.graphs = _Graphs()


def _layout(table: TensorTable) -> _Layout:
    """To be called once an op, first."""
    if table.handle is None:
        table.handle = _Handle()
    handle: _Handle = table.handle
    capturing = _capturing(table.device)
    if handle.layout is None or handle.layout.w != [w.data_ptr() for w in table["w"]]:
        if capturing:
            raise RuntimeError(f"these parameters are new to the Triton backend where they are now: {WARM_UP}")
        handle.layout = _Layout(table, handle.graphs)
    handle.layout.begin(capturing)
    return handle.layout


WARM_UP = "take a step of each kind, sharp and reuse, before torch.cuda.graph captures one"


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def compiler_options(warp_size: int) -> dict[str, int]:
    """Said outright, the limit of 128 registers, with which two programs share a processor, is one that ptxas fits into; its
    own is the same, but there Adan on bfloat16 spills with Triton 3.8. AMD's compiler has no such option."""
    options = {"num_warps": THREADS // warp_size}
    return options if warp_size == 64 else options | {"maxnreg": 128}


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constexprs: Any) -> None:
    if 0 in grid:
        return
    if device.type == "cuda":
        constexprs |= compiler_options(64 if torch.version.hip else 32)
        with torch.cuda.device(device):
            if _capturing(device) and not _is_loaded(kernel, *arguments, **constexprs):
                raise RuntimeError(f"the Triton kernel {kernel.fn.__name__!r} would be loaded in a capture: {WARM_UP}")
            kernel[grid](*arguments, **constexprs)
    else:
        kernel[grid](*arguments, **constexprs)


def _is_loaded(kernel: Any, *arguments: Any, **constexprs: Any) -> bool:
    """Is it on the current device? The driver loads a kernel at its first launch, and refuses to in a capture."""
    return kernel.warmup(*arguments, grid=(1,), **constexprs).module is not None


def _elsewhere(table: TensorTable, rows: list[int], op: Callable[[TensorTable, list[int]], None]) -> None:
    """Does an op on rows that no kernel walks through: by the reference, in a table of their own."""
    if rows:
        columns: dict[str, Any] = {name: [table[name][row] for row in rows] for name in table}
        part = TensorTable(group=[table.group[row] for row in rows], backend="reference", **columns)
        part.perturbed = [table.perturbed[row] for row in rows]
        op(part, rows)


def _of_rows(c: Coefficients, rows: list[int]) -> Coefficients:
    """Row by row: a list of numbers as an index is copied to the device, and waits for it."""

    def of_rows(x: Tensor) -> Tensor:
        return torch.stack([x[..., row] for row in rows], -1)

    q, post, trust = (None if x is None else of_rows(x) for x in (c.q, c.post, c.trust))
    return c._replace(d=of_rows(c.d), q=q, post=post, trust=trust)


# The ops --------------------------------------------------------------------------------------------------------------


def sums(table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums:
    values = torch.zeros(len(pairs), len(table), dtype=torch.float64, device=table.device)
    cached = next((i for i, pair in enumerate(pairs) if kept_norm(pair)), -1)
    norm = (kept_norm(pairs[cached]) if cached >= 0 else None) or "q_norm_sq"
    read = [pair for i, pair in enumerate(pairs) if i != cached]
    names = list(dict.fromkeys(x for pair in read for x in pair))
    columns = [stretched(x) or x for x in names]
    with_t = any(map(stretched, names))
    used = [*columns, *(["w"] if with_t else []), *(["g", norm] if cached >= 0 else [])]
    any_present = [any(of_row) for of_row in zip(*(table.present(x) for x in dict.fromkeys(used)), strict=True)]

    layout, kernels = _layout(table), _kernels()
    eta = _eta(layout, adaptive) if with_t else None
    buckets, odd = layout.split(used, any_present, [False] * len(table))
    for bucket in buckets:
        partials = torch.empty(len(pairs), bucket.programs, dtype=torch.float64, device=table.device)
        if read:
            _launch(
                kernels.inner_products,
                (bucket.programs,),
                table.device,
                layout.addresses(*columns),
                *layout.addresses("w"),
                eta,
                partials,
                bucket.chunks,
                layout.sizes,
                TYPES=bucket.types(*columns),
                STRETCHED=tuple(eta is not None and stretched(x) is not None for x in names),
                W=bucket.types("w")[0],
                PAIRS=tuple(None if i == cached else tuple(map(names.index, pair)) for i, pair in enumerate(pairs)),
                **bucket.walk(),
            )
        has_norm = cached >= 0 and bucket.dtypes["g"] is not None
        _launch(
            kernels.add_partials,
            (len(bucket.members), len(pairs)),
            table.device,
            values,
            partials,
            *layout.addresses(norm),
            bucket.members,
            bucket.first_chunk,
            bucket.programs,
            len(table),
            CACHED=cached,
            NORM=bucket.types(norm)[0] if has_norm else None,
        )

    def by_reference(part: TensorTable, rows: list[int]) -> None:
        eta_of_part = None if adaptive is None else [adaptive[row] for row in rows]
        for row, of_row in zip(rows, reference.sums(part, pairs, eta_of_part).values.unbind(1), strict=True):
            values[:, row] = of_row

    _elsewhere(table, odd, by_reference)
    return Sums(tuple(pairs), values)


def _eta(layout: _Layout, adaptive: Adaptive) -> Tensor | None:
    """-1 where T = 1."""
    if adaptive is None:
        return None
    return layout.on_device([-1.0 if eta is None else eta for eta in adaptive], torch.float64)


class _Hyper(Hyper):
    """Sends the groups' numbers when they change, without waiting for the device."""

    def __init__(self, layout: _Layout, groups: Groups, grad_scale: Tensor | None) -> None:
        super().__init__(groups, layout.table.group, layout.device, grad_scale)
        self.layout = layout

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return self.layout.on_device(values, dtype)


def coefficients(
    table: TensorTable,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    return reference.evaluate(rule, sums, _Hyper(_layout(table), groups, scaling.grad_scale), scaling)


def perturb(table: TensorTable, coefficients: Coefficients, adaptive: Adaptive, mask: Mask | None) -> None:
    layout, kernels = _layout(table), _kernels()
    inputs = coefficients.inputs
    takes_part = table.present(inputs[0])
    from_b = [moved or table.has_master(row) for row, moved in enumerate(table.perturbed)]
    buckets, odd = layout.split(["b", *inputs], takes_part, from_b)
    c, eta = coefficients.d.contiguous(), _eta(layout, adaptive)
    key, threshold = (0, 0) if mask is None else (_int32(mask.key), _int32(mask.threshold))
    for bucket in buckets:
        w, b, *types = bucket.types("w", "b", *inputs)
        _launch(
            kernels.perturb,
            (bucket.programs,),
            table.device,
            *layout.addresses("w", "b"),
            layout.addresses(*inputs),
            c,
            eta,
            key,
            threshold,
            bucket.chunks,
            layout.sizes,
            len(table),
            W=w,
            B=b,
            TYPES=tuple(types),
            FROM_B=bucket.from_b,
            STRETCHED=eta is not None,
            MASKED=mask is not None,
            **bucket.walk(),
        )

    def by_reference(part: TensorTable, rows: list[int]) -> None:
        eta_of_part = None if adaptive is None else [adaptive[row] for row in rows]
        reference.perturb(part, _of_rows(coefficients, rows), eta_of_part, mask, rows)

    _elsewhere(table, odd, by_reference)
    table.perturbed = [moved or part for moved, part in zip(table.perturbed, takes_part, strict=True)]


def _int32(word: int) -> int:
    """32 bits as the signed number that every kernel takes without being compiled again for larger ones."""
    return word - 2**32 if word >= 2**31 else word


def restore(table: TensorTable) -> None:
    _restore(table, table.perturbed)


def _restore(table: TensorTable, rows: list[bool]) -> None:
    if not any(rows):
        return
    layout, kernels = _layout(table), _kernels()
    buckets, odd = layout.split(["b"], rows, rows)
    for bucket in buckets:
        w, b = bucket.types("w", "b")
        _launch(
            kernels.restore,
            (bucket.programs,),
            table.device,
            *layout.addresses("w", "b"),
            bucket.chunks,
            layout.sizes,
            W=w,
            B=b,
            ALIGNED=bucket.aligned,
            CHUNK=CHUNK,
        )
    _elsewhere(table, odd, lambda part, _: reference.restore(part))


def step(table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
    inputs = coefficients.inputs
    takes_part = table.present(inputs[0])
    _restore(table, [moved and not part for moved, part in zip(table.perturbed, takes_part, strict=True)])
    layout = _layout(table)
    from_b = [moved or table.has_master(row) for row, moved in enumerate(table.perturbed)]
    written = [coefficients.writes, f"{coefficients.writes}_norm_sq"] if coefficients.q is not None else []
    used = [*inputs, *written, *BASES[base].states, *(["step"] if base != "grad" else [])]
    buckets, odd = layout.split(used, takes_part, from_b)
    for bucket in buckets:
        _step(table, layout, bucket, base, coefficients, groups)
    _elsewhere(table, odd, lambda part, rows: reference.step(part, base, _of_rows(coefficients, rows), groups))


def _step(
    table: TensorTable, layout: _Layout, bucket: _Bucket, base: str, coefficients: Coefficients, groups: Groups
) -> None:
    kernels, device, rows = _kernels(), table.device, len(table)
    inputs, q, norm = coefficients.inputs, coefficients.writes, f"{coefficients.writes}_norm_sq"
    c, c_q, c_post = (
        None if x is None else x.contiguous() for x in (coefficients.d, coefficients.q, coefficients.post)
    )
    found_inf, trust = coefficients.found_inf, coefficients.trust
    update, states = kernels.UPDATES[base], BASES[base].states
    two_phases = base == "lamb"
    hyper = _hyper_table(layout, groups, BASES[base].read)
    factors = torch.empty(update.factors, rows, dtype=torch.float64, device=device)
    partials = torch.empty(3, bucket.programs, dtype=torch.float64, device=device)
    w, b = bucket.types("w", "b")
    origin = {"W": w, "B": b, "FROM_B": bucket.from_b, "MASTER": bucket.master}
    columns = {"INPUTS": bucket.types(*inputs), "STATES": bucket.types(*states)}
    numbers = {"HYPER": len(BASES[base].read), "FACTORS": update.factors}

    if base != "grad":
        _launch(
            kernels.advance,
            (-(-len(bucket.members) // ROWS_BLOCK),),
            device,
            *layout.addresses("step"),
            factors,
            bucket.members,
            hyper,
            layout.group,
            found_inf,
            len(bucket.members),
            rows,
            len(groups),
            STEP=bucket.types("step")[0],
            MAKE_FACTORS=update.make_factors,
            HYPER=len(BASES[base].read),
            BLOCK=ROWS_BLOCK,
        )
    _launch(
        kernels.step,
        (bucket.programs,),
        device,
        *layout.addresses("w", "b"),
        layout.addresses(*inputs),
        *layout.addresses(q),
        layout.addresses(*states),
        c,
        c_q,
        c_post,
        trust,
        found_inf,
        factors,
        hyper,
        layout.group,
        partials,
        bucket.chunks,
        layout.sizes,
        rows,
        len(groups),
        UPDATE=update.update,
        TWO_PHASES=two_phases,
        **numbers,
        Q=bucket.types(q)[0] if c_q is not None else None,
        **origin,
        **columns,
        **bucket.walk(),
    )
    norm_type = bucket.types(norm)[0] if c_q is not None else None
    if norm_type is None and not two_phases:
        return
    trust_ratio = torch.empty(rows, dtype=torch.float64, device=device)
    _launch(
        kernels.finish_step,
        (len(bucket.members),),
        device,
        *layout.addresses(norm),
        trust_ratio,
        partials,
        hyper,
        layout.group,
        found_inf,
        bucket.members,
        bucket.first_chunk,
        bucket.programs,
        len(groups),
        NORM=norm_type,
        TWO_PHASES=two_phases,
    )
    if two_phases:
        _launch(
            kernels.apply_lamb,
            (bucket.programs,),
            device,
            *layout.addresses("w", "b"),
            layout.addresses(*inputs),
            layout.addresses(*states),
            c_post,
            found_inf,
            factors,
            trust_ratio,
            hyper,
            layout.group,
            bucket.chunks,
            layout.sizes,
            rows,
            len(groups),
            **numbers,
            **origin,
            **columns,
            **bucket.walk(),
        )


def _hyper_table(layout: _Layout, groups: Groups, names: Sequence[str]) -> Tensor:
    """The groups' hyper-parameters, float64 [names, groups]."""
    values = [hyper_of(g, name) for name in names for g in groups]
    if any(isinstance(x, Tensor) for x in values):
        return torch.stack([_scalar(x, layout.device) for x in values])
    return layout.on_device([float(x) for x in values], torch.float64)


def _scalar(x: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), x, dtype=torch.float64, device=device)
