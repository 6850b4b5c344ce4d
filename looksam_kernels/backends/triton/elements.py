"""What every kernel is made of: the elements of a column, and exact arithmetic on them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import inspect

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def kernel(function):
    """A kernel that is compiled once per set of constexprs: no argument's value or alignment is looked at."""
    parameters = inspect.signature(function).parameters.values()
    run_time = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=run_time)


# Columns ------------------------------------------------------------------------------------------------------------


@triton.jit
def locate(chunks, sizes, CHUNK: tl.constexpr):
    """This program's place: row, offsets of its elements, size of the row; and 1 if the chunk is full, else 0."""
    row = tl.load(chunks + tl.program_id(0))
    start = tl.load(chunks + tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * CHUNK
    size = tl.load(sizes + row)
    return (row, start + tl.arange(0, CHUNK), size), (start + CHUNK <= size).to(tl.int32)


@triton.jit
def elements(column, place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(column + place[0]).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, [16])
    return address + place[1]


@triton.jit
def load(column, place, TYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """0 beyond the end of the row. Only full chunks are read in 16-byte words: a mask forbids them."""
    if FULL:
        x = tl.load(elements(column, place, TYPE, ALIGNED))
    else:
        x = tl.load(elements(column, place, TYPE, ALIGNED), mask=place[1] < place[2], other=0.0)
    return x


@triton.jit
def store(column, place, x, TYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(elements(column, place, TYPE, ALIGNED), convert(x, TYPE))
    else:
        tl.store(elements(column, place, TYPE, ALIGNED), convert(x, TYPE), mask=place[1] < place[2])


@triton.jit
def convert(x, TYPE: tl.constexpr):
    """x rounded to the nearest number of the type; float64 to bfloat16 by way of float32, as in PyTorch. The interpreter would
    cut bfloat16 off, so the bits are rounded here."""
    if tl.bfloat16 == TYPE and x.dtype == tl.float64:
        x = x.to(tl.float32)
    if INTERPRETED and tl.bfloat16 == TYPE and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = bits.to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(TYPE)


@triton.jit
def load_each(columns, place, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """The columns' elements as a tuple; 0.0 for a column that is not there."""
    loaded = ()
    for i in tl.static_range(len(TYPES)):
        x = 0.0 if TYPES[i] is None else load(columns[i], place, TYPES[i], ALIGNED, FULL).to(ACC)
        loaded = loaded + (x,)  # noqa: RUF005 - Triton has no unpacking
    return loaded


@triton.jit
def combine(c, xs, row, rows, TYPES: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr):
    """sum_i c_i x_i. An input with c_i = 0 counts as 0 whatever it holds."""
    total = tl.full([CHUNK], 0.0, ACC)
    for i in tl.static_range(len(TYPES)):
        if TYPES[i] is not None:
            of_x = tl.load(c + i * rows + row).to(ACC)
            total += tl.where(of_x != 0, of_x * xs[i], 0.0)
    return total


@triton.jit
def stretch(w, eta):
    """ASAM's T = |w| + eta, 1 in rows where eta is negative."""
    return tl.where(eta < 0, 1.0, tl.abs(w) + eta)


@triton.jit
def number(numbers, i, row, rows, ACC: tl.constexpr):
    return tl.load(numbers + i * rows + row).to(ACC)


@triton.jit
def over_root(x, g, v, numbers, row, rows, ACC: tl.constexpr):
    """T x of a preconditioned ascent, T = 1 / (sqrt(v') + eps) with v' = numbers[0] v + numbers[1] g^2; 0 where the root is."""
    moment = number(numbers, 0, row, rows, ACC) * v + number(numbers, 1, row, rows, ACC) * g * g
    below = root(moment) * number(numbers, 2, row, rows, ACC) + number(numbers, 3, row, rows, ACC)
    return tl.where(below > 0, divide(x, below), 0.0)


@triton.jit
def mix(x):
    """:func:`looksam_kernels.masks.mix`."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def hashes(place, chunks, key, CHUNK: tl.constexpr):
    """:func:`looksam_kernels.masks.hashes` of this program's elements. key: uint32."""
    start = tl.load(chunks + tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * CHUNK
    here = mix(mix(key ^ place[0].to(tl.uint32, bitcast=True)) ^ (start >> 32).to(tl.uint32))
    index = (start & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, CHUNK).to(tl.uint32)
    return mix(mix(index ^ here) + here)


@triton.jit
def keeps(place, chunks, key, threshold, CHUNK: tl.constexpr):
    """The bits of :class:`looksam_kernels.Mask` for this program's elements."""
    return hashes(place, chunks, key.to(tl.uint32, bitcast=True), CHUNK) < threshold.to(tl.uint32, bitcast=True)


@triton.jit
def round_stochastically(x, place, chunks, key, OP: tl.constexpr, updates, CHUNK: tl.constexpr):
    """:class:`looksam_kernels.Rounding` of this program's elements, float32. key: int32; updates: float."""
    of_op = mix(key.to(tl.uint32, bitcast=True) ^ tl.full([], OP, tl.uint32))
    random = hashes(place, chunks, mix(of_op ^ updates.to(tl.uint32)), CHUNK) >> 16
    bits = x.to(tl.uint32, bitcast=True)
    moved = (bits + random) & 0xFFFF0000
    return tl.where((bits & 0x7FFFFFFF) >= 0x7F7F0000, bits, moved).to(tl.float32, bitcast=True)


# Arithmetic: Triton's own / and sqrt are approximate in float32 -------------------------------------------------------


@triton.jit
def divide(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def power(x, n):
    """x^n for whole n of at most 24 bits (a float32 counts no further), by squaring."""
    result = x * 0 + 1
    for _ in range(24):
        result = tl.where(n & 1 != 0, result * x, result)
        x = x * x
        n = n >> 1
    return result
