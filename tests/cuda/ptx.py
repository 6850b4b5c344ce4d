"""The PTX that nvcc makes of a kernel, read into instructions. Only what csrc/cuda compiles to is known; all else is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

SHARED_BASE = 4096
"""Where a block's shared memory begins among shared addresses: no variable in it has the address 0."""

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def bits_of(kind: str) -> int:
    """Of a type like ``u32``; a predicate takes a byte."""
    return 8 if kind == "pred" else int(kind[1:])


def dtype_of(kind: str) -> Any:
    table = _FLOAT if kind[0] == "f" else _SIGNED if kind[0] == "s" else _UNSIGNED
    return np.bool_ if kind == "pred" else table[bits_of(kind)]


def unsigned(bits: int) -> Any:
    return _UNSIGNED[bits]


class Register(NamedTuple):
    name: str


class Special(NamedTuple):
    """``tid.x`` and its like."""

    name: str


class Immediate(NamedTuple):
    value: int
    """Its bits, those of a floating point number too."""


class Symbol(NamedTuple):
    """A label, a parameter or a variable in shared memory."""

    name: str


class Vector(NamedTuple):
    parts: tuple[Any, ...]


class Memory(NamedTuple):
    base: Any
    offset: int


class Instruction(NamedTuple):
    opcode: tuple[str, ...]
    """Its parts: ``ld.global.v4.u32`` has four."""
    operands: tuple[Any, ...]
    guard: str | None
    """The predicate on which it depends."""
    negated: bool
    text: str

    @property
    def kinds(self) -> list[str]:
        """The types among the parts of the opcode."""
        return [part for part in self.opcode[1:] if re.fullmatch(r"[bsuf](8|16|32|64)|pred", part)]


class Kernel(NamedTuple):
    name: str
    """Mangled."""
    parameter: tuple[str, int]
    """The name and the bytes of the one that all our kernels have."""
    shared: dict[str, int]
    """Where each variable of the block lies."""
    shared_bytes: int
    registers: dict[str, int]
    """The bits of each."""
    code: list[Instruction]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.entry\s+(?P<name>\w+)\((?P<parameters>.*?)\)[^{]*\{(?P<body>.*?)\n\}", re.DOTALL)
_SHARED = re.compile(r"\.shared \.align (?P<align>\d+) \.(?P<kind>\w+) (?P<name>[\w$]+)(\[(?P<count>\d+)\])?")
_PARAMETER = re.compile(r"\.param \.align \d+ \.b8 (\w+)\[(\d+)\]")
_REGISTERS = re.compile(r"\.reg \.(?P<kind>\w+) %?(?P<name>\w+)(<(?P<count>\d+)>)?")


class Module:
    """The kernels of one file by their mangled names, each read when it is first asked for."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        self._of_module = [found.groupdict() for found in _SHARED.finditer(_ENTRY.sub("", text))]
        self._entries = {found["name"]: found for found in _ENTRY.finditer(text)}
        self._kernels: dict[str, Kernel] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = _kernel(self._entries[name], self._of_module)
        return self._kernels[name]


def _kernel(found: re.Match[str], of_module: list[dict[str, Any]]) -> Kernel:
    parameter = _PARAMETER.fullmatch(" ".join(found["parameters"].split()))
    assert parameter, f"{found['name']}: one parameter is expected, not {found['parameters']}"
    variables, registers, code, labels = list(of_module), {}, [], {}
    scopes: list[dict[str, str]] = []  # of inline assembly, whose registers have names of their own
    for line in found["body"].split("\n"):
        line = " ".join(line.split())
        while label := re.match(r"([$\w]+):", line):
            labels[label[1]] = len(code)
            line = line[label.end() :].strip()
        if line.startswith("{"):
            scopes.append({})
            line = line[1:].strip()
        closes = line == "}"
        line = line.rstrip("; }") if not re.search(r"\{.*\}", line) else line.rstrip("; ")
        if line.startswith(".reg"):
            _declare(line, registers, scopes, len(code))
        elif line.startswith(".shared"):
            variable = _SHARED.match(line)
            assert variable, line
            variables.append(variable.groupdict())
        elif line and not line.startswith("."):
            for scope in scopes:
                line = re.sub(r"%(\w+)", lambda name, scope=scope: "%" + scope.get(name[1], name[1]), line)
            code.append(_instruction(line))
        if closes:
            scopes.pop()
    shared, end = {}, SHARED_BASE
    for variable in variables:
        align = int(variable["align"])
        end = (end + align - 1) // align * align
        shared[variable["name"]] = end
        end += int(variable["count"] or 1) * bits_of(variable["kind"]) // 8
    name, size = parameter[1], int(parameter[2])
    return Kernel(found["name"], (name, size), shared, end - SHARED_BASE, registers, code, labels)


def _declare(line: str, registers: dict[str, int], scopes: list[dict[str, str]], place: int) -> None:
    declared = _REGISTERS.match(line)
    assert declared, line
    name, bits = declared["name"], bits_of(declared["kind"])
    if declared["count"]:
        registers.update({f"{name}{i}": bits for i in range(int(declared["count"]))})
    else:
        if scopes:
            scopes[-1][name] = f"{name}@{place}"
            name = f"{name}@{place}"
        registers[name] = bits


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(?P<not>!?)%(?P<name>[\w@]+)\s+", text)
    rest = text[guard.end() :] if guard else text
    opcode = re.match(r"[\w.:]+", rest)
    assert opcode, text
    operands = tuple(_operand(part) for part in _split(rest[opcode.end() :]))
    name = guard["name"] if guard else None
    return Instruction(tuple(opcode[0].split(".")), operands, name, bool(guard and guard["not"]), text)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text) if part.strip()]


def _operand(text: str) -> Any:
    if text.startswith("{"):
        return Vector(tuple(_operand(part) for part in _split(text[1:-1])))
    if text.startswith("["):
        place = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\w+))?\]", text)
        assert place, text
        return Memory(_operand(place[1].strip()), int(place[2] or "0", 0))
    if text.startswith("%"):
        name = text[1:]
        return Special(name) if re.match(r"(tid|ntid|ctaid|nctaid)\.", name) else Register(name)
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?\d\w*", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
