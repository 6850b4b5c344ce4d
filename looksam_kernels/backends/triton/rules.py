"""A rule as a Triton function: formulas.py runs once, on symbols, and each operation becomes a line of the function.

So the formulas stand in one place, and a rule of a user's own runs in the kernel ``evaluate`` too. A rule that does more
than symbols can (see :class:`Symbol`) is evaluated by the reference.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch

from looksam_kernels import formulas
from looksam_kernels.formulas import Groups, Hyper, Pair, Scaling, Sums

OPERATIONS = {
    "pair": "tl.load(values + {0} * rows + row, mask=mask, other=0.0)",
    "row": "tl.load(hyper + {0} * groups + tl.load(group + row, mask=mask, other=0))",
    "common": "tl.load(hyper + {0} * groups)",
    "total": "t{0}",
    "number": "tl.full([], {0!r}, tl.float64)",
    "inv_scale": "inv_scale",
    "found_inf": "found_inf",
    "add": "x{0} + x{1}",
    "sub": "x{0} - x{1}",
    "mul": "x{0} * x{1}",
    "div": "x{0} / x{1}",
    "neg": "-x{0}",
    "sqrt": "tl.sqrt(x{0})",
    "abs": "tl.abs(x{0})",
    "gt": "x{0} > x{1}",
    "ge": "x{0} >= x{1}",
    "lt": "x{0} < x{1}",
    "le": "x{0} <= x{1}",
    "eq": "x{0} == x{1}",
    "ne": "x{0} != x{1}",
    "and": "x{0} & x{1}",
    "or": "x{0} | x{1}",
    "not": "x{0} == 0",
    "where": "tl.where(x{0}, x{1}, x{2})",
}
"""In Triton, for float64 and bool. The first are leaves: the i-th sum of the row, the i-th hyper-parameter of the row's group and
of the first group, the i-th total, ...; the others take the results of earlier lines, x0, x1, ..."""
LEAVES = frozenset(("pair", "row", "common", "total", "number", "inv_scale", "found_inf"))
HEAD = "def rule(values, hyper, group, inv_scale, found_inf, coefficients, rows, groups, BLOCK: tl.constexpr):"
ROWS = ("for start in range(0, rows, BLOCK):", "    row = start + tl.arange(0, BLOCK)", "    mask = row < rows")

Instruction = tuple[Any, ...]
"""The name of an operation and its arguments."""


class Read(NamedTuple):
    """A hyper-parameter that a program reads, one number a group."""

    name: str
    read: Callable[[Mapping[str, Any], str], Any]


class Program(NamedTuple):
    source: str
    """Of a function that loops over blocks of rows: for totals, then for totals that need these, ..., then for the coefficients."""
    reads: tuple[Read, ...]
    fixed: tuple[tuple[str, Any, Any], ...]
    """Name, default and value of the common hyper-parameters that are no numbers: with others it is another program."""
    counts: tuple[int, int, int, int, int]
    """How many of its numbers a row are coefficients of d, of what is written, of what is added, trust ratios, and kept."""

    def fits(self, groups: Groups) -> bool:
        return all(_fixed(groups, name, default) == value for name, default, value in self.fixed)


LIMIT = Read("max_grad_norm", getitem)
"""Not from the groups, but from the scaling."""
NUMBER = "a number"


def program(rule: str, pairs: tuple[Pair, ...], groups: Groups, scaling: Scaling) -> Program | None:
    """The program of a rule; ``None`` if it has none."""
    trace = _Trace(groups)
    limit: Any = None if scaling.max_grad_norm is None else trace.read("common", LIMIT)
    inv_scale = trace.number(1.0) if scaling.grad_scale is None else trace.symbol("inv_scale")
    sums: Any = Sums(pairs, tuple(trace.symbol("pair", i, per_row=True) for i in range(len(pairs))))  # type: ignore[arg-type]
    found_inf: Any = trace.symbol("found_inf")
    try:
        hyper = _Symbols(trace, inv_scale)
        (d, q, post, kept), trust = formulas.coefficients_of(
            rule, sums, hyper, found_inf, scaling._replace(max_grad_norm=limit)
        )
    except Exception:
        return None  # the reference runs the formula itself, and raises what is to be raised
    each = [d, q or (), post or (), () if trust is None else (trust,), () if kept is None else (kept,)]
    results = [trace.of(x) for rows in each for x in rows]
    source = "".join(f"{line}\n" for line in (HEAD, *(f"    {x}" for x in trace.lines([x.index for x in results]))))
    return Program(source, tuple(trace.reads), tuple(trace.fixed), _counts(each))


def _counts(each: Sequence[Sequence[Any]]) -> tuple[int, int, int, int, int]:
    d, q, post, trust, kept = map(len, each)
    return d, q, post, trust, kept


@functools.lru_cache(maxsize=256)
def function(source: str) -> Any:
    """The source as a function for kernels."""
    import triton
    import triton.language as tl

    file = f"<rule {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # where inspect looks
    scope: dict[str, Any] = {"tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope["rule"])


class _Trace:
    """The instructions so far, each once."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.instructions: dict[Instruction, int] = {}
        self.reads: dict[Read, int] = {}
        self.fixed: dict[tuple[str, Any, Any], None] = {}

    def symbol(self, name: str, *arguments: Any, per_row: bool = False) -> Symbol:
        instruction = (name, *arguments)
        return Symbol(self, self.instructions.setdefault(instruction, len(self.instructions)), per_row)

    def number(self, x: float) -> Symbol:
        return self.symbol("number", float(x))

    def read(self, kind: str, what: Read) -> Symbol:
        return self.symbol(kind, self.reads.setdefault(what, len(self.reads)), per_row=kind == "row")

    def of(self, x: Any) -> Symbol:
        """
        Raises:
            TypeError: a tensor, or what is no number at all.
        """
        if isinstance(x, Symbol):
            return x
        if isinstance(x, (int, float)):
            return self.number(x)
        raise TypeError(f"no program can take a {type(x).__name__}")

    def lines(self, results: Sequence[int]) -> list[str]:
        """The body of the function."""
        listed = list(self.instructions)
        depth: list[int] = []
        for name, *arguments in listed:
            before = [depth[arguments[0]] + 1] if name == "total" else [depth[i] for i in _operands(name, arguments)]
            depth.append(max(before, default=0))
        added = {x[1] for x in listed if x[0] == "total"}
        lines = []
        for level in range(max(depth, default=0)):
            summands = [i for i in sorted(added) if depth[i] == level]
            lines += [f"p{i} = tl.full([BLOCK], 0.0, tl.float64)" for i in summands]
            lines += [*ROWS, *(f"    {line}" for line in _needed(listed, summands))]
            lines += [f"    p{i} += tl.where(mask, x{i}, 0.0)" for i in summands]
            lines += [f"t{i} = tl.sum(p{i})" for i in summands]
        lines += [*ROWS, *(f"    {line}" for line in _needed(listed, results))]
        return lines + [
            f"    tl.store(coefficients + {n} * rows + row, x{i}, mask=mask)" for n, i in enumerate(results)
        ]


