"""Triton: for GPUs without a compiled extension, NVIDIA's and AMD's. The kernels stand in ``triton_kernels``.

On a machine without a GPU the kernels run on CPU tensors in Triton's interpreter, for tests, and only when asked for.

Rows of the same element types, with the same columns present, form a *bucket*; each op is one to four launches a
bucket, after one copy of what has changed for the device: addresses and hyper-parameters. Rows that no kernel can walk
through (not dense, or laid out differently from column to column) take the reference. The coefficients are formulas.py,
made into a function of the kernel ``evaluate`` (:mod:`looksam_kernels.backends.triton_rules`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import operator
import os
import re
import sys
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive, native, reference, triton_rules
from looksam_kernels.backends.triton_rules import Program, Read
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
    kept_norm,
    stretched,
)
from looksam_kernels.masks import Mask
from looksam_kernels.table import TensorTable, holds_scalars
from looksam_kernels.updates import BASES, hyper_of

CHUNK = 2048
"""Elements of a program, a power of two: 8 a thread, one 16-byte word of bfloat16. With 16 Triton 3.6 spills registers."""
THREADS = 256
ROWS_BLOCK = 128
"""Rows of a program of ``advance``."""
RULE_BLOCK = 512
"""Rows that ``evaluate`` takes at a time."""
GPUS = ("cuda", "xpu")
"""torch's names of the devices with a Triton backend: NVIDIA's and AMD's have one, Intel's another."""
OLDEST = (3, 6)
"""The first Triton that has what the kernels use."""


# Where it runs --------------------------------------------------------------------------------------------------------


def unavailable(device: torch.device) -> str | None:
    if (why := _not_usable()) is not None:
        return why
    if device.type in GPUS:
        if not torch.get_device_module(device).is_available():
            return "torch finds no GPU with a driver here"
        return "TRITON_INTERPRET is set, and the interpreter runs on CPU tensors only" if _interpreting() else None
    if device.type != "cpu":
        return f"Triton has no code for {device.type} tensors"
    if _any_gpu() and not _interpreting():
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


def _any_gpu() -> bool:
    return any(torch.get_device_module(name).is_available() for name in GPUS)


def first_misfit(tensors: list[Tensor | None], weights: list[Tensor | None], scalar: bool) -> int:
    compiled = native.compiled()
    return 0 if compiled is None else int(compiled.first_misfit(tensors, weights, scalar))


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _kernels() -> ModuleType:
    """Imported late: whether kernels are compiled or interpreted is settled when triton is first imported."""
    if not _any_gpu():
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


class _Form(NamedTuple):
    """What the traits of a column follow from, but for the shapes, which are the parameters'."""

    present: list[bool]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    misaligned: list[int]


class _Column(NamedTuple):
    seen: list[int]
    """The address of each row when it was last looked at; 0 where there is no tensor."""
    form: _Form
    traits: tuple[_Trait | None, ...]
    kind: int
    """A number for the traits: columns with the same traits have the same."""
    addresses: Tensor


class _Numbers(NamedTuple):
    """Hyper-parameters, float64 [names, groups] on the device."""

    seen: list[float]
    on_device: Tensor


