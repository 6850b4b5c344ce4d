"""Executes PTX on the CPU: every thread of every block, in numpy.

Threads at one instruction execute it together, and of several such groups the one furthest behind goes first, so that they meet
again where their ways join: what is counted for one block is the number of instructions on its longest path. Barriers wait for
all threads of a block. Blocks come in random order, and so do the threads that meet at an atomic operation. Shared memory and
registers begin with garbage; an access that is not aligned is an error.

Memory is that of this process. A fence does nothing here and is counted: there is no other order to be seen.
"""

from __future__ import annotations

import ctypes
import operator
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ptx import (
    SHARED_BASE,
    Immediate,
    Instruction,
    Kernel,
    Memory,
    Register,
    Special,
    Symbol,
    Vector,
    bits_of,
    dtype_of,
    unsigned,
)

THREADS = 256
"""kThreads of csrc/cuda/block.cuh."""

Lanes = Any
"""Which threads: their numbers, or ``slice(None)`` for all."""
Read = Callable[["Machine", Lanes], Any]
Write = Callable[["Machine", Lanes, Any], None]
Step = Callable[["Machine", Lanes], None]

_FIRST = 4096
_MEMORY = np.frombuffer((ctypes.c_ubyte * ((1 << 47) - _FIRST)).from_address(_FIRST), np.uint8)
"""All addresses but those of the first page."""
_BY_BYTES = {size: _MEMORY[: len(_MEMORY) // size * size].view(unsigned(8 * size)) for size in (1, 2, 4, 8)}


class Access(NamedTuple):
    """One instruction's accesses to global memory."""

    store: bool
    bytes: int
    """Of one thread."""
    addresses: NDArray[np.uint64]


class Machine:
    """One launch. ``arguments`` are the bytes of the kernel's parameter."""

    def __init__(self, kernel: Kernel, blocks: int, arguments: bytes, draws: random.Random) -> None:
        name, size = kernel.parameter
        assert size == len(arguments), f"{kernel.name} takes {size} bytes, not {len(arguments)}"
        self.kernel = kernel
        self.lanes = blocks * THREADS
        order = list(range(blocks))
        draws.shuffle(order)
        self.draws = draws
        self.block = np.arange(self.lanes) // THREADS
        self.special = {
            "tid.x": (np.arange(self.lanes) % THREADS).astype(np.uint32),
            "ctaid.x": np.array(order, np.uint32).repeat(THREADS),
            "nctaid.x": np.full(self.lanes, blocks, np.uint32),
        }
        self._arguments = (ctypes.c_ubyte * (size + 32)).from_buffer_copy(arguments + b"\xee" * 32)
        self.symbols = {name: ctypes.addressof(self._arguments), **kernel.shared}
        stride = (kernel.shared_bytes + 79) // 16 * 16
        self.shared = np.full(blocks * stride, 0xFF, np.uint8)
        self.shared_by_bytes = {size: self.shared.view(unsigned(8 * size)) for size in (1, 2, 4, 8)}
        self.shared_offset = (self.block * stride - SHARED_BASE).astype(np.int64)
        self.registers: dict[str, NDArray[Any]] = {}
        self.votes = np.zeros(self.lanes, bool)

        self.instructions = 0
        """Executed by one group of threads or another: on one block's longest path, if there is one block."""
        self.opcodes: Counter[str] = Counter()
        """The same by their opcodes."""
        self.accesses: list[Access] = []

    @property
    def barriers(self) -> int:
        """Passed by a thread of the first block."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(("bar.", "barrier.")))

    def register(self, name: str) -> NDArray[Any]:
        if name not in self.registers:
            bits = self.kernel.registers[name]
            self.registers[name] = np.full(self.lanes, 0xA5A5A5A5A5A5A5A5 & ((1 << bits) - 1), unsigned(bits))
        return self.registers[name]

    def run(self) -> None:
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        steps, labels = _steps(self.kernel), self.kernel.labels
        everyone = np.arange(self.lanes)
        ready: dict[int, NDArray[Any]] = {0: everyone} if self.lanes else {}
        waiting: dict[int, NDArray[Any]] = {}
        alive = self.lanes

        def go_on(place: int, lanes: NDArray[Any]) -> None:
            if len(lanes):
                ready[place] = np.concatenate([ready[place], lanes]) if place in ready else lanes

        while ready or waiting:
            if not ready:
                self._release(waiting, alive)
                ready = {place + 1: lanes for place, lanes in waiting.items()}
                waiting = {}
            place = min(ready)
            lanes = ready.pop(place)
            while True:  # until another group is further behind
                instruction = self.kernel.code[place]
                self.instructions += 1
                self.opcodes[".".join(instruction.opcode)] += 1
                kind, chosen, others = instruction.opcode[0], lanes, lanes[:0]
                if instruction.guard is not None:
                    holds = self.register(instruction.guard)[lanes].astype(bool) ^ instruction.negated
                    chosen, others = lanes[holds], lanes[~holds]
                if kind in ("bra", "ret", "exit", "bar", "barrier"):
                    break
                if len(chosen):
                    steps[place](self, slice(None) if len(chosen) == self.lanes else chosen)
                place += 1
                if place in ready:
                    lanes = np.concatenate([lanes, ready.pop(place)])
            if kind == "bra":
                go_on(labels[instruction.operands[0].name], chosen)
                go_on(place + 1, others)
            elif kind in ("ret", "exit"):
                alive -= len(chosen)
                go_on(place + 1, others)
            else:
                assert not len(others), f"a barrier on a condition: {instruction.text}"
                if "red" in instruction.opcode:
                    self.votes[chosen] = _read(self.kernel, instruction.operands[-1], "pred")(self, chosen)
                assert place not in waiting
                waiting[place] = chosen

    def _release(self, waiting: dict[int, NDArray[Any]], alive: int) -> None:
        """Every thread has ended or waits: those of one block must all be at one barrier."""
        for place, lanes in waiting.items():
            count = np.bincount(self.block[lanes], minlength=self.lanes // THREADS)
            assert np.isin(count, (0, THREADS)).all(), "some threads of a block end, or wait at another barrier"
            instruction = self.kernel.code[place]
            if "red" in instruction.opcode:
                how = {"or": np.any, "and": np.all}[instruction.opcode[instruction.opcode.index("red") + 1]]
                of_block = how(self.votes.reshape(-1, THREADS), axis=1)
                self.register(instruction.operands[0].name)[lanes] = of_block[self.block[lanes]]
            self.votes[lanes] = False


# Operands ---------------------------------------------------------------------------------------------------------------


def _read(kernel: Kernel, operand: Any, kind: str) -> Read:
    dtype, bits = dtype_of(kind), bits_of(kind)
    if isinstance(operand, Immediate):
        value = np.array([operand.value & ((1 << bits) - 1)], unsigned(bits)).view(dtype)[0]
        return lambda machine, lanes: value
    if isinstance(operand, Register):
        name = operand.name
        if kind == "pred":
            return lambda machine, lanes: machine.register(name)[lanes].astype(bool)
        if kernel.registers[name] == bits:
            return lambda machine, lanes: machine.register(name)[lanes].view(dtype)
        narrow = unsigned(bits)
        return lambda machine, lanes: machine.register(name)[lanes].astype(narrow).view(dtype)
    if isinstance(operand, Special):
        name = operand.name
        if name == "ntid.x":
            return lambda machine, lanes: dtype(THREADS)
        return lambda machine, lanes: machine.special[name][lanes].astype(dtype)
    if isinstance(operand, Symbol):
        name = operand.name
        return lambda machine, lanes: dtype(machine.symbols[name])
    raise NotImplementedError(f"{operand} as {kind}")


def _write(kernel: Kernel, operand: Any, kind: str) -> Write:
    assert isinstance(operand, Register), operand
    name, dtype, own = operand.name, dtype_of(kind), unsigned(kernel.registers[operand.name])

    def write(machine: Machine, lanes: Lanes, value: Any) -> None:
        value = np.asarray(value)
        if value.dtype != dtype:
            value = value.astype(dtype)
        if value.dtype.itemsize != own().itemsize:  # wider registers hold the value, with its sign
            value = value.astype(np.dtype(f"i{own().itemsize}") if kind[0] == "s" else own)
        machine.register(name)[lanes] = value.view(own)

    return write


def _places(kernel: Kernel, instruction: Instruction, operand: Memory, size: int) -> Callable[..., Any]:
    """Addresses, checked for their alignment to the whole access."""
    base, offset = _read(kernel, operand.base, "u64"), operand.offset

    def places(machine: Machine, lanes: Lanes) -> Any:
        address = np.asarray(base(machine, lanes)).astype(np.int64) + offset
        if address.ndim == 0:
            address = np.full(machine.lanes if isinstance(lanes, slice) else len(lanes), address)
        assert not (address % size).any(), f"misaligned: {instruction.text}"
        return address

    return places


# Instructions -----------------------------------------------------------------------------------------------------------

_COMPILED: dict[int, tuple[Kernel, Any]] = {}


class _Lazily(dict[int, Step]):
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __missing__(self, place: int) -> Step:
        instruction = self.kernel.code[place]
        try:
            self[place] = _step(self.kernel, instruction)
        except (KeyError, StopIteration) as error:
            raise NotImplementedError(instruction.text) from error
        return self[place]


def _steps(kernel: Kernel) -> dict[int, Step]:
    """What each instruction does, made when it is first executed."""
    if id(kernel) not in _COMPILED:
        _COMPILED[id(kernel)] = (kernel, _Lazily(kernel))
    steps: dict[int, Step] = _COMPILED[id(kernel)][1]
    return steps


def _step(kernel: Kernel, instruction: Instruction) -> Step:
    name = instruction.opcode[0]
    special = {
        "ld": _load,
        "st": _store,
        "atom": _atom,
        "setp": _compare,
        "mov": _move,
        "cvt": _convert,
        "mul": _multiply,
    }
    if name in ("membar", "fence"):
        return lambda machine, lanes: None
    if name in special:
        return special[name](kernel, instruction)
    if name in ("mad", "fma"):
        return _multiply_add(kernel, instruction)
    kind = instruction.kinds[-1]
    if name == "cvta":
        kind = "u64"
    elif name in ("selp", "and", "or", "xor", "not") and kind != "pred":
        kind = f"b{bits_of(kind)}"
    kinds = {
        "selp": (kind, kind, "pred"),
        "shl": (kind, "u32"),
        "shr": (kind, "u32"),
        "bfi": (kind, kind, "u32", "u32"),
    }
    target, *sources = instruction.operands
    reads = [_read(kernel, x, of) for x, of in zip(sources, kinds.get(name, (kind,) * len(sources)), strict=True)]
    write, function = _write(kernel, target, kind), _FUNCTIONS[name]
    return lambda machine, lanes: write(machine, lanes, function(*[read(machine, lanes) for read in reads]))


def _divide(x: Any, y: Any) -> Any:
    return x / y if np.asarray(x).dtype.kind == "f" else x // np.where(y == 0, 1, y)


def _least(x: Any, y: Any) -> Any:
    return np.fmin(x, y) if np.asarray(x).dtype.kind == "f" else np.minimum(x, y)


def _most(x: Any, y: Any) -> Any:
    return np.fmax(x, y) if np.asarray(x).dtype.kind == "f" else np.maximum(x, y)


def _shift(way: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def shift(x: Any, count: Any) -> Any:
        """By the width or more: all bits are gone, or the sign's."""
        x = np.asarray(x)
        width = 8 * x.dtype.itemsize
        shifted = way(x, np.minimum(count, width - 1).astype(x.dtype))
        return shifted if x.dtype.kind == "i" else np.where(count >= width, x.dtype.type(0), shifted)

    return shift


def _insert(field: Any, into: Any, position: Any, length: Any) -> Any:
    """bfi, whose position and length are constants here."""
    dtype = np.asarray(into).dtype.type
    mask = ((1 << int(length)) - 1) << int(position)
    everything = (1 << 8 * dtype().itemsize) - 1
    return (into & dtype(~mask & everything)) | ((field << dtype(position)) & dtype(mask))


def _permute(x: Any, y: Any, selector: Any) -> Any:
    """prmt: each nibble of the constant selector names the byte of y:x that goes there."""
    both = np.asarray(x).astype(np.uint64) | (np.asarray(y).astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.shape(both), np.uint32)
    for place in range(4):
        chosen = int(selector) >> 4 * place & 15
        assert chosen < 8, "the sign of a byte"
        result |= (both >> np.uint64(8 * chosen) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * place)
    return result


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "div": _divide,
    "rem": lambda x, y: x % np.where(y == 0, 1, y),
    "min": _least,
    "max": _most,
    "abs": np.abs,
    "neg": operator.neg,
    "not": np.invert,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "sqrt": np.sqrt,
    "rcp": lambda x: x.dtype.type(1) / x,
    "selp": lambda x, y, which: np.where(which, x, y),
    "shl": _shift(operator.lshift),
    "shr": _shift(operator.rshift),
    "bfi": _insert,
    "prmt": _permute,
    "cvta": lambda x: x,
}


def _multiply(kernel: Kernel, instruction: Instruction) -> Step:
    kind = instruction.kinds[-1]
    assert "hi" not in instruction.opcode, instruction.text
    target, x, y = instruction.operands
    result = f"{kind[0]}{2 * bits_of(kind)}" if "wide" in instruction.opcode else kind
    dtype = dtype_of(result)
    read_x, read_y, write = _read(kernel, x, kind), _read(kernel, y, kind), _write(kernel, target, result)
    return lambda machine, lanes: write(
        machine,
        lanes,
        np.asarray(read_x(machine, lanes)).astype(dtype) * np.asarray(read_y(machine, lanes)).astype(dtype),
    )


def _multiply_add(kernel: Kernel, instruction: Instruction) -> Step:
    """fma of float32 has one rounding in float64, and then one: the second hardly ever differs from a single one. That of
    float64 is made in long double, which is not exact either."""
    kind = instruction.kinds[-1]
    target, x, y, z = instruction.operands
    result = f"{kind[0]}{2 * bits_of(kind)}" if "wide" in instruction.opcode else kind
    within = {"f32": np.float64, "f64": np.longdouble}.get(kind, dtype_of(result))
    reads = [_read(kernel, x, kind), _read(kernel, y, kind), _read(kernel, z, result)]
    write = _write(kernel, target, result)

    def step(machine: Machine, lanes: Lanes) -> None:
        a, b, c = (np.asarray(read(machine, lanes)).astype(within) for read in reads)
        write(machine, lanes, a * b + c)

    return step


_HOLDS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


def _compare(kernel: Kernel, instruction: Instruction) -> Step:
    kind, name = instruction.kinds[-1], instruction.opcode[1]
    target, *sources = instruction.operands
    reads = [_read(kernel, x, kind) for x in sources[:2]]
    more = [_read(kernel, x, "pred") for x in sources[2:]]
    join = _FUNCTIONS[instruction.opcode[2]] if more else None
    write = _write(kernel, target, "pred")

    def floating(x: Any, y: Any) -> Any:
        unordered = np.isnan(x) | np.isnan(y)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        return _HOLDS[name[:2]](x, y) | unordered if len(name) == 3 else _HOLDS[name](x, y) & ~unordered

    holds = floating if kind[0] == "f" else _HOLDS[name]

    def step(machine: Machine, lanes: Lanes) -> None:
        result = holds(*[read(machine, lanes) for read in reads])
        write(machine, lanes, join(result, more[0](machine, lanes)) if join is not None else result)

    return step


def _move(kernel: Kernel, instruction: Instruction) -> Step:
    kind = instruction.kinds[-1]
    target, source = instruction.operands
    bits = bits_of(kind)
    whole = kind if kind == "pred" else f"b{bits}"
    if isinstance(target, Vector):
        part = bits // len(target.parts)
        read, writes = _read(kernel, source, whole), [_write(kernel, x, f"b{part}") for x in target.parts]

        def unpack(machine: Machine, lanes: Lanes) -> None:
            value = read(machine, lanes)
            for i, write in enumerate(writes):
                write(machine, lanes, (value >> unsigned(bits)(i * part)).astype(unsigned(part)))

        return unpack
    write = _write(kernel, target, whole)
    if isinstance(source, Vector):
        part = bits // len(source.parts)
        reads = [_read(kernel, x, f"b{part}") for x in source.parts]

        def pack(machine: Machine, lanes: Lanes) -> None:
            value: Any = unsigned(bits)(0)
            for i, read in enumerate(reads):
                value = value | (read(machine, lanes).astype(unsigned(bits)) << unsigned(bits)(i * part))
            write(machine, lanes, value)

        return pack
    read_one = _read(kernel, source, whole)
    return lambda machine, lanes: write(machine, lanes, read_one(machine, lanes))


def _convert(kernel: Kernel, instruction: Instruction) -> Step:
    to, of = instruction.kinds[-2:]
    target, source = instruction.operands
    read, write, dtype = _read(kernel, source, of), _write(kernel, target, to), dtype_of(to)
    if of[0] == "f" and to[0] in "su":
        assert "rzi" in instruction.opcode, instruction.text
        low, high = (int(x) for x in (np.iinfo(dtype).min, np.iinfo(dtype).max))

        def saturated(value: float) -> int:
            return 0 if value != value else high if value >= high else low if value <= low else int(value)

        def step(machine: Machine, lanes: Lanes) -> None:
            write(machine, lanes, np.array([saturated(float(x)) for x in np.atleast_1d(read(machine, lanes))], dtype))

        return step
    if of[0] == "f" and to[0] == "f":
        rounding = {"rn"} if bits_of(to) < bits_of(of) else set()
        assert set(instruction.opcode[1:-2]) == rounding, instruction.text
    return lambda machine, lanes: write(machine, lanes, np.asarray(read(machine, lanes)).astype(dtype))


def _parts(operand: Any) -> tuple[Any, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _memory_of(instruction: Instruction, places: Callable[..., Any], store: bool, each: int, count: int) -> Any:
    """-> the memory, in elements of ``each`` bytes, and the index of the first element of every thread."""
    space = set(instruction.opcode) & {"shared", "param"}

    def find(machine: Machine, lanes: Lanes) -> tuple[NDArray[Any], NDArray[Any]]:
        address = places(machine, lanes)
        if space == {"shared"}:
            inside = (address >= SHARED_BASE) & (address + each * count <= SHARED_BASE + machine.kernel.shared_bytes)
            assert inside.all(), f"outside of shared memory: {instruction.text}"
            return machine.shared_by_bytes[each], (address + machine.shared_offset[lanes]) // each
        assert (address >= _FIRST).all(), f"at a null pointer: {instruction.text}"
        if not space:
            machine.accesses.append(Access(store, each * count, address.astype(np.uint64)))
        return _BY_BYTES[each], (address - _FIRST) // each

    return find


def _load(kernel: Kernel, instruction: Instruction) -> Step:
    kind = instruction.kinds[-1]
    target, source = instruction.operands
    each, writes = bits_of(kind) // 8, [_write(kernel, x, kind) for x in _parts(target)]
    places = _places(kernel, instruction, source, each * len(writes))
    find, dtype = _memory_of(instruction, places, False, each, len(writes)), dtype_of(kind)

    def step(machine: Machine, lanes: Lanes) -> None:
        memory, first = find(machine, lanes)
        for i, write in enumerate(writes):
            write(machine, lanes, memory[first + i].view(dtype))

    return step


def _store(kernel: Kernel, instruction: Instruction) -> Step:
    bits = bits_of(instruction.kinds[-1])
    target, source = instruction.operands
    reads = [_read(kernel, x, f"b{bits}") for x in _parts(source)]
    places = _places(kernel, instruction, target, bits // 8 * len(reads))
    find = _memory_of(instruction, places, True, bits // 8, len(reads))

    def step(machine: Machine, lanes: Lanes) -> None:
        memory, first = find(machine, lanes)
        for i, read in enumerate(reads):
            memory[first + i] = read(machine, lanes)

    return step


def _atom(kernel: Kernel, instruction: Instruction) -> Step:
    assert {"global", "add"} <= set(instruction.opcode), instruction.text
    kind = instruction.kinds[-1]
    target, place, addend = instruction.operands
    places, read = _places(kernel, instruction, place, bits_of(kind) // 8), _read(kernel, addend, kind)
    write, dtype = _write(kernel, target, kind), dtype_of(kind)

    def step(machine: Machine, lanes: Lanes) -> None:
        address = places(machine, lanes)
        addends, before = np.broadcast_to(read(machine, lanes), len(address)), np.empty(len(address), dtype)
        memory = _BY_BYTES[bits_of(kind) // 8].view(dtype)
        for thread in machine.draws.sample(range(len(address)), len(address)):
            index = (address[thread] - _FIRST) // dtype().itemsize
            before[thread] = memory[index]
            memory[index] += addends[thread]
        write(machine, lanes, before)

    return step
