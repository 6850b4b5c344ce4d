"""Binding: the parameters of all groups, their gradients and their state, as the ops see them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from looksam import hyper
from looksam.hyper import FILTERS, Group
from looksam.masters import Masters
from looksam.shards import Whole, shards_of
from looksam_kernels import TensorTable, ops, snapshot
from looksam_kernels.formulas import KEEP_NORM
from looksam_kernels.numbers import scalar_dtype
from looksam_kernels.snapshot import CONTENTS, PARAMS, PLACES, STATE, Snapshot
from looksam_kernels.table import holds_scalars

State = MutableMapping[str, Any]
"""Of one parameter."""
TRAINABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class StateOfBase(Protocol):
    """What a base update keeps for each parameter."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that the ops read and write."""

    @property
    def reads(self) -> frozenset[str]:
        """The names in a group that the variant or the base reads; those of others may mean anything."""

    def states(self, group: Group) -> tuple[str, ...]:
        """The columns that the parameters of a group need."""

    def missing(self, p: Tensor, group: Group, state: State) -> State:
        """What is to be created and ``state`` lacks."""


class Source(Protocol):
    """The optimizer, or a weak proxy of it."""

    param_groups: list[Group]
    state: MutableMapping[Tensor, State]

    def settle(self) -> None:
        """Completes groups that were put together by hand."""