class _Bucket(NamedTuple):
    size: int
    """How many rows it has."""
    members: Tensor
    """They, int32."""
    chunks: Tensor
    """int32 [2, programs]: the row of each program, and which of the row's chunks it is."""
    first_chunk: Tensor
    """int32 [members + 1]: the programs of the k-th member are those from first_chunk[k] to first_chunk[k + 1]."""
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
            self._room = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")

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
        self.plain = True
        """Is neither a capture under way nor more than one stream in use?"""
        self.streams: set[Any] = set()
        """On which ops ran: memory belongs to one, and may be given up while another still reads it."""
        self.w = _addresses(table["w"])
        self.columns: dict[str, _Column] = {}
        self.numbers: dict[tuple[Read, ...], _Numbers] = {}
        """Of all that have been read so far, by what they are: they are sent together, with the first op that a change meets."""
        self.seen_in_capture: dict[Any, Any] = {}
        """Columns and numbers, by the op under way."""
        self._masters: tuple[tuple[int, int], list[bool]] | None = None
        self.rules: OrderedDict[Any, tuple[Program, _Launch] | None] = OrderedDict()
        self.kinds: OrderedDict[Any, int] = OrderedDict()
        self.new_kind = itertools.count()
        self.buckets: OrderedDict[Any, tuple[list[_Bucket], list[int]]] = OrderedDict()
        self.copies: OrderedDict[Any, Tensor] = OrderedDict()
        self.numel = [w.numel() for w in table["w"]]
        self.chunks = sum(-(-n // CHUNK) for n in self.numel)
        self.sizes = self.on_device(self.numel, torch.int64)
        self.group = self.on_device(table.group, torch.int32)

    def begin(self, capturing: bool) -> None:
        """An op."""
        self.capturing = capturing
        self.seen_in_capture.clear()
        self.stream = _stream(self.device)
        self.streams.add(self.stream)
        self.plain = not capturing and len(self.streams) == 1
        if not capturing:
            self.graphs.reserve(8 * (_Graphs.COLUMNS * len(self.numel) + self.chunks), self.device)
        self.read(self.sizes, self.group)

    def read(self, *kept: Tensor) -> None:
        """The op under way reads memory that may be given up before it has run."""
        if self.plain:
            return
        for x in kept:
            if self.capturing:
                self.graphs.hold(x)
            else:
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
        return x if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)

    def update(
        self,
        names: Sequence[str],
        groups: Groups = (),
        reads: tuple[Read, ...] = (),
        scaling: Scaling | None = None,
    ) -> Tensor:
        """Sends, in one copy, what the op under way reads and the device does not have as it is now: the addresses of these
        columns, and hyper-parameters. The first op of a step also sends those that the later ones are known to read.

        Returns:
            The hyper-parameters ``reads``, float64 [names, groups].
        """
        mail: _Mail = []
        for name in ("w", "b", *names):
            self._look_at(name, mail)
        values = _values(reads, groups, scaling)
        self._compare(reads, values, mail)
        if scaling is not None and not self.capturing:
            for others in self.numbers:
                if others != reads and triton_rules.LIMIT not in others:
                    with contextlib.suppress(KeyError):  # of other groups than these
                        self._compare(others, _values(others, groups, None), mail)
        self.deliver(mail)
        if _on_device(values):
            return torch.stack([_scalar(x, self.device) for x in values])
        if reads in self.seen_in_capture:
            return self.seen_in_capture[reads].on_device
        self.read(self.numbers[reads].on_device)
        return self.numbers[reads].on_device

    def _look_at(self, name: str, mail: _Mail) -> None:
        if name in self.seen_in_capture:
            return
        known = self.columns.get(name)
        if known is None or name in self.table.dirty:
            rows, present = self.table[name], self.table.present(name)
            there = rows if all(present) else [x for x in rows if x is not None]
            places = _addresses(there)
            misaligned = [place & 15 for place in places] if functools.reduce(operator.or_, places, 0) & 15 else []
            form = _Form(present, [x.dtype for x in there], [x.stride() for x in there], misaligned)
            if len(there) < len(rows):
                each = iter(places)
                places = [next(each) if x else 0 for x in present]
            if known is None or form != known.form:
                traits = tuple(None if x is None else _trait(x, holds_scalars(name)) for x in rows)
                kind = self.kind(traits)
            else:
                traits, kind = known.traits, known.kind
            if known is None or kind != known.kind or places != known.seen:
                kept = self.seen_in_capture if self.capturing else self.columns

                def store(part: Tensor) -> None:
                    kept[name] = _Column(places, form, traits, kind, part)

                mail.append((array("q", places), store))
            if not self.capturing:
                self.table.dirty.discard(name)

    def _compare(self, reads: tuple[Read, ...], values: list[Any], mail: _Mail) -> None:
        known = self.seen_in_capture.get(reads) or self.numbers.get(reads)
        if _on_device(values) or (known is not None and known.seen == values):
            return
        kept = self.seen_in_capture if self.capturing else self.numbers

        def store(part: Tensor) -> None:
            kept[reads] = _Numbers(values, part.view(torch.float64))

        mail.append((array("d", values), store))

    def deliver(self, mail: _Mail) -> None:
        """In one copy; in a capture, where the same numbers are kept once for all graphs, each by itself."""
        if not mail:
            return
        nothing = self.sizes.new_empty(0)
        if self.capturing:
            sent = [
                self.graphs.send(torch.frombuffer(x, dtype=torch.int64), self.device) if x else nothing for x, _ in mail
            ]
        else:
            data = bytearray().join(memoryview(x).cast("B") for x, _ in mail)
            every = self.send(torch.frombuffer(data, dtype=torch.int64)) if data else nothing
            sent = list(every.split([len(x) for x, _ in mail]))
        for (_, store), part in zip(mail, sent, strict=True):
            store(part)

    def column(self, name: str) -> _Column:
        """As :meth:`update` has seen it."""
        if name in self.seen_in_capture:
            return self.seen_in_capture[name]
        self.read(self.columns[name].addresses)
        return self.columns[name]

    def kind(self, traits: tuple[_Trait | None, ...]) -> int:
        if traits not in self.kinds:
            self.kinds[traits] = next(self.new_kind)
            _forget_oldest(self.kinds)
        return self.kinds[traits]

    def addresses(self, *names: str) -> tuple[Tensor, ...]:
        return tuple([self.column(name).addresses for name in names])

    def split(
        self, names: Sequence[str], rows: Sequence[bool], from_b: Sequence[bool]
    ) -> tuple[list[_Bucket], list[int]]:
        """The chosen rows in buckets by their tensors in these columns, and the rows that no kernel can walk through.

        Rows not ``from_b`` still write b where b is among the names.
        """
        columns = {name: self.column(name) for name in dict.fromkeys(["w", "b", *names])}
        key = (tuple(names), tuple(column.kind for column in columns.values()), bytes(rows), bytes(from_b))
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
            len(members),
            self.send(rows.to(torch.int32)),
            self.send(chunks.to(torch.int32)),
            self.send(first.to(torch.int32)),
            dict(dtypes),
            aligned,
            from_b,
            {},
        )

    def masters(self) -> list[bool]:
        """Which rows have a master copy."""
        w, b = self.column("w"), self.column("b")
        if self._masters is None or self._masters[0] != (w.kind, b.kind):
            pairs = zip(w.traits, b.traits, strict=True)
            self._masters = (w.kind, b.kind), [y is not None and x is not None and x.dtype != y.dtype for x, y in pairs]
        return self._masters[1]


