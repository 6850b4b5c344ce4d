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
from looksam_kernels.backends.triton.bucket import Bucket
from looksam_kernels.backends.triton.columns import Column, Trait, traits_of
from looksam_kernels.backends.triton.graphs import Graphs
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.places import MOVED, OTHER, SAME, Places, places
from looksam_kernels.backends.triton.rules import LIMIT, Program, Read
from looksam_kernels.backends.triton.tuning import tuning_of
from looksam_kernels.backends.triton.upload import (
    IMMUTABLE,
    Mail,
    Numbers,
    any_on_device,
    as_tensor,
    is_same,
    scalar_on,
    sizes_of,
    source_of,
    values_of,
)
from looksam_kernels.formulas import Groups, Scaling
from looksam_kernels.table import TensorTable, holds_scalars


class Layout:
    """Where the tensors of a table are, as far as the device must know. Made anew when a parameter moves.

    What is on the device is not written again: new numbers get new memory, and a graph holds on to the old. What is first
    seen in a capture is copied in the graph and forgotten after the op, since the next may be another graph's.
    """

    def __init__(self, table: TensorTable, handle: Handle) -> None:
        self.table, self.device, self.handle, self.graphs = table, table.device, handle, handle.graphs
        self.capturing = False
        """Is the op under way being captured?"""
        self.stream: Any = None
        self.plain = True
        """Is neither a capture under way nor more than one stream in use?"""
        self.streams: set[Any] = set()
        """On which ops ran: memory belongs to one, and may be given up while another still reads it."""
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
        self._scratch: dict[Any, Tensor] = {}
        self.rules: OrderedDict[Any, tuple[Any, tuple[Program, Launch] | None]] = OrderedDict()
        self.kinds: OrderedDict[Any, int] = OrderedDict()
        self.new_kind = itertools.count()
        self.buckets: OrderedDict[Any, tuple[list[Bucket], list[int]]] = OrderedDict()
        self.copies: OrderedDict[Any, Tensor] = OrderedDict()
        self.numel = [w.numel() for w in table["w"]]
        self.chunk = tuning_of(gpu.target(self.device)).chunk
        self.chunks = sum(-(-n // self.chunk) for n in self.numel)
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

    def scratch(self, name: str, *shape: int) -> Tensor:
        """float64 memory that nothing reads after the op: where all ops follow each other in one stream, the same again."""
        if not self.plain:
            return torch.empty(shape, dtype=torch.float64, device=self.device)
        key = (name, shape)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=torch.float64, device=self.device)
        return self._scratch[key]

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
        counts = torch.tensor([-(-self.numel[row] // self.chunk) for row in members])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        row = torch.tensor(members).repeat_interleave(counts)
        place = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
        rows, chunks = torch.tensor(members), torch.stack([row, place])
        return Bucket(
            len(members),
            self.send(rows.to(torch.int32)),
            self.send(chunks.to(torch.int32)),
            self.send(first.to(torch.int32)),
            self.chunk,
            len(place),
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


class _Split(NamedTuple):
    """What :meth:`Layout.split` last made of some columns."""

    rows: Sequence[bool]
    from_b: Sequence[bool]
    version: int
    buckets: list[Bucket]
    odd: list[int]


class Handle:
    """What the backend keeps for a table."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.graphs = Graphs()
        self.places: dict[str, Places] = {}
        self.changed: dict[str, int] = {}
        """The columns whose addresses on the device are out of date, and how much has changed."""

    def look(self, name: str, tensors: list[Tensor | None]) -> None:
        if name not in self.places:
            self.places[name] = places()
        self._note(name, self.places[name].look(tensors))

    def take(self, name: str, params: Sequence[Tensor], weights: list[Tensor]) -> bool | list[bool] | None:
        """As ``take_gradients`` of the backend."""
        if name not in self.places:
            self.places[name] = places()
        taken = self.places[name].take(params, weights)
        if taken is None:
            return None
        self._note(name, taken[0])
        return taken[1]

    def get(self, name: str) -> list[Tensor | None]:
        """The tensors that were taken."""
        return self.places[name].tensors()

    def release(self, name: str) -> None:
        """Lets go of them."""
        if name in self.places:
            self.places[name].release()

    def _note(self, name: str, change: int) -> None:
        if change != SAME:
            self.changed[name] = max(change, self.changed.get(name, SAME))


def handle_of(table: TensorTable) -> Handle:
    if table.handle is None:
        table.handle = Handle()
    handle: Handle = table.handle
    return handle


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


def eta_of(layout: Layout, adaptive: Adaptive) -> Tensor | None:
    """-1 where T = 1."""
    if adaptive is None:
        return None
    return layout.on_device([-1.0 if eta is None else eta for eta in adaptive], torch.float64)