class Binding:
    """One table for all parameters, in the order of the groups.

    The truth is what the optimizer's groups and state hold, and where the parameters are, at this moment: whatever runs
    between two ops (a forward pass, a hook, the user) may change them, so :meth:`follow` looks each time. Only gradients
    and saved weights are the binding's own, for the length of a step.

    Args:
        source: whose ``param_groups`` and ``state`` are followed.
        base: whose state stands in the table beside the variant's.
        written: the columns of state that the variant writes.
        numbers: further entries of each state, 0-dim tensors.
        backend: ``"native"``, ``"triton"``, ``"reference"``; default: the fastest that is there.
    """

    def __init__(
        self,
        source: Source,
        base: StateOfBase,
        written: Sequence[str],
        backend: str | None,
        numbers: Sequence[str] = (),
    ) -> None:
        self._source, self._base, self._written, self._backend = source, base, written, backend
        self._numbers = tuple(numbers)
        masters = ("master_param",) if base.columns else ()
        self._entries = (*base.columns, *own_entries(written), *self._numbers, *masters)
        self._reads = base.reads
        self._filtered = [name for name in (*FILTERS, *hyper.STORAGE) if name in base.reads]
        self.params: list[Tensor] = []
        """Those that take part, one a row of the table: each once, and none that cannot train as it is."""
        self._others: list[tuple[int, Tensor]] = []
        """Those that cannot: integers, float8, meta, sparse, complex. They are not looked at, unless they get a gradient."""
        self._group: list[int] = []
        """The index of each row's group."""
        self.inside: list[bool] | None = None
        """The rows that the perturb filter takes; ``None``: all."""
        self.number: list[int] = []
        """The number of each row's parameter among all, as in a checkpoint."""
        self._filters: list[Any] = []
        self._table: TensorTable | None = None
        self._snapshot: Snapshot | None = None
        self.shards, self.masters = Whole(), Masters([])
        self._saved: dict[Tensor, Tensor] = {}
        """Where the weights of a parameter are saved while they are perturbed."""
        self._prepared: list[Any] = []
        """What :meth:`take` has already prepared for: it looks at single parameters only when something is new."""

    @property
    def groups(self) -> list[Group]:
        return self._source.param_groups

    @property
    def hyper(self) -> list[Group]:
        """The groups' hyper-parameters of now, without the entries that no step reads."""
        groups = [dict(g) for g in self.groups]
        for g in groups:
            for name in g.keys() - self._reads:
                del g[name]
        return groups

    @property
    def state(self) -> MutableMapping[Tensor, State]:
        return self._source.state

    @property
    def table(self) -> TensorTable:
        if self._table is None:
            self.follow()
        assert self._table is not None
        return self._table

    def follow(self) -> list[int | None] | None:
        """Takes up what has been changed outside since the last call. To be called when gradients are there, and before
        the weights move.

        Returns:
            Where there are other rows than before: the row that each had (``None``: it is new).
        """
        before: list[int | None] | None = None
        changes = self._changes()
        if changes & PARAMS or (changes & PLACES and not self._only_moved()):
            before = self._rebuild()
        elif changes & PLACES:
            self.table["w"] = self.weights()
        if changes:
            self._prepared = []
            self._set_state()
        if changes & (CONTENTS | STATE):
            self._renew_norms()
        if not any(self.table.perturbed):
            self.masters.follow()
        return before

    def gradients(self) -> Sequence[Tensor | None]:
        """Those of now, what this rank holds of them.

        Raises:
            TypeError: a gradient of a parameter of a kind that is not supported.
        """
        self._check_others()
        return self.shards.local(snapshot.gradients(self.params))

    def _check_others(self) -> None:
        """
        Raises:
            TypeError: as :meth:`gradients`.
        """
        for number, p in self._others:
            if p.grad is not None:
                raise TypeError(f"parameter {number} has a gradient, but is {kind(p)}: {UNSUPPORTED}")

    def take(self, column: str, writes: str | None = None, everywhere: bool = True) -> list[int | None] | None:
        """Puts the gradients of now into ``column``, and creates all the state, ``writes`` included, that the
        parameters which have one still lack. ``writes`` is for those inside the perturb filter, or for those outside too.
        Returns as :meth:`follow`."""
        before = self.follow()
        self._check_others()
        if not (self._whole and self.table.take_gradients(column, self.params)):
            self.table[column] = self.gradients()
        asked = (writes, [self._base.states(g) for g in self.groups], self.table.present(column))
        if asked not in self._prepared:
            inside = self.inside if not everywhere and self.inside else [True] * len(self.params)
            created = [
                self._prepare(row, writes if inside[row] else None)
                for row, p in enumerate(self.params)
                if p.grad is not None
            ]
            if any(created):
                self._set_state()
            self._prepared = [*self._prepared[-7:], asked]
        return before

    def etas(self) -> list[float | None] | None:
        """ASAM's eta of each row; see :func:`looksam.hyper.etas`."""
        if "adaptive" not in self._reads:
            return None
        etas = hyper.etas(self.groups)
        return etas and [etas[number] for number in self.number]

    @property
    def preconditions(self) -> bool:
        """Is the ascent preconditioned by the base?"""
        return "precondition" in self._reads and bool(self.groups[0]["precondition"])

    def make_backups(self, column: str) -> None:
        """Somewhere to save the weights that a perturbation along ``column`` moves."""
        table = self.table
        if table.is_full("b"):
            return
        rows = zip(self.params, table.present(column), table.present("b"), strict=True)
        new = {p: torch.empty_like(p) for p, moves, has_room in rows if moves and not has_room}
        if new:
            self._saved.update(new)
            self._set_saved([self.state.get(p, {}) for p in self.params])

    def restore(self) -> None:
        """The parameters hold, wherever they are now, what was saved when a step moved them."""
        if self._table is not None and any(self._table.perturbed):
            self._table["w"] = self.weights()
            ops.restore(self._table)

    def weights_changed(self, model: Module | None) -> None:
        """To be called after our own writes to the weights outside of a step: copies that others keep are out of date."""
        self.masters.written()
        torch.clear_autocast_cache()
        self.shards.reshard(model)

    def written(self) -> None:
        """To be called after our own writes to the state."""
        if self._snapshot is not None:
            self._snapshot.written()

    def drop(self, columns: Iterable[str]) -> None:
        """Forgets gradients."""
        if self._table is not None:
            for column in columns:
                self._table.drop(column)

    def _changes(self) -> int:
        if self._snapshot is None:
            return PARAMS | STATE
        changes = self._snapshot.changes(self.groups, self.state, None if self._whole else self.weights())
        if self._filters != self._filters_now() or (self._others and any(trains(p) for _, p in self._others)):
            changes |= PARAMS
        return changes

    def _filters_now(self) -> list[Any]:
        """The filters, which decide on the rows' hyper-parameters, and what decides on the table: copies, to be compared."""
        groups = self.groups
        return [list(f) if isinstance(f := g.get(name), list) else f for name in self._filtered for g in groups]

    def _only_moved(self) -> bool:
        """Are all weights of the dtype, device and shape that they had?"""
        return all(_alike(x, w) and trains(x) for x, w in zip(self.weights(), self.table["w"], strict=True))

    @property
    def _whole(self) -> bool:
        return type(self.shards) is Whole

    def _followed(self) -> Sequence[Tensor]:
        """Whose places the snapshot follows: the parameters themselves, or the shards that they hold."""
        return self.params if self._whole else self.weights()

    def weights(self) -> list[Tensor]:
        """The rows' parameters as they are now, what this rank holds of them."""
        return [w for w in self.shards.local([p.detach() for p in self.params]) if w is not None]

    def _rebuild(self) -> list[int | None] | None:
        """A new table for the parameters of now. Of a step under way it takes over what the rows that stay have got;
        those that go are restored first."""
        old, old_params, groups = self._table, self.params, self.groups
        self._source.settle()
        rows = _distinct(groups)
        scaled = hyper.row_groups(
            groups if "layer_filter" in self._reads else [{"params": g["params"]} for g in groups]
        )
        self._filters = self._filters_now()
        self._others = [(n, p) for p, _, n in rows if not trains(p)]
        rows = [row for row in rows if trains(row[0])]
        self.params, self._group = [p for p, _, _ in rows], [i for _, i, _ in rows]
        self.number = [n for _, _, n in rows]
        inside = hyper.inside(groups) if "perturb_filter" in self._reads else None
        self.inside = inside and [inside[n] for n in self.number]
        self.shards = shards_of(self.params)
        device = next(
            (p.device for p in (*self.params, *(p for p, _, _ in _distinct(groups))) if p.device.type != "meta"), None
        )
        self._table = table = TensorTable(
            self.weights(),
            [scaled[n] for n in self.number],
            backend=self._backend,
            device=device,
            rounding=hyper.rounding(groups) if "rounding" in self._reads else None,
        )
        stay = set(self.params)
        self._saved = {p: b for p, b in self._saved.items() if p in stay and _alike(b, p)}
        if old is None:
            return None
        place = {p: row for row, p in enumerate(old_params)}
        before = [place.get(p) for p in self.params]
        for p, row in place.items():
            if old.perturbed[row] and p not in stay:
                _local(p.detach()).copy_(old["b"][row])
        for column in set(old) - {"w", *self._entries}:
            stay_rows = [row if row is None or column != "b" or old.perturbed[row] else None for row in before]
            kept = [None if row is None else old[column][row] for row in stay_rows]
            table[column] = [x if x is None else x.to(w.device) for x, w in zip(kept, table["w"], strict=True)]
        table.perturbed = [row is not None and old.perturbed[row] for row in before]
        return before

    def _prepare(self, row: int, writes: str | None) -> bool:
        """Creates what the state of a parameter lacks. Was there anything?"""
        p, group = self.params[row], self.groups[self._group[row]]
        state = self.state.get(p, {})
        missing = dict(self._base.missing(p, group, state))
        if "master_param" in missing and self.table.perturbed[row]:
            _local(missing["master_param"]).copy_(self.table["b"][row])
        if writes is not None and any(state.get(name) is None for name in own_entries([writes])):
            short = writes in KEEP_NORM and group.get("q_dtype") == "bfloat16"
            dtype = torch.bfloat16 if short else torch.promote_types(p.dtype, torch.float32)
            missing[writes] = torch.zeros_like(p, dtype=dtype)
            if writes in KEEP_NORM:
                missing[f"{writes}_norm_sq"] = torch.zeros((), dtype=scalar_dtype(p.device), device=p.device)
        for name in self._numbers:
            if state.get(name) is None:
                missing[name] = torch.zeros((), dtype=scalar_dtype(p.device), device=p.device)
        if missing:
            self.state.setdefault(p, {}).update(missing)
        return bool(missing)

    def _set_state(self) -> None:
        """The columns of state are what the state holds now."""
        states = [self.state.get(p, {}) for p in self.params]
        self._check_shapes(states)
        for name in self._entries:
            if name == "master_param":
                continue
            self.table[name] = self.shards.local([self._entry(row, s, name) for row, s in enumerate(states)])
        self._set_saved(states)
        with_norm = own_entries(self._with_norm)
        contents = [x for name in with_norm for x in self.table[name] if x is not None]
        self._snapshot = snapshot.take(self.groups, self.state, self._followed(), self._entries, contents)

    def _check_shapes(self, states: list[State]) -> None:
        """
        Raises:
            ValueError: a parameter has been given another shape than its state has.
        """
        for row, (p, state) in enumerate(zip(self.params, states, strict=True)):
            for name in self._entries:
                x = state.get(name)
                if isinstance(x, Tensor) and not holds_scalars(name) and x.shape != p.shape:
                    raise ValueError(
                        f"parameter {self.number[row]} has the shape {tuple(p.shape)}, but its state {name!r} the shape "
                        f"{tuple(x.shape)}: after resizing a parameter, delete opt.state[p] or make a new optimizer"
                    )

    @property
    def _with_norm(self) -> list[str]:
        """The columns of state whose squared norms are kept beside them."""
        return [name for name in self._written if name in KEEP_NORM]

    def _renew_norms(self) -> None:
        """Kept norms are those of what the state holds now, which other code may have put there or written in place.
        A norm that is right but for rounding keeps its bits: a run that goes on from a checkpoint repeats itself."""
        for name in self._with_norm:
            for p, i in zip(self.params, self._group, strict=True):
                state = self.state.get(p, {})
                x, kept = state.get(name), state.get(f"{name}_norm_sq")
                if x is not None and kept is not None:
                    now = _norm_sq(x).to(kept.dtype)
                    right = (now - kept).abs() <= _rounding(p, self.groups[i], x.dtype) * kept
                    kept.copy_(torch.where(right, kept, now))

    def _set_saved(self, states: list[State]) -> None:
        """Column b: the master; else, of a row that is perturbed, what holds its weight; else where it will be saved."""
        table = self.table
        has = "master_param" in self._entries
        for i, state in zip(self._group, states, strict=True):
            if has and self.groups[i].get("rounding") is not None:
                state.pop("master_param", None)  # of a checkpoint, or of before it was given
        masters = [self._entry(row, s, "master_param") if has else None for row, s in enumerate(states)]
        rows = zip(self.params, self.shards.local(masters), table["b"], table.perturbed, strict=True)
        table["b"] = [
            m if m is not None else b if perturbed else _local(self._saved.get(p)) for p, m, b, perturbed in rows
        ]
        own = zip(self.params, table["w"], table["b"], masters, strict=True)
        self.masters = Masters((p, w, b) for p, w, b, master in own if master is not None)

    def _entry(self, row: int, state: State, name: str) -> Tensor | None:
        """
        Raises:
            TypeError, ValueError: it cannot belong to its parameter.
        """
        x, p = state.get(name), self.params[row]
        if name.endswith("_norm_sq"):  # counts only beside what it is the norm of, and can be made from that
            of = state.get(name.removesuffix("_norm_sq"))
            if x is None and isinstance(of, Tensor) and of.is_floating_point():
                state[name] = x = _norm_sq(of)
            x = None if of is None else x
        if x is None:
            return None
        if holds_scalars(name) and (not isinstance(x, Tensor) or x.device != p.device or not x.is_floating_point()):
            state[name] = x = (
                torch.as_tensor(x).to(p.device, torch.float32).reshape(())
            )  # counts stay on the host in torch
        where = f"the state of parameter {self.number[row]}: {name!r}"
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
            raise TypeError(f"{where} is {kind(x)}; it must be a dense tensor of real floating point numbers. {ANEW}")
        if x.device != p.device:
            raise ValueError(f"{where} is on {x.device}, the parameter on {p.device}; move it there. {ANEW}")
        if x.shape != (() if holds_scalars(name) else p.shape):
            raise ValueError(f"{where} has the shape {tuple(x.shape)}, the parameter {tuple(p.shape)}. {ANEW}")
        return x