def _needed(listed: list[Instruction], wanted: Sequence[int]) -> list[str]:
    """The lines for the wanted numbers, where totals are known as far as they are needed."""
    needed: set[int] = set()
    todo = list(wanted)
    while todo:
        if (i := todo.pop()) not in needed:
            needed.add(i)
            name, *arguments = listed[i]
            todo += _operands(name, arguments)
    return [f"x{i} = {OPERATIONS[listed[i][0]].format(*listed[i][1:])}" for i in sorted(needed)]


def _operands(name: str, arguments: list[Any]) -> list[int]:
    return [] if name in LEAVES else arguments


class Symbol:
    """A number a row, or one for all rows: what a formula gets in place of a tensor.

    It knows ``+ - * /``, whole powers, comparisons, ``& | ~``, ``where``, ``sqrt``, ``square``, ``abs``, ``neg``, ``clamp``,
    ``maximum``, ``minimum``, and ``sum`` over the rows. Anything else raises, and so does a question for its value.
    """

    __slots__ = ("index", "per_row", "trace")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: _Trace, index: int, per_row: bool) -> None:
        self.trace, self.index, self.per_row = trace, index, per_row

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name == "stack":
            return tuple(args[0])
        if name == "where":
            return _where(*args, **kwargs)
        if name not in FUNCTIONS or not isinstance(args[0], Symbol):
            raise TypeError(f"no program can do torch.{name}")
        return getattr(args[0], name)(*args[1:], **kwargs)

    def _new(self, name: str, *others: Any) -> Symbol:
        operands = [self, *map(self.trace.of, others)]
        return self.trace.symbol(name, *(x.index for x in operands), per_row=any(x.per_row for x in operands))

    def _is(self, x: float) -> bool:
        return ("number", x) in self.trace.instructions and self.trace.instructions["number", x] == self.index

    def __add__(self, other: Any) -> Symbol:
        return self._new("add", other)

    def __radd__(self, other: Any) -> Symbol:
        return self.trace.of(other) + self

    def __sub__(self, other: Any) -> Symbol:
        return self._new("sub", other)

    def __rsub__(self, other: Any) -> Symbol:
        return self.trace.of(other) - self

    def __mul__(self, other: Any) -> Symbol:
        other = self.trace.of(other)
        if self._is(1.0) or other._is(1.0):  # exact: the bits are the other's
            one, x = (self, other) if self._is(1.0) else (other, self)
            return Symbol(self.trace, x.index, one.per_row or x.per_row)
        return self._new("mul", other)

    def __rmul__(self, other: Any) -> Symbol:
        return self.trace.of(other) * self

    def __truediv__(self, other: Any) -> Symbol:
        return self._new("div", other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self.trace.of(other) / self

    def __pow__(self, n: Any) -> Symbol:
        if n not in (0, 1, 2):
            raise TypeError("no program can do other powers")
        return (self.trace.number(1.0), self, self * self)[int(n)]

    def __neg__(self) -> Symbol:
        return self._new("neg")

    def __invert__(self) -> Symbol:
        return self._new("not")

    def __and__(self, other: Any) -> Symbol:
        return self._new("and", other)

    def __or__(self, other: Any) -> Symbol:
        return self._new("or", other)

    def __gt__(self, other: Any) -> Symbol:
        return self._new("gt", other)

    def __ge__(self, other: Any) -> Symbol:
        return self._new("ge", other)

    def __lt__(self, other: Any) -> Symbol:
        return self._new("lt", other)

    def __le__(self, other: Any) -> Symbol:
        return self._new("le", other)

    def __eq__(self, other: object) -> Any:
        return self._new("eq", other)

    def __ne__(self, other: object) -> Any:
        return self._new("ne", other)

    def __bool__(self) -> bool:
        raise TypeError("a formula cannot ask for a value: use torch.where")

    def sqrt(self) -> Symbol:
        return self._new("sqrt")

    def square(self) -> Symbol:
        return self * self

    def abs(self) -> Symbol:
        return self._new("abs")

    def neg(self) -> Symbol:
        return -self

    def sum(self) -> Symbol:
        if not self.per_row:
            return self
        return self.trace.symbol("total", self.index)

    def expand_as(self, other: Symbol) -> Symbol:
        return Symbol(self.trace, self.index, self.per_row or other.per_row)

    def clamp(self, min: Any = None, max: Any = None) -> Symbol:
        x = self if min is None else _where(self < min, min, self)
        return x if max is None else _where(x > max, max, x)

    def maximum(self, other: Any) -> Symbol:
        """NaN if either is."""
        return _where(self >= other, self, _where(self < other, other, self + other))

    def minimum(self, other: Any) -> Symbol:
        return _where(self <= other, self, _where(self > other, other, self + other))


FUNCTIONS = frozenset(("sqrt", "square", "abs", "neg", "sum", "clamp", "maximum", "minimum"))
"""What ``torch.<name>(x, ...)`` may be."""


def _where(condition: Symbol, a: Any, b: Any) -> Symbol:
    return condition._new("where", a, b)


class _Symbols(Hyper):
    """Hyper-parameters as symbols; what else :class:`Hyper` has is not there."""

    def __init__(self, trace: _Trace, inv_scale: Any) -> None:
        self.trace, self.inv_scale = trace, inv_scale

    def row(self, name: str, read: Callable[[Mapping[str, Any], str], Any] = getitem) -> Any:
        return self.trace.read("row", Read(name, read))

    def sign(self) -> Any:
        return self.trace.read("row", SIGN)

    def common(self, name: str, default: Any = None) -> Any:
        value = _fixed(self.trace.groups, name, default)
        self.trace.fixed[name, default, value] = None
        if value is not NUMBER:
            return value
        return self.trace.read("common", Read(name, _or(default)))


@functools.lru_cache(maxsize=64)
def _or(default: Any) -> Callable[[Mapping[str, Any], str], Any]:
    """Reads a hyper-parameter, or the default where it is not there."""
    return lambda group, name: group.get(name, default)


SIGN = Read("maximize", lambda group, name: -1.0 if group.get(name, False) else 1.0)


def _fixed(groups: Groups, name: str, default: Any) -> Any:
    """The value of a common hyper-parameter where it is no number."""
    value = groups[0].get(name, default) if groups else default
    is_number = isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
    return NUMBER if is_number else value
