"""A table on the device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from looksam_kernels.backends import Adaptive
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.bucket import Bucket
from looksam_kernels.backends.triton.columns import Column, Form, Trait, addresses_of, trait_of
from looksam_kernels.backends.triton.graphs import Graphs
from looksam_kernels.backends.triton.launch import CHUNK, Launch
from looksam_kernels.backends.triton.rules import LIMIT, Program, Read
from looksam_kernels.backends.triton.upload import Mail, Numbers, any_on_device, scalar_on, values_of
from looksam_kernels.formulas import Groups, Scaling
from looksam_kernels.table import TensorTable, holds_scalars


class Layout:
    """Where the tensors of a table are, as far as the device must know. Made anew when a parameter moves.

    What is on the device is not written again: new numbers get new memory, and a graph holds on to the old. What is first
    seen in a capture is copied in the graph and forgotten after the op, since the next may be another graph's.
    """

    def __init__(self, table: TensorTable, graphs: Graphs) -> None:
        self.table, self.device, self.graphs = table, table.device, graphs
        self.capturing = False
        """Is the op under way being captured?"""
        self.stream: Any = None
        self.plain = True
        """Is neither a capture under way nor more than one stream in use?"""
        self.streams: set[Any] = set()
        """On which ops ran: memory belongs to one, and may be given up while another still reads it."""
        self.w = addresses_of(table["w"])
        self.columns: dict[str, Column] = {}
        self.numbers: dict[tuple[Read, ...], Numbers] = {}
        """Of all that have been read so far, by what they are: they are sent together, with the first op that a change meets."""
        self.seen_in_capture: dict[Any, Any] = {}
        """Columns and numbers, by the op under way."""
        self._masters: tuple[tuple[int, int], list[bool]] | None = None
        self.rules: OrderedDict[Any, tuple[Program, Launch] | None] = OrderedDict()
        self.kinds: OrderedDict[Any, int] = OrderedDict()
        self.new_kind = itertools.count()
        self.buckets: OrderedDict[Any, tuple[list[Bucket], list[int]]] = OrderedDict()
        self.copies: OrderedDict[Any, Tensor] = OrderedDict()
        self.numel = [w.numel() for w in table["w"]]
        self.chunks = sum(-(-n // CHUNK) for n in self.numel)
        self.sizes = self.on_device(self.numel, torch.int64)
        self.group = self.on_device(table.group, torch.int32)

    def begin(self, capturing: bool) -> None:
        """An op."""
        self.capturing = capturing
        self.seen_in_capture.clear()
        self.stream = gpu.stream(self.device)
        self.streams.add(self.stream)
        self.plain = not capturing and len(self.streams) == 1
        if not capturing:
            self.graphs.reserve(8 * (Graphs.COLUMNS * len(self.numel) + self.chunks), self.device)
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
            forget_oldest(self.copies)
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
        mail: Mail = []
        for name in ("w", "b", *names):
            self._look_at(name, mail)
        values = values_of(reads, groups, scaling)
        self._compare(reads, values, mail)
        if scaling is not None and not self.capturing:
            for others in self.numbers:
                if others != reads and LIMIT not in others:
                    with contextlib.suppress(KeyError):  # of other groups than these
                        self._compare(others, values_of(others, groups, None), mail)
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
        known = self.columns.get(name)
        if known is None or name in self.table.dirty:
            rows, present = self.table[name], self.table.present(name)
            there = rows if all(present) else [x for x in rows if x is not None]
            places = addresses_of(there)
            misaligned = [place & 15 for place in places] if functools.reduce(operator.or_, places, 0) & 15 else []
            form = Form(present, [x.dtype for x in there], [x.stride() for x in there], misaligned)
            if len(there) < len(rows):
                each = iter(places)
                places = [next(each) if x else 0 for x in present]
            if known is None or form != known.form:
                traits = tuple(None if x is None else trait_of(x, holds_scalars(name)) for x in rows)
                kind = self.kind(traits)
            else:
                traits, kind = known.traits, known.kind
            if known is None or kind != known.kind or places != known.seen:
                kept = self.seen_in_capture if self.capturing else self.columns

                def store(part: Tensor) -> None:
                    kept[name] = Column(places, form, traits, kind, part)

                mail.append((array("q", places), store))
            if not self.capturing:
                self.table.dirty.discard(name)

    def _compare(self, reads: tuple[Read, ...], values: list[Any], mail: Mail) -> None:
        known = self.seen_in_capture.get(reads) or self.numbers.get(reads)
        if any_on_device(values) or (known is not None and known.seen == values):
            return
        kept = self.seen_in_capture if self.capturing else self.numbers

        def store(part: Tensor) -> None:
            kept[reads] = Numbers(values, part.view(torch.float64))

        mail.append((array("d", values), store))

    def deliver(self, mail: Mail) -> None:
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
        return tuple([self.column(name).addresses for name in names])

    def split(
        self, names: Sequence[str], rows: Sequence[bool], from_b: Sequence[bool]
    ) -> tuple[list[Bucket], list[int]]:
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
                forget_oldest(self.buckets)
        return buckets, odd

    def _bucket(self, members: list[int], dtypes: Any, aligned: bool, from_b: bool) -> Bucket:
        counts = torch.tensor([-(-self.numel[row] // CHUNK) for row in members])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        row = torch.tensor(members).repeat_interleave(counts)
        place = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
        rows, chunks = torch.tensor(members), torch.stack([row, place])
        return Bucket(
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


def forget_oldest(kept: OrderedDict[Any, Any], limit: int = 64) -> None:
    if len(kept) > limit:
        kept.popitem(last=False)


class _Handle:
    """What the backend keeps for a table."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.graphs = Graphs()


def layout_of(table: TensorTable) -> Layout:
    """To be called once an op, first."""
    if table.handle is None:
        table.handle = _Handle()
    handle: _Handle = table.handle
    capturing = gpu.capturing(table.device)
    if handle.layout is None or handle.layout.w != addresses_of(table["w"]):
        if capturing:
            raise RuntimeError(f"these parameters are new to the Triton backend where they are now: {gpu.WARM_UP}")
        handle.layout = Layout(table, handle.graphs)
    handle.layout.begin(capturing)
    return handle.layout


def eta_of(layout: Layout, adaptive: Adaptive) -> Tensor | None:
    """-1 where T = 1."""
    if adaptive is None:
        return None
    return layout.on_device([-1.0 if eta is None else eta for eta in adaptive], torch.float64)
