"""The ops on the device: one Triton kernel an op, its formula in its docstring.

A program works on one *chunk* (``CHUNK`` consecutive elements of one row) and finds it in ``chunks``, int32
[2, programs]: the row, and which of its chunks. All rows of a launch are of one *bucket*: the same element types, the
same columns present. A column is a table of addresses, int64 [rows], with its element type as a constexpr, ``None``
where the bucket has no such tensor. Coefficients are float64 [inputs, rows], hyper-parameters float64 [names, groups].

Arithmetic is in ``ACC``, float64 for float64 parameters and float32 for all others. Nothing is added up by atomics:
a program stores its partial sum by the index of its chunk, and a second kernel adds them in a fixed order in float64.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import triton
import triton.language as tl

from looksam_kernels.backends.triton.base_updates import UPDATES as UPDATES
from looksam_kernels.backends.triton.base_updates import lamb_direction
from looksam_kernels.backends.triton.elements import (
    combine,
    convert,
    keeps,
    kernel,
    load,
    load_each,
    locate,
    over_root,
    round_stochastically,
    store,
    stretch,
)
from looksam_kernels.rounding import OPS as rounding_ops

ADD_BLOCK = tl.constexpr(256)
"""How many partial sums are added at a time."""
PERTURB = tl.constexpr(rounding_ops["perturb"])
STEP = tl.constexpr(rounding_ops["step"])


# Sums -----------------------------------------------------------------------------------------------------------------


@kernel
def inner_products(
    columns,
    of_t,
    numbers,
    partials,
    chunks,
    sizes,
    rows,
    TYPES: tl.constexpr,
    STRETCHED: tl.constexpr,
    OF_T: tl.constexpr,
    GRADIENT: tl.constexpr,
    PAIRS: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partials[i, chunk] = sum_j x_j y_j over the chunk, (x, y) the i-th pair of columns; 0 where either is not there.

    STRETCHED: which columns are multiplied by T. OF_T: the type of the column that T is made of, with the numbers of each row:
    w and eta of :func:`stretch`; or, where GRADIENT says which of the columns is g, v of :func:`over_root`. A pair ``None`` is
    not this kernel's.
    """
    place, full = locate(chunks, sizes, CHUNK)
    for FULL in tl.static_range(2):
        if full == FULL:
            xs = load_each(columns, place, TYPES, ACC, ALIGNED, FULL)
            g = xs[0 if GRADIENT is None else GRADIENT]
            for i in tl.static_range(len(TYPES)):
                if STRETCHED[i] and TYPES[i] is not None:
                    at = load(of_t, place, OF_T, ALIGNED, FULL).to(ACC)
                    if GRADIENT is None:
                        x = stretch(at, tl.load(numbers + place[0]).to(ACC)) * xs[i]
                    else:
                        x = over_root(xs[i], g, at, numbers, place[0], rows, ACC)
                    xs = xs[:i] + (x,) + xs[i + 1 :]  # noqa: RUF005 - Triton has no unpacking
            for i in tl.static_range(len(PAIRS)):
                if PAIRS[i] is not None:
                    total = 0.0
                    if TYPES[PAIRS[i][0]] is not None and TYPES[PAIRS[i][1]] is not None:
                        total = tl.sum(xs[PAIRS[i][0]] * xs[PAIRS[i][1]])
                    tl.store(partials + i * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def add_up(partials, first, last):
    """partials[first] + ... + partials[last - 1], always in the same order."""
    total = tl.full([ADD_BLOCK], 0.0, tl.float64)
    for start in range(first, last, ADD_BLOCK):
        index = start + tl.arange(0, ADD_BLOCK)
        total += tl.load(partials + index, mask=index < last, other=0.0)
    return tl.sum(total)


@kernel
def add_partials(
    values,
    partials,
    known,
    norms,
    members,
    first_chunk,
    programs,
    rows,
    KNOWN: tl.constexpr,
    CACHED: tl.constexpr,
    NORM: tl.constexpr,
):
    """values[KNOWN + i, row] = sum of the row's partials[i]; for the pair CACHED the row's cached norm instead. The first KNOWN
    are copied.

    One program for each of the bucket's rows (``members``) and pair; the chunks of its k-th row are those from
    ``first_chunk[k]`` to ``first_chunk[k + 1]``.
    """
    row = tl.load(members + tl.program_id(0))
    pair = tl.program_id(1)
    if pair < KNOWN:
        total = tl.full([], 0.0, tl.float64)
        if known is not None:
            total = tl.load(known + pair * rows + row)
    elif pair == CACHED:
        total = tl.full([], 0.0, tl.float64)
        if NORM is not None:
            total = tl.load(tl.load(norms + row).to(tl.pointer_type(NORM))).to(tl.float64)
    else:
        first = tl.load(first_chunk + tl.program_id(0))
        last = tl.load(first_chunk + tl.program_id(0) + 1)
        total = add_up(partials + (pair - KNOWN).to(tl.int64) * programs, first, last)
    tl.store(values + pair * rows + row, total)


# Coefficients ---------------------------------------------------------------------------------------------------------


@triton.jit
def not_finite(values, rows, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """1.0 if one of the sums is infinite or NaN, else 0.0."""
    found = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, PAIRS * rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(values + index, mask=index < PAIRS * rows, other=0.0)
        found = tl.where(x - x == 0, found, 1.0)
    return tl.max(found)


@kernel
def evaluate(
    values,
    hyper,
    group,
    grad_scale,
    before,
    coefficients,
    found_inf,
    rows,
    groups,
    PAIRS: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A rule: its coefficients to ``coefficients`` [numbers, rows], and to ``found_inf`` 1.0 if a sum is not finite, or if
    ``before`` (found_inf of an earlier pass) was 1.0. One program for all rows.

    RULE: made by :mod:`looksam_kernels.backends.triton.rules`.
    """
    bad = not_finite(values, rows, PAIRS, BLOCK)
    if before is not None:
        bad = tl.maximum(bad, tl.load(before).to(tl.float64))
    tl.store(found_inf, bad.to(tl.float32))
    inv_scale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        inv_scale = inv_scale / tl.load(grad_scale).to(tl.float64)
    RULE(values, hyper, group, inv_scale, bad, coefficients, rows, groups, BLOCK)


# Perturb and restore --------------------------------------------------------------------------------------------------


@kernel
def perturb(
    w,
    b,
    inputs,
    c,
    v,
    numbers,
    key,
    threshold,
    rounding,
    step,
    chunks,
    sizes,
    rows,
    W: tl.constexpr,
    B: tl.constexpr,
    TYPES: tl.constexpr,
    FROM_B: tl.constexpr,
    STRETCHED: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """b <- w, w <- w + T^2 sum_i c_i x_i; with FROM_B w <- b + T^2 sum_i c_i x_i. With all c_i = 0 the bits stay.

    STRETCHED: T of :func:`stretch`, with an eta a row in ``numbers``. V: the type of v, where T is :func:`over_root`'s instead,
    the first input its g, and counts once.
    MASKED: elements that the mask of key and threshold (32 bits each, as int32) does not keep stay, too.
    ROUNDED: the type of ``step`` where w is rounded stochastically, with the key ``rounding``; else ``None``.
    """
    place, full = locate(chunks, sizes, CHUNK)
    row = place[0]
    moves = False
    for i in tl.static_range(len(TYPES)):
        if TYPES[i] is not None:
            moves |= tl.load(c + i * rows + row) != 0
    for FULL in tl.static_range(2):
        if full == FULL:
            if FROM_B:
                origin = load(b, place, B, ALIGNED, FULL)
            else:
                origin = load(w, place, W, ALIGNED, FULL)
                store(b, place, origin, B, ALIGNED, FULL)
            xs = load_each(inputs, place, TYPES, ACC, ALIGNED, FULL)
            e = combine(c, xs, row, rows, TYPES, ACC, CHUNK)
            if STRETCHED:
                at = load(w, place, W, ALIGNED, FULL) if FROM_B else origin
                t = stretch(at.to(ACC), tl.load(numbers + row).to(ACC))
                e = t * t * e
            if V is not None:
                e = over_root(e, xs[0], load(v, place, V, ALIGNED, FULL).to(ACC), numbers, row, rows, ACC)
            moves_here = moves
            if MASKED:  # no e = -0.0 instead: Triton before 3.9 takes a scalar -0.0 for +0.0
                moves_here = moves & keeps(place, chunks, key, threshold, CHUNK)
            x = origin.to(ACC) + e
            if ROUNDED is not None:
                updates = tl.load(tl.load(step + row).to(tl.pointer_type(ROUNDED))) + 1
                x = round_stochastically(x, place, chunks, rounding, PERTURB, updates, CHUNK)
            moved = tl.where(moves_here, convert(x, W), convert(origin, W))
            store(w, place, moved, W, ALIGNED, FULL)


@kernel
def restore(
    w,
    b,
    chunks,
    sizes,
    W: tl.constexpr,
    B: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """w <- b."""
    place, full = locate(chunks, sizes, CHUNK)
    for FULL in tl.static_range(2):
        if full == FULL:
            store(w, place, load(b, place, B, ALIGNED, FULL), W, ALIGNED, FULL)


# Step -----------------------------------------------------------------------------------------------------------------


@triton.jit
def load_column(numbers, stride, COUNT: tl.constexpr):
    """COUNT numbers as a tuple."""
    loaded = ()
    for i in tl.static_range(COUNT):
        loaded = loaded + (tl.load(numbers + i * stride),)  # noqa: RUF005
    return loaded


@kernel
def advance(
    step,
    factors,
    members,
    hyper,
    group,
    found_inf,
    count,
    rows,
    groups,
    STEP: tl.constexpr,
    MAKE_FACTORS: tl.constexpr,
    HYPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """step <- step + 1, and factors [factors of the base, rows] are made of it. Nothing happens with found_inf."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tl.where(tl.load(found_inf) != 0, 0, count)
    row = tl.load(members + index, mask=mask, other=0)
    address = tl.load(step + row, mask=mask, other=0).to(tl.pointer_type(STEP))
    t = tl.load(address, mask=mask, other=0.0) + 1
    tl.store(address, t, mask=mask)
    if MAKE_FACTORS is not None:
        made = MAKE_FACTORS(t, load_column(hyper + tl.load(group + row, mask=mask, other=0), groups, HYPER))
        for i in tl.static_range(len(made)):
            tl.store(factors + i * rows + row, made[i], mask=mask)


@kernel
def step(
    w,
    b,
    inputs,
    q,
    states,
    c,
    c_q,
    c_post,
    trust,
    found_inf,
    factors,
    hyper,
    group,
    partials,
    rounding,
    count,
    chunks,
    sizes,
    rows,
    groups,
    UPDATE: tl.constexpr,
    TWO_PHASES: tl.constexpr,
    HYPER: tl.constexpr,
    FACTORS: tl.constexpr,
    W: tl.constexpr,
    B: tl.constexpr,
    INPUTS: tl.constexpr,
    Q: tl.constexpr,
    STATES: tl.constexpr,
    FROM_B: tl.constexpr,
    MASTER: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """d = sum_i c_i x_i, the base update with d at w (with FROM_B: at b), w += sum_i post_i x_i, q <- sum_i q_i x_i.

    UPDATE: one of :data:`UPDATES`; ``None``: d goes to the first input. HYPER, FACTORS: how many it reads.
    ``partials`` [3, chunks] takes ||q||^2, and with TWO_PHASES (LAMB) ||w||^2 and ||u||^2: its weights wait for
    :func:`apply_lamb`.
    With found_inf w <- b where it was moved, and nothing else. ``trust``: what the weight decay is multiplied by, LARS's
    ratio a row. ROUNDED: the type of ``count``, :func:`advance`'s ``step``, where w is rounded stochastically, else ``None``.
    """
    place, full = locate(chunks, sizes, CHUNK)
    row = place[0]
    programs = tl.num_programs(0)
    partials += tl.program_id(0)
    for FULL in tl.static_range(2):
        if full == FULL:
            origin = load(b, place, B, ALIGNED, FULL) if FROM_B else load(w, place, W, ALIGNED, FULL)
            if tl.load(found_inf) != 0:
                if FROM_B:
                    store(w, place, origin, W, ALIGNED, FULL)
            else:
                xs = load_each(inputs, place, INPUTS, ACC, ALIGNED, FULL)
                d = combine(c, xs, row, rows, INPUTS, ACC, CHUNK)
                if Q is not None:
                    new_q = combine(c_q, xs, row, rows, INPUTS, ACC, CHUNK)
                    store(q, place, new_q, Q, ALIGNED, FULL)
                    tl.store(partials, tl.sum(new_q * new_q))

                if UPDATE is None:
                    store(inputs[0], place, d, INPUTS[0], ALIGNED, FULL)
                    if FROM_B:
                        store(w, place, origin, W, ALIGNED, FULL)
                else:
                    x = origin.to(ACC)
                    old = load_each(states, place, STATES, ACC, ALIGNED, FULL)
                    h = load_column(hyper + tl.load(group + row), groups, HYPER)
                    if trust is not None:
                        h = scale_decay(h, tl.load(trust + row))
                    new_w, new = UPDATE(x, d, old, h, load_column(factors + row, rows, FACTORS))
                    for i in tl.static_range(len(STATES)):
                        if STATES[i] is not None:
                            store(states[i], place, new[i], STATES[i], ALIGNED, FULL)
                    if TWO_PHASES:
                        if not FULL:  # eps may be 0
                            new_w = tl.where(place[1] < place[2], new_w, 0.0)
                        tl.store(partials + programs, tl.sum(x * x))
                        tl.store(partials + 2 * programs, tl.sum(new_w * new_w))
                    else:
                        if c_post is not None:
                            new_w += combine(c_post, xs, row, rows, INPUTS, ACC, CHUNK)
                        if ROUNDED is not None:
                            updates = tl.load(tl.load(count + row).to(tl.pointer_type(ROUNDED)))
                            new_w = round_stochastically(new_w, place, chunks, rounding, STEP, updates, CHUNK)
                        store(w, place, new_w, W, ALIGNED, FULL)
                        if MASTER:
                            store(b, place, new_w, B, ALIGNED, FULL)


@triton.jit
def scale_decay(h, trust):
    """The hyper-parameters with weight_decay times LARS's ratio."""
    scaled = ()
    for i in tl.static_range(len(h)):
        scaled = scaled + (h[i] * trust if i == 1 else h[i],)  # noqa: RUF005
    return scaled


@kernel
def finish_step(
    norms,
    trust_ratio,
    partials,
    hyper,
    group,
    found_inf,
    members,
    first_chunk,
    programs,
    groups,
    NORM: tl.constexpr,
    TWO_PHASES: tl.constexpr,
):
    """||q_p||^2 to its column; LAMB's r = ||w_p|| / ||u_p||, 1 where either is 0 and where weight_decay = 0 unless
    always_adapt, at most 1 with trust_clip. One program for each of the bucket's rows."""
    if tl.load(found_inf) == 0:
        row = tl.load(members + tl.program_id(0))
        first = tl.load(first_chunk + tl.program_id(0))
        last = tl.load(first_chunk + tl.program_id(0) + 1)
        if NORM is not None:
            tl.store(tl.load(norms + row).to(tl.pointer_type(NORM)), add_up(partials, first, last).to(NORM))
        if TWO_PHASES:
            w_norm = tl.sqrt(add_up(partials + programs, first, last))
            u_norm = tl.sqrt(add_up(partials + 2 * programs, first, last))
            h = hyper + tl.load(group + row)
            adapts = (tl.load(h + groups) != 0) | (tl.load(h + 5 * groups) != 0)
            applies = adapts & (w_norm > 0) & (u_norm > 0)
            r = tl.where(applies, w_norm / tl.where(applies, u_norm, 1.0), 1.0)
            r = tl.where(tl.load(h + 6 * groups) != 0, tl.minimum(r, 1.0), r)
            tl.store(trust_ratio + row, r)


@kernel
def apply_lamb(
    w,
    b,
    inputs,
    states,
    c_post,
    found_inf,
    factors,
    trust_ratio,
    hyper,
    group,
    rounding,
    count,
    chunks,
    sizes,
    rows,
    groups,
    HYPER: tl.constexpr,
    FACTORS: tl.constexpr,
    W: tl.constexpr,
    B: tl.constexpr,
    INPUTS: tl.constexpr,
    STATES: tl.constexpr,
    FROM_B: tl.constexpr,
    MASTER: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """w <- w - lr r u + sum_i post_i x_i, u formed again from the states: the second phase of LAMB."""
    if tl.load(found_inf) == 0:
        place, full = locate(chunks, sizes, CHUNK)
        row = place[0]
        h = load_column(hyper + tl.load(group + row), groups, HYPER)
        of_count = load_column(factors + row, rows, FACTORS)
        scale = (h[0] * tl.load(trust_ratio + row)).to(ACC)
        for FULL in tl.static_range(2):
            if full == FULL:
                origin = load(b, place, B, ALIGNED, FULL) if FROM_B else load(w, place, W, ALIGNED, FULL)
                x = origin.to(ACC)
                m = load(states[0], place, STATES[0], ALIGNED, FULL).to(ACC)
                v = load(states[1], place, STATES[1], ALIGNED, FULL).to(ACC)
                new_w = x - scale * lamb_direction(x, m, v, h, of_count)
                if c_post is not None:
                    xs = load_each(inputs, place, INPUTS, ACC, ALIGNED, FULL)
                    new_w += combine(c_post, xs, row, rows, INPUTS, ACC, CHUNK)
                if ROUNDED is not None:
                    updates = tl.load(tl.load(count + row).to(tl.pointer_type(ROUNDED)))
                    new_w = round_stochastically(new_w, place, chunks, rounding, STEP, updates, CHUNK)
                store(w, place, new_w, W, ALIGNED, FULL)
                if MASTER:
                    store(b, place, new_w, B, ALIGNED, FULL)