_Mail = list[tuple["array[Any]", Callable[[Tensor], None]]]
"""Numbers of 8 bytes for the device, and what takes them, as int64, when they are there."""


def _values(reads: tuple[Read, ...], groups: Groups, scaling: Scaling | None) -> list[Any]:
    """Hyper-parameters as numbers or tensors, [names, groups]."""
    limit = None if scaling is None else scaling.max_grad_norm
    found: list[Any] = [limit if x is triton_rules.LIMIT else x.read(g, x.name) for x in reads for g in groups]
    return [x if isinstance(x, Tensor) else float(x) for x in found]


def _on_device(values: list[Any]) -> bool:
    """Is there a tensor among them? Its value may have changed unseen, and is copied on the device."""
    return not {float}.issuperset(map(type, values))


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


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _layout(table: TensorTable) -> _Layout:
    """To be called once an op, first."""
    if table.handle is None:
        table.handle = _Handle()
    handle: _Handle = table.handle
    capturing = _capturing(table.device)
    if handle.layout is None or handle.layout.w != _addresses(table["w"]):
        if capturing:
            raise RuntimeError(f"these parameters are new to the Triton backend where they are now: {WARM_UP}")
        handle.layout = _Layout(table, handle.graphs)
    handle.layout.begin(capturing)
    return handle.layout


