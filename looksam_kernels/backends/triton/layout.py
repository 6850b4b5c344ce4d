"""A table on the device."""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.bucket import Bucket, Dtypes, alike_rows, places_of
from looksam_kernels.backends.triton.columns import Column, Trait, traits_of
from looksam_kernels.backends.triton.graphs import Graphs
from looksam_kernels.backends.triton.handle import Handle, handle_of
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.memory import Memory, forget_oldest
from looksam_kernels.backends.triton.places import MOVED, OTHER, SAME, places
from looksam_kernels.backends.triton.rules import LIMIT, Program, Read
from looksam_kernels.backends.triton.tuning import tuning_of
from looksam_kernels.backends.triton.upload import (
    IMMUTABLE,
    Mail,
    Numbers,
    any_on_device,
    as_numbers,
    as_tensor,
    is_same,
    scalar_on,
    sizes_of,
    source_of,
    values_of,
)
from looksam_kernels.formulas import Groups, Scaling
from looksam_kernels.preconditioning import Preconditioner
from looksam_kernels.table import TensorTable, holds_scalars


class Layout(Memory):
    """Where the tensors of a table are, as far as the device must know. Made anew when a parameter moves.

    What is first seen in a capture is copied in the graph and forgotten after the op, since the next may be another graph's.
    """

    def __init__(self, table: TensorTable, handle: Handle) -> None:
        super().__init__(table.device, handle.graphs)
        self.table, self.handle = table, handle
        self.w = places()
        self.w.look(table["w"])
        self.columns: dict[str, Column] = {}
        self.version = 0
        """Another number whenever a column is of another kind."""
        self.numbers: dict[tuple[Read, ...], Numbers] = {}
        """Of all that have been read so far, by what they are: they are sent together, with the first op that a change meets."""
        self.seen_in_capture: dict[Any, Any] = {}
        """Columns and numbers, by the op under way."""
        self.every = [True] * len(table)
        self.none = [False] * len(table)
        """All rows, and none."""
        self._masters: tuple[tuple[int, int], list[bool]] | None = None
        self._last_split: dict[tuple[str, ...], _Split] = {}
        self.rules: OrderedDict[Any, tuple[Any, tuple[Program, Launch] | None]] = OrderedDict()
        self.kinds: OrderedDict[Any, int] = OrderedDict()
        self.new_kind = itertools.count()
        self.buckets: OrderedDict[Any, tuple[list[Bucket], list[int]]] = OrderedDict()
        self.numel = [w.numel() for w in table["w"]]
        self.chunk = tuning_of(gpu.target(self.device)).chunk
        self.chunks = sum(-(-n // self.chunk) for n in self.numel)
        self.sizes = self.on_device(self.numel, torch.int64)
        self.group = self.on_device(table.group, torch.int32)

    def begin(self, capturing: bool) -> None:
        super().begin(capturing)
        self.seen_in_capture.clear()
        if not capturing:
            self.graphs.reserve(8 * (Graphs.COLUMNS * len(self.numel) + self.chunks), self.device)
        self.read(self.sizes, self.group)

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
        mail: Mail = []
        dirty, changed, seen = self.table.dirty, self.handle.changed, self.columns
        for name in ("w", "b", *names):
            if name not in seen or name in dirty or name in changed:
                self._look_at(name, mail)
        source = source_of(groups, scaling and scaling.max_grad_norm)
        known = self.numbers.get(reads)
        if known is not None and is_same(source, known.source):
            self.deliver(mail)
            self.read(known.on_device)
            return known.on_device
        values = values_of(reads, groups, scaling)
        self._compare(reads, values, source, mail)
        if scaling is not None and not self.capturing:
            for others in self.numbers:
                if others != reads and LIMIT not in others:
                    with contextlib.suppress(KeyError):  # of other groups than these
                        self._compare(others, values_of(others, groups, None), [None, *source[1:]], mail)
        self.deliver(mail)
        if any_on_device(values):
            return torch.stack([scalar_on(x, self.device) for x in values])
        if reads in self.seen_in_capture:
            return self.seen_in_capture[reads].on_device
        self.read(self.numbers[reads].on_device)
        return self.numbers[reads].on_device

    def _look_at(self, name: str, mail: Mail) -> None:
        if name in self.seen_in_capture:
            return
        known, handle, tensors = self.columns.get(name), self.handle, self.table[name]
        if self.capturing:
            here = places()
            here.look(tensors)
            traits = traits_of(tensors, holds_scalars(name))
            kind, kept = self.kind(traits), self.seen_in_capture
            is_known = known is not None and kind == known.kind and name not in handle.changed
            if is_known and here.addresses() == handle.places[name].addresses():
                return
        else:
            if known is None or name in self.table.dirty:
                handle.look(name, tensors)
                self.table.dirty.discard(name)
            change = handle.changed.get(name, SAME) if known is not None else OTHER
            if change == SAME:
                return
            traits, kind, kept = (), 0, self.columns
            if known is not None and change == MOVED:
                traits, kind = known.traits, known.kind
            else:
                traits = traits_of(tensors, holds_scalars(name))
                kind = self.kind(traits)
            here = handle.places[name]

        def store(part: Tensor) -> None:
            kept[name] = Column(traits, kind, part)
            if kept is self.columns:
                handle.changed.pop(name, None)
                self.version += known is None or kind != known.kind

        mail.append((here.addresses(), store))

    def _compare(self, reads: tuple[Read, ...], values: list[Any], source: list[Any], mail: Mail) -> None:
        known = self.seen_in_capture.get(reads) or self.numbers.get(reads)
        if any_on_device(values):
            return
        if known is not None and known.seen == values:
            if not self.capturing and IMMUTABLE.issuperset(map(type, source)):
                self.numbers[reads] = known._replace(source=source)
            return
        kept = self.seen_in_capture if self.capturing else self.numbers
        remembered = source if IMMUTABLE.issuperset(map(type, source)) else []

        def store(part: Tensor) -> None:
            kept[reads] = Numbers(values, part.view(torch.float64), remembered)

        mail.append((array("d", values), store))

    def deliver(self, mail: Mail) -> None:
        """In one copy; in a capture, where the same numbers are kept once for all graphs, each by itself."""
        if not mail:
            return
        if self.capturing:
            sent = [self.graphs.send(as_tensor([x]), self.device) for x in mail]
        else:
            every = self.send(as_tensor(mail))
            sent = [every] if len(mail) == 1 else [*torch.split_with_sizes(every, sizes_of(mail))]
        for (_, store), part in zip(mail, sent, strict=True):
            store(part)

    def column(self, name: str) -> Column:
        """As :meth:`update` has seen it."""
        if name in self.seen_in_capture:
            return self.seen_in_capture[name]
        self.read(self.columns[name].addresses)
        return self.columns[name]

    def kind(self, traits: tuple[Trait | None, ...]) -> int:
        if traits not in self.kinds:
            self.kinds[traits] = next(self.new_kind)
            forget_oldest(self.kinds)
        return self.kinds[traits]

    def addresses(self, *names: str) -> tuple[Tensor, ...]:
        columns = self.columns
        if self.plain:
            return tuple([columns[name].addresses for name in names])
        return tuple([self.column(name).addresses for name in names])

    def split(
        self, names: tuple[str, ...], rows: Sequence[bool], from_b: Sequence[bool]
    ) -> tuple[list[Bucket], list[int]]:
        """The chosen rows in buckets by their tensors in these columns, and the rows that no kernel can walk through.

        Rows not ``from_b`` still write b where b is among the names. Neither list of flags is written after this.
        """
        last = self._last_split.get(names) if self.plain else None
        if last is None or last.rows is not rows or last.from_b is not from_b or last.version != self.version:
            found = self._split(names, rows, from_b)
            if self.plain:
                self._last_split[names] = last = _Split(rows, from_b, self.version, *found)
            return found
        return last.buckets, last.odd

    def _split(
        self, names: tuple[str, ...], rows: Sequence[bool], from_b: Sequence[bool]
    ) -> tuple[list[Bucket], list[int]]:
        columns = {name: self.column(name) for name in dict.fromkeys(["w", "b", *names])}
        key = (names, tuple(column.kind for column in columns.values()), bytes(rows), bytes(from_b))
        if key in self.buckets:
            buckets, odd = self.buckets[key]
            for bucket in buckets:
                self.read(bucket.members, bucket.chunks, bucket.first_chunk)
        else:
            weights = self.table["w"]
            chosen = [row for row, is_chosen in enumerate(rows) if is_chosen]
            here = [row for row in chosen if weights[row].device == self.device]
            alike, odd = alike_rows(columns, names, from_b, here)
            odd += [row for row in chosen if weights[row].device != self.device]
            buckets = [self._bucket(members, *kind) for kind, members in alike.items()]
            if not self.capturing:
                self.buckets[key] = buckets, odd
                forget_oldest(self.buckets)
        return buckets, odd

    def _bucket(self, members: list[int], dtypes: Dtypes, aligned: bool, from_b: bool) -> Bucket:
        chunks = [-(-self.numel[row] // self.chunk) for row in members]
        rows, places, first = (self.send(x.to(torch.int32)) for x in places_of(members, chunks))
        return Bucket(len(members), rows, places, first, self.chunk, sum(chunks), dict(dtypes), aligned, from_b, {})

    def masters(self) -> list[bool]:
        """Which rows have a master copy."""
        w, b = self.column("w"), self.column("b")
        if self._masters is None or self._masters[0] != (w.kind, b.kind):
            pairs = zip(w.traits, b.traits, strict=True)
            self._masters = (w.kind, b.kind), [y is not None and x is not None and x.dtype != y.dtype for x, y in pairs]
        return self._masters[1]


class _Split(NamedTuple):
    """What :meth:`Layout.split` last made of some columns."""

    rows: Sequence[bool]
    from_b: Sequence[bool]
    version: int
    buckets: list[Bucket]
    odd: list[int]


def layout_of(table: TensorTable) -> Layout:
    """To be called once an op, first."""
    handle, capturing = handle_of(table), gpu.capturing(table.device)
    if handle.layout is not None and handle.layout.w.moved(table["w"]):
        handle.layout = None
    if handle.layout is None:
        if capturing:
            raise RuntimeError(f"these parameters are new to the Triton backend where they are now: {gpu.WARM_UP}")
        handle.layout = Layout(table, handle)
    handle.layout.begin(capturing)
    return handle.layout


def numbers_of(layout: Layout, adaptive: Adaptive) -> Tensor | None:
    """What T is made of beside a column: a preconditioner's numbers; or eta of each row, -1 where T = 1."""
    if adaptive is None:
        return None
    if isinstance(adaptive, Preconditioner):
        return as_numbers(adaptive.numbers)
    return layout.on_device([-1.0 if eta is None else eta for eta in adaptive], torch.float64)