ANEW = "An entry that is deleted begins anew."
UNSUPPORTED = "only dense parameters of a real floating point dtype of 16 to 64 bits can be trained"


def kind(x: Any) -> str:
    """What a message says of a value that is not as it should be."""
    return (
        f"a {x.dtype} tensor of layout {x.layout} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    )


def trains(p: Tensor) -> bool:
    """Can the ops update it? Others may be there as long as they are frozen."""
    return p.dtype in TRAINABLE and p.layout is torch.strided and p.device.type != "meta"


def own_entries(written: Iterable[str]) -> tuple[str, ...]:
    """The entries of a parameter's state that the columns a variant writes need."""
    return tuple(name for x in written for name in ((x, f"{x}_norm_sq") if x in KEEP_NORM else (x,)))


def _distinct(groups: list[Group]) -> list[tuple[Tensor, int, int]]:
    """Every parameter once, with its group's index and its number."""
    rows: dict[Tensor, tuple[Tensor, int, int]] = {}
    number = 0
    for i, group in enumerate(groups):
        for p in group["params"]:
            rows.setdefault(p, (p, i, number))
            number += 1
    return list(rows.values())


def _alike(x: Tensor, p: Tensor) -> bool:
    return x.dtype == p.dtype and x.device == p.device and x.shape == p.shape


def _rounding(p: Tensor, group: Group, dtype: torch.dtype) -> float:
    """How far ||q||^2 may be, as a part of it, from the sum that the step made. Where q is kept in a lower precision, that sum
    is of q before it was rounded to the dtype; where other code has rounded q, what it holds now counts."""
    of_sum = 1e-12 if p.dtype == torch.float64 else 1e-6
    if (
        dtype == torch.bfloat16 and group.get("q_dtype") == "bfloat16"
    ):  # every element is off by at most half an eps of it
        return (1 + torch.finfo(dtype).eps / 2) ** 2 - 1 + of_sum
    return of_sum


def _norm_sq(x: Tensor) -> Tensor:
    """||x||^2 of the whole tensor, of which this rank may hold a shard."""
    total = torch.linalg.vector_norm(x, dtype=scalar_dtype(x.device)).square()  # squares of bfloat16 would be rounded
    whole: Tensor = getattr(total, "full_tensor", lambda: total)()
    return whole


def _local(x: Any) -> Any:
    """What this rank holds of a tensor."""
    return getattr(x, "_local_tensor", x)