WARM_UP = "take a step of each kind, sharp and reuse, before torch.cuda.graph captures one"


def _stream(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def compiler_options(target: Any) -> dict[str, int]:
    """Of a Triton target, by the name of its backend: cuda, hip (AMD) or xpu (Intel).

    Said outright, the limit of 128 registers, with which two programs share a processor, is one that ptxas fits into; its
    own is the same, but there Adan on bfloat16 spills with Triton 3.8. Other compilers have no such option.
    """
    options = {"num_warps": THREADS // target.warp_size}
    return options | {"maxnreg": 128} if target.backend == "cuda" else options


class _Launch:
    """A kernel with its constexprs, and what the compiler has made of them: looked up at the first launch, not at every one."""

    def __init__(self, kernel: Any, **constexprs: Any) -> None:
        self.kernel, self.constexprs = kernel, constexprs
        self.compiled: dict[Any, Any] = {}
        """By device and by the types of the arguments."""
        names = [] if _is_interpreted(kernel) else [p.name for p in kernel.params if p.is_constexpr]
        self.trailing = tuple(constexprs[name] for name in names)

    def __call__(self, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...]) -> None:
        if _is_interpreted(self.kernel):
            self.kernel[grid](*arguments, **self.constexprs)
            return
        key = (device, *[x.dtype if isinstance(x, Tensor) else type(x) for x in arguments])
        if key in self.compiled:
            self.compiled[key][(*grid, 1, 1)[:3]](*arguments, *self.trailing)
            return
        options = self.constexprs | compiler_options(_target())
        if _capturing(device) and not _is_loaded(self.kernel, *arguments, **options):
            raise RuntimeError(f"the Triton kernel {self.kernel.fn.__name__!r} would be loaded in a capture: {WARM_UP}")
        self.compiled[key] = self.kernel[grid](*arguments, **options)


def _launch(launch: _Launch, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
    if 0 in grid:
        return
    if device.type == "cpu":
        launch(grid, device, arguments)
    else:
        with torch.get_device_module(device).device(device):
            launch(grid, device, arguments)


def _is_interpreted(kernel: Any) -> bool:
    return not hasattr(kernel, "device_caches")


def _target() -> Any:
    """Of the current device."""
    from triton.runtime import driver

    return driver.active.get_current_target()


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
    layout = _layout(table)
    reading = _reading(tuple(pairs))
    layout.update(reading.used)
    return Sums(reading.pairs, _sums(layout, reading, None, adaptive))


class _Reading:
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
        self.used = list(
            dict.fromkeys([*self.columns, *(["w"] if with_t else []), *(["g", self.norm] if with_norm else [])])
        )


@functools.lru_cache(maxsize=256)
def _reading(pairs: tuple[Pair, ...]) -> _Reading:
    return _Reading(pairs)


def _sums(layout: _Layout, reading: _Reading, known: Tensor | None, adaptive: Adaptive) -> Tensor:
    """The known sums, and then those of the pairs: float64 [known + pairs, rows]."""
    table = layout.table
    known = None if known is None else known.to(torch.float64).contiguous()
    before = 0 if known is None else len(known)
    count = before + len(reading.pairs)
    eta = _eta(layout, adaptive) if any(reading.stretched) else None
    buckets, odd = layout.split(reading.used, _any_present(table, reading.used), [False] * len(table))
    if sum(bucket.size for bucket in buckets) == len(table):
        values = torch.empty(count, len(table), dtype=torch.float64, device=table.device)
    else:  # rows that no launch writes
        values = torch.zeros(count, len(table), dtype=torch.float64, device=table.device)
        if known is not None:
            values[:before] = known
    for bucket in buckets:
        partials = torch.empty(len(reading.pairs), bucket.programs, dtype=torch.float64, device=table.device)
        if reading.columns:
            _launch(
                bucket.prepared(_inner_products, reading, eta is not None),
                (bucket.programs,),
                table.device,
                layout.addresses(*reading.columns),
                *layout.addresses("w"),
                eta,
                partials,
                bucket.chunks,
                layout.sizes,
            )
        _launch(
            bucket.prepared(_add_partials, reading, before),
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

    _elsewhere(table, odd, by_reference)
    return values


def _inner_products(bucket: _Bucket, reading: _Reading, with_t: bool) -> _Launch:
    return _Launch(
        _kernels().inner_products,
        TYPES=bucket.types(*reading.columns),
        STRETCHED=tuple(with_t and x for x in reading.stretched),
        W=bucket.types("w")[0],
        PAIRS=reading.places,
        **bucket.walk(),
    )


def _add_partials(bucket: _Bucket, reading: _Reading, before: int) -> _Launch:
    has_norm = reading.cached >= 0 and bucket.dtypes["g"] is not None
    return _Launch(
        _kernels().add_partials,
        KNOWN=before,
        CACHED=before + reading.cached if reading.cached >= 0 else -1,
        NORM=bucket.types(reading.norm)[0] if has_norm else None,
    )


def _any_present(table: TensorTable, columns: Sequence[str]) -> list[bool]:
    """Which rows have a tensor in one of the columns."""
    found = [False] * len(table)
    for column in columns:
        present = table.present(column)
        if all(present):
            return present
        found = [x or y for x, y in zip(found, present, strict=True)]
    return found


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


def measure(
    table: TensorTable,
    rule: str,
    pairs: Sequence[Pair],
    known: Sums | None,
    groups: Groups,
    adaptive: Adaptive,
    scaling: Scaling,
) -> tuple[Sums, Coefficients]:
    layout, reading = _layout(table), _reading(tuple(pairs))
    every = (*(() if known is None else known.pairs), *pairs)
    found = _rule(layout, rule, every, groups, scaling)
    hyper = layout.update(reading.used, groups, () if found is None else found[0].reads, scaling)
    if known is None or pairs:
        known = Sums(every, _sums(layout, reading, None if known is None else known.values, adaptive))
    return known, _evaluate(layout, found, hyper, rule, known, groups, scaling)


def coefficients(
    table: TensorTable,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    layout = _layout(table)
    found = _rule(layout, rule, sums.pairs, groups, scaling)
    hyper = layout.update((), groups, () if found is None else found[0].reads, scaling)
    return _evaluate(layout, found, hyper, rule, sums, groups, scaling)


def _rule(
    layout: _Layout, rule: str, pairs: tuple[Pair, ...], groups: Groups, scaling: Scaling
) -> tuple[Program, _Launch] | None:
    """The rule's program and the launch that runs it; ``None`` where the reference has to evaluate it."""
    entry = ASCENTS[rule] if rule in ASCENTS else DESCENTS[rule]
    scale, before = (None if x is None else x.dtype for x in (scaling.grad_scale, scaling.found_inf))
    key = (entry, pairs, scaling.max_grad_norm is None, scaling.trust_ratio, scale, before)
    if key in layout.rules:
        found = layout.rules[key]
        if found is None or found[0].fits(groups):
            return found
    program = triton_rules.program(rule, pairs, groups, scaling)
    found = None
    if program is not None:
        function = triton_rules.function(program.source)
        found = program, _Launch(_kernels().evaluate, PAIRS=len(pairs), RULE=function, BLOCK=RULE_BLOCK)
    layout.rules[key] = found
    _forget_oldest(layout.rules)
    return found


def _evaluate(
    layout: _Layout,
    found: tuple[Program, _Launch] | None,
    hyper: Tensor,
    rule: str,
    sums: Sums,
    groups: Groups,
    scaling: Scaling,
) -> Coefficients:
    if found is None:
        return reference.evaluate(rule, sums, _Hyper(layout, groups, scaling.grad_scale), scaling)
    (program, launch), device, rows = found, layout.device, len(layout.table)
    scale, before = (None if x is None else x.to(device).reshape(()) for x in (scaling.grad_scale, scaling.found_inf))
    numbers = torch.empty(sum(program.counts), rows, dtype=torch.float64, device=device)
    found_inf = torch.empty((), dtype=torch.float32, device=device)
    _launch(
        launch,
        (1,),
        device,
        sums.values.to(torch.float64).contiguous(),
        hyper,
        layout.group,
        scale,
        before,
        numbers,
        found_inf,
        rows,
        len(groups),
    )
    d, q, post, trust = numbers.split(program.counts)
    writes = DESCENTS[rule].writes if rule in DESCENTS else None
    return Coefficients(
        inputs_of(rule),
        d,
        q if program.counts[1] else None,
        found_inf,
        post if program.counts[2] else None,
        writes or "q",
        trust[0] if program.counts[3] else None,
    )


def perturb(table: TensorTable, coefficients: Coefficients, adaptive: Adaptive, mask: Mask | None) -> None:
    layout, inputs = _layout(table), coefficients.inputs
    takes_part = table.present(inputs[0])
    layout.update(inputs)
    buckets, odd = layout.split(["b", *inputs], takes_part, _from_b(layout))
    c, eta = coefficients.d.contiguous(), _eta(layout, adaptive)
    key, threshold = (0, 0) if mask is None else (_int32(mask.key), _int32(mask.threshold))
    for bucket in buckets:
        _launch(
            bucket.prepared(_perturb, inputs, eta is not None, mask is not None),
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
        )

    def by_reference(part: TensorTable, rows: list[int]) -> None:
        eta_of_part = None if adaptive is None else [adaptive[row] for row in rows]
        reference.perturb(part, _of_rows(coefficients, rows), eta_of_part, mask, rows)

    _elsewhere(table, odd, by_reference)
    table.perturbed = [moved or part for moved, part in zip(table.perturbed, takes_part, strict=True)]


def _perturb(bucket: _Bucket, inputs: tuple[str, ...], with_t: bool, masked: bool) -> _Launch:
    w, b, *types = bucket.types("w", "b", *inputs)
    return _Launch(
        _kernels().perturb,
        W=w,
        B=b,
        TYPES=tuple(types),
        FROM_B=bucket.from_b,
        STRETCHED=with_t,
        MASKED=masked,
        **bucket.walk(),
    )


def _from_b(layout: _Layout) -> list[bool]:
    """Which rows start from b: those that are perturbed, and those with a master copy."""
    moved, masters = layout.table.perturbed, layout.masters()
    return [x or y for x, y in zip(moved, masters, strict=True)] if any(moved) else masters


def _int32(word: int) -> int:
    """32 bits as the signed number that every kernel takes without being compiled again for larger ones."""
    return word - 2**32 if word >= 2**31 else word


def restore(table: TensorTable) -> None:
    _restore(table, table.perturbed)


def _restore(table: TensorTable, rows: list[bool]) -> None:
    if not any(rows):
        return
    layout = _layout(table)
    layout.update(())
    buckets, odd = layout.split(["b"], rows, rows)
    for bucket in buckets:
        _launch(
            bucket.prepared(_restoring),
            (bucket.programs,),
            table.device,
            *layout.addresses("w", "b"),
            bucket.chunks,
            layout.sizes,
        )
    _elsewhere(table, odd, lambda part, _: reference.restore(part))


def _restoring(bucket: _Bucket) -> _Launch:
    w, b = bucket.types("w", "b")
    return _Launch(_kernels().restore, W=w, B=b, ALIGNED=bucket.aligned, CHUNK=CHUNK)


def step(table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
    inputs = coefficients.inputs
    takes_part = table.present(inputs[0])
    if any(table.perturbed):
        _restore(table, [moved and not part for moved, part in zip(table.perturbed, takes_part, strict=True)])
    layout = _layout(table)
    written = [coefficients.writes, f"{coefficients.writes}_norm_sq"] if coefficients.q is not None else []
    used = [*inputs, *written, *BASES[base].states, *(["step"] if base != "grad" else [])]
    hyper = layout.update(used, groups, _reads_of(base))
    buckets, odd = layout.split(used, takes_part, _from_b(layout))
    for bucket in buckets:
        _step(layout, bucket, base, coefficients, hyper, len(groups))
    _elsewhere(table, odd, lambda part, rows: reference.step(part, base, _of_rows(coefficients, rows), groups))


@functools.cache
def _reads_of(base: str) -> tuple[Read, ...]:
    return tuple(Read(name, hyper_of) for name in BASES[base].read)


class _StepLaunches(NamedTuple):
    advance: _Launch
    step: _Launch
    finish: _Launch
    apply: _Launch
    keeps_norm: bool


def _step_launches(bucket: _Bucket, base: str, inputs: tuple[str, ...], writes: str | None) -> _StepLaunches:
    kernels, update = _kernels(), _kernels().UPDATES[base]
    w, b = bucket.types("w", "b")
    norm = None if writes is None else bucket.types(f"{writes}_norm_sq")[0]
    two_phases = base == "lamb"
    numbers = {"HYPER": len(BASES[base].read), "FACTORS": update.factors}
    tensors = {"INPUTS": bucket.types(*inputs), "STATES": bucket.types(*BASES[base].states)}
    origin = {"W": w, "B": b, "FROM_B": bucket.from_b, "MASTER": bucket.master}
    return _StepLaunches(
        _Launch(
            kernels.advance,
            STEP=bucket.types("step")[0] if base != "grad" else None,
            MAKE_FACTORS=update.make_factors,
            HYPER=len(BASES[base].read),
            BLOCK=ROWS_BLOCK,
        ),
        _Launch(
            kernels.step,
            UPDATE=update.update,
            TWO_PHASES=two_phases,
            Q=None if writes is None else bucket.types(writes)[0],
            **numbers,
            **origin,
            **tensors,
            **bucket.walk(),
        ),
        _Launch(kernels.finish_step, NORM=norm, TWO_PHASES=two_phases),
        _Launch(kernels.apply_lamb, **numbers, **origin, **tensors, **bucket.walk()),
        norm is not None,
    )


def _step(layout: _Layout, bucket: _Bucket, base: str, coefficients: Coefficients, hyper: Tensor, groups: int) -> None:
    device, rows = layout.device, len(layout.table)
    inputs, states = coefficients.inputs, BASES[base].states
    c, c_q, c_post = (
        None if x is None else x.contiguous() for x in (coefficients.d, coefficients.q, coefficients.post)
    )
    writes = None if c_q is None else coefficients.writes
    launches: _StepLaunches = bucket.prepared(_step_launches, base, inputs, writes)
    found_inf, trust = coefficients.found_inf, coefficients.trust
    two_phases, factor_count = base == "lamb", _kernels().UPDATES[base].factors
    factors = torch.empty(factor_count, rows, dtype=torch.float64, device=device)
    partials = torch.empty(3, bucket.programs, dtype=torch.float64, device=device)
    w, b = layout.addresses("w", "b")
    of_inputs, of_states = layout.addresses(*inputs), layout.addresses(*states)
    q, norm = layout.addresses(writes, f"{writes}_norm_sq") if writes is not None else (w, w)

    if base != "grad":
        _launch(
            launches.advance,
            (-(-bucket.size // ROWS_BLOCK),),
            device,
            *layout.addresses("step"),
            factors,
            bucket.members,
            hyper,
            layout.group,
            found_inf,
            bucket.size,
            rows,
            groups,
        )
    _launch(
        launches.step,
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
        bucket.chunks,
        layout.sizes,
        rows,
        groups,
    )
    if not launches.keeps_norm and not two_phases:
        return
    trust_ratio = torch.empty(rows, dtype=torch.float64, device=device)
    _launch(
        launches.finish,
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
        _launch(
            launches.apply,
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
            bucket.chunks,
            layout.sizes,
            rows,
            groups,
        )


def _scalar(x: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), x, dtype=torch.float64, device=device)
