"""The contract of each op: shapes, dtypes, errors, formula. Everything is done by the table's backend.

No op returns a host value and none synchronises; scalars live on the table's device. Arithmetic is float64 for float64
parameters and float32 for all others, rounded once at the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from looksam_kernels import formulas, updates
from looksam_kernels.backends import Adaptive
from looksam_kernels.formulas import ASCENTS, DESCENTS, Coefficients, Groups, Pair, Scaling, Sums
from looksam_kernels.masks import Mask
from looksam_kernels.numbers import scalar_dtype
from looksam_kernels.preconditioning import preconditioner as preconditioner
from looksam_kernels.table import TensorTable
from looksam_kernels.updates import BASES, STATE_NEEDS, own
from looksam_kernels.updates import states as states


def sums(table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive = None) -> Sums:
    """Inner products per tensor of pairs of columns, in one read of each column.

    ``values[i, p]`` = sum_j x_j y_j over the elements of row p for the i-th pair (x, y); float64, shape [pairs, rows];
    0 where x or y is ``None``. Accumulated in a fixed order: the same inputs give the same bits.

    ``"Tg"`` names the virtual column T g, ``"Tm"`` T m, with T = \\|w\\| + eta in rows where ``adaptive`` has an eta, else
    1; or with the T of the :class:`looksam_kernels.Preconditioner` that ``adaptive`` is, for which the pairs must hold Tg if
    they hold Tm. The pair ``("q", "q")`` costs no pass: it is the kept ``q_norm_sq`` of the rows that have a g.
    """
    return table.backend.sums(table, pairs, adaptive)


def coefficients(
    table: TensorTable,
    rule: str,
    sums: Sums,
    groups: Groups,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    trust_ratio: bool = False,
    inside: Sequence[bool] | None = None,
) -> Coefficients:
    """The scalars of a rule of :mod:`looksam_kernels.formulas`, from sums that hold at least the rule's pairs.

    Args:
        rule: a name in ``formulas.ASCENTS`` or ``formulas.DESCENTS``.
        sums: made by :func:`sums`; added up over the ranks first where tensors are sharded.
        groups: the hyper-parameters of each group by name (``rho``, ``alpha``, ``perturb_eps``, ``norm_scope``,
            ``maximize``, ...), numbers or 0-dim tensors.
        grad_scale: the loss scale that g and s contain; d and q are divided by it.
        found_inf: 1.0 if an earlier pass of this step was not finite.
        max_grad_norm: scale d by min(1, max_grad_norm / ||d||); the sums must hold the rule's ``clip_pairs`` too.
        trust_ratio: then scale each row of a descent by LARS's (:func:`looksam_kernels.formulas.lars_ratio`), for the
            base ``"lars"``. The sums must hold the rule's ``clip_pairs`` and ||w_p||^2, taken before w was perturbed.
        inside: the rows that the rule is about, default: all. The others are in none of its norms; an ascent leaves them
            alone, a descent gives them the first input for d. Not for rules that are ``everywhere``.

    A row that lacks one of the gradients which a descent combines has the first input alone for d.

    Returns:
        :class:`looksam_kernels.formulas.Coefficients`.
    """
    scaling = Scaling(grad_scale, found_inf, max_grad_norm, trust_ratio and rule in DESCENTS)
    found = table.backend.coefficients(table, rule, sums, groups, scaling)
    return _with_gaps(table, rule, sums, found, groups, scaling, inside)


def measure(
    table: TensorTable,
    rule: str,
    groups: Groups,
    *,
    known: Sums | None = None,
    adaptive: Adaptive = None,
    all_reduce: Callable[[Sums], Sums] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    trust_ratio: bool = False,
    inside: Sequence[bool] | None = None,
    check: bool = True,
) -> tuple[Sums, Coefficients]:
    """:func:`sums` of what the rule needs and ``known`` does not hold yet, then :func:`coefficients`: one launch where
    the backend can.

    Args:
        known: sums of an earlier pass of this step (||g||^2 of the ascent serves the descent).
        all_reduce: adds the sums up over ranks before they become scalars.
        trust_ratio: as in :func:`coefficients`. To be given to the ascents of the step too: they measure ||w_p||^2.
        inside: as in :func:`coefficients`.
        check: take also the sums that only show whether the inputs are finite. ``False``: ``found_inf`` is 0.0 whatever
            the sums are, and a descent that needs none reads no gradient.

    Returns:
        All sums, the known ones included, and the coefficients.

    Raises:
        ValueError: no such rule, or LARS's ||w_p||^2 is asked for when w is perturbed.
    """
    kept = formulas.keeps_of(rule)
    if kept is not None and (known is None or (kept, kept) not in known.pairs):
        numbers = Sums(((kept, kept),), _numbers(table, kept)[None])
        known = numbers if known is None else known + numbers
    pairs = _unknown(table, rule, known, max_grad_norm is not None, trust_ratio, check)
    scaling = Scaling(grad_scale, found_inf, max_grad_norm, trust_ratio and rule in DESCENTS)
    fused = getattr(table.backend, "measure", None)
    if fused is not None and all_reduce is None:
        found, scalars = fused(table, rule, pairs, known, groups, adaptive, scaling)
        scalars = _with_gaps(table, rule, found, scalars, groups, scaling, inside)
    else:
        found = sums(table, pairs, adaptive)
        if all_reduce is not None and pairs:
            found = all_reduce(found)
        if known is not None:
            found = known + found
        scalars = coefficients(table, rule, found, groups, **scaling._asdict(), inside=inside)
    if not check:
        scalars = scalars._replace(found_inf=torch.zeros_like(scalars.found_inf))
    return found, scalars


def _unknown(
    table: TensorTable, rule: str, known: Sums | None, clip: bool, trust_ratio: bool, check: bool = True
) -> Sequence[Pair]:
    """The sums that a rule needs and that are not known yet."""
    pairs: Sequence[Pair] = pairs_of(rule, clip, trust_ratio, check)
    if known is not None:
        pairs = [p for p in pairs if p not in known.pairs]
    if trust_ratio and ("w", "w") in pairs and any(table.perturbed):
        raise ValueError("LARS needs ||w_p|| from before the perturbation; give trust_ratio=True to the ascent too")
    return pairs


def measure_and_perturb(
    table: TensorTable,
    rule: str,
    groups: Groups,
    *,
    known: Sums | None = None,
    adaptive: Adaptive = None,
    mask: Mask | None = None,
    all_reduce: Callable[[Sums], Sums] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    trust_ratio: bool = False,
    inside: Sequence[bool] | None = None,
) -> tuple[Sums, Tensor]:
    """:func:`measure` of an ascent, then :func:`perturb` with its coefficients: one call where the backend can.

    Args, errors: as of both.

    Returns:
        All sums, the known ones included, and found_inf.
    """
    fused = _fused(table, "measure_and_perturb", rule, all_reduce, inside)
    if fused is not None:
        _check_perturb(table, ASCENTS[rule].inputs[0])
        pairs = _unknown(table, rule, known, False, trust_ratio)
        done: tuple[Sums, Tensor] | None
        done = fused(table, rule, pairs, known, groups, adaptive, Scaling(grad_scale, found_inf), mask)
        if done is not None:
            return done
    found, scalars = measure(
        table,
        rule,
        groups,
        known=known,
        adaptive=adaptive,
        all_reduce=all_reduce,
        grad_scale=grad_scale,
        found_inf=found_inf,
        trust_ratio=trust_ratio,
        inside=inside,
    )
    perturb(table, scalars, adaptive, mask)
    return found, scalars.found_inf


def measure_and_step(
    table: TensorTable,
    rule: str,
    base: str,
    groups: Groups,
    *,
    known: Sums | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    inside: Sequence[bool] | None = None,
    check: bool = True,
) -> Tensor:
    """:func:`measure` of a descent, with the trust ratio for the bases that take one, then :func:`step` with its
    coefficients: one call where the backend can.

    Args, errors: as of both.

    Returns:
        found_inf: 1.0 if nothing was updated, because a gradient was not finite, else 0.0.
    """
    trust_ratio = base in BASES and BASES[base].takes_trust_ratio
    fused = _fused(table, "measure_and_step", rule, None, inside)
    if fused is not None:
        pairs = _unknown(table, rule, known, max_grad_norm is not None, trust_ratio, check)
        _check_step(table, base, DESCENTS[rule].inputs[0], DESCENTS[rule].writes, groups)
        scaling = Scaling(grad_scale, found_inf, max_grad_norm, trust_ratio)
        done: Tensor | None = fused(table, rule, pairs, known, groups, scaling, base, check)
        if done is not None:
            table.perturbed = [False] * len(table)
            return done
    _, scalars = measure(
        table,
        rule,
        groups,
        known=known,
        grad_scale=grad_scale,
        found_inf=found_inf,
        max_grad_norm=max_grad_norm,
        trust_ratio=trust_ratio,
        inside=inside,
        check=check,
    )
    step(table, base, scalars, groups)
    return scalars.found_inf


def _fused(
    table: TensorTable,
    name: str,
    rule: str,
    all_reduce: Callable[[Sums], Sums] | None,
    inside: Sequence[bool] | None,
) -> Callable[..., Any] | None:
    """The backend's function that goes from sums to weights in one call, where nothing is to be done between them."""
    fused: Callable[..., Any] | None = getattr(table.backend, name, None)
    if fused is None or all_reduce is not None or formulas.keeps_of(rule) is not None:
        return None
    if inside is not None and not formulas.is_everywhere(rule):
        return None
    return fused if formulas.gaps(rule, table.present) is None else None


def perturb(
    table: TensorTable, coefficients: Coefficients, adaptive: Adaptive = None, mask: Mask | None = None
) -> None:
    """b <- w, w <- w + T^2 sum_i c_ip x_ip, for the rows that have the first input; T as of :func:`sums`, but a
    preconditioner's once: w <- w + T sum_i c_ip x_ip, so that its rho is the length of e.

    What w then holds is rounded as ``table.rounding`` says: to nearest where that is ``None``.

    With a mask only the elements that :class:`looksam_kernels.Mask` keeps are moved; the others keep b's bits.

    Rows that are perturbed already, and rows with a master copy, start from b and leave it alone: w <- round(b + ...).
    With all c_ip = 0 w keeps b's bits whatever x holds. Inputs that are ``None`` count as 0. Marks the rows in
    ``table.perturbed``. The storage of w stays where it is.

    Raises:
        ValueError: a row that takes part has no b, or no ``step`` to round by.
    """
    _check_perturb(table, coefficients.inputs[0])
    table.backend.perturb(table, coefficients, adaptive, mask)


def _check_perturb(table: TensorTable, first: str) -> None:
    """Has the table what a perturbation needs in the rows that have the ``first`` input?"""
    takes_part = table.present(first)
    _need(table, "b", takes_part)
    if table.rounding is not None:
        _need(table, "step", [part and table.rounds_stochastically(row) for row, part in enumerate(takes_part)])


def step(table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None:
    """The base update with the direction d = sum_i d_i x_i, at the restored w; also the restore, in the same pass.

    For each row p that has the first input: w is read from b where p is perturbed or has a master copy, ``step`` goes
    up by one, the base update (formulas below) runs with d and writes w, its states, and the master copy. In the same
    pass ``coefficients.q`` writes its column in the rows that have one, q <- sum_i q_i x_i, and ||q_p||^2 to ``q_norm_sq``
    where there is such a column, and ``coefficients.post`` adds to the new w: w += sum_i post_i x_i, with the x_i of before
    the step. Inputs that are ``None`` count as 0. ``coefficients.kept`` goes to the rows of its column.
    Perturbed rows without the first input are restored, not updated. With ``found_inf`` every row is restored and
    nothing else changes, device-side counters included.

    New weights are rounded as ``table.rounding`` says; restored ones are exact.

    {bases}

    The states are torch.optim's; ``momentum_buffer`` is needed in groups with momentum, ``grad_avg`` in centered ones.

    Args:
        groups: the base's hyper-parameters of each group by name, as in torch.optim; ``base.<name>`` where a variant has
            one of the same name.

    Raises:
        ValueError: unknown base, a row that takes part lacks one of the states, the table has no column that
            ``coefficients.q`` is for, ``coefficients.trust`` is there without LARS or LARS without it, or LAMB is to add w or
            one of its states.
    """
    _check_step(table, base, coefficients.inputs[0], None if coefficients.q is None else coefficients.writes, groups)
    if BASES[base].takes_trust_ratio != (coefficients.trust is not None):
        raise ValueError(
            'coefficients with a trust ratio are for the base "lars", and it needs them: see measure(trust_ratio=True)'
        )
    takes_part = table.present(coefficients.inputs[0])
    changed = {"w", *BASES[base].states} & set(coefficients.inputs)
    if base == "lamb" and coefficients.post is not None and changed:
        raise ValueError(f"lamb adds after its states and w have changed: {', '.join(sorted(changed))} cannot be added")
    table.backend.step(table, base, coefficients, groups)
    table.perturbed = [False] * len(table)
    if coefficients.kept is not None:
        _keep(table, coefficients.keeps, coefficients.kept, takes_part)


step.__doc__ = (step.__doc__ or "").replace("{bases}", updates.formulas().replace("\n", "\n    "))


def _check_step(table: TensorTable, base: str, first: str, writes: str | None, groups: Groups) -> None:
    """Has the table what a base update needs in the rows that have the ``first`` input?"""
    if base not in BASES:
        raise ValueError(f"unknown base {base!r}; choose one of {', '.join(BASES)}")
    takes_part = table.present(first)
    for name in BASES[base].states:
        if table.is_full(name):
            continue
        rows = takes_part
        if name in STATE_NEEDS:
            has = [bool(own(g, STATE_NEEDS[name])) for g in groups]
            rows = [part and has[i] for part, i in zip(takes_part, table.group, strict=True)]
        _need(table, name, rows)
    if base != "grad":
        _need(table, "step", takes_part)
    if writes is not None and writes not in table:
        raise ValueError(f"the table has no column {writes!r}, which is to be written")


def addition(table: TensorTable, coefficients: Coefficients) -> list[Tensor | None]:
    """What :func:`step` adds to w after the base update, for updates that are made elsewhere: sum_i post_i x_i.

    To be called before ``step(table, "grad", ...)``, which writes over the first input.

    Returns:
        A new tensor for each row that has the first input, float64 for float64 parameters and float32 for all others;
        ``None`` in the other rows, and in all where the rule adds nothing.
    """
    rows: list[Tensor | None] = [None] * len(table)
    if coefficients.post is not None:
        for row, takes_part in enumerate(table.present(coefficients.inputs[0])):
            if takes_part:
                w = table["w"][row]
                total = torch.zeros_like(w, dtype=table.arithmetic(row))
                for c, name in zip(coefficients.post, coefficients.inputs, strict=True):
                    x = table[name][row]
                    if x is not None:
                        total += c[row].to(total) * x.to(total.dtype)
                rows[row] = total
    return rows


def restore(table: TensorTable) -> None:
    """w <- b, bit for bit, for the perturbed rows (rows with a master copy: w <- round(b)); for a step that is abandoned."""
    table.backend.restore(table)
    table.perturbed = [False] * len(table)


def pairs_of(rule: str, clip: bool = False, trust_ratio: bool = False, check: bool = True) -> tuple[Pair, ...]:
    """The sums that a rule needs, with those for clipping, for LARS's trust ratio and for the finite check if asked.

    Raises:
        ValueError: no such rule.
    """
    if rule not in ASCENTS and rule not in DESCENTS:
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join([*ASCENTS, *DESCENTS])}")
    pairs = ASCENTS[rule].pairs if rule in ASCENTS else DESCENTS[rule].pairs
    if rule in DESCENTS and (clip or trust_ratio):
        pairs += DESCENTS[rule].clip_pairs
    elif rule in DESCENTS and not check:
        pairs = tuple(pair for pair in pairs if pair not in DESCENTS[rule].only_checked)
    return (*pairs, ("w", "w")) if trust_ratio and ("w", "w") not in pairs else pairs


def _with_gaps(
    table: TensorTable,
    rule: str,
    sums: Sums,
    found: Coefficients,
    groups: Groups,
    scaling: Scaling,
    inside: Sequence[bool] | None,
) -> Coefficients:
    """The coefficients where a tensor lacks some of the gradients, or the rule is not about all tensors, which the backends
    do not ask: plain PyTorch on a few numbers a row."""
    present = formulas.gaps(rule, table.present)
    inside = None if formulas.is_everywhere(rule) else inside
    if present is None and inside is None:
        return found
    hyper = formulas.Hyper(groups, table.group, table.device, scaling.grad_scale)
    return formulas.evaluate(rule, sums, hyper, found.found_inf, scaling, present, inside)


def _numbers(table: TensorTable, column: str) -> Tensor:
    """A column of 0-dim tensors as one, shape [rows]; 0 where a row has none."""
    dtype, device = scalar_dtype(table.device), table.device
    if not any(table.present(column)):
        return torch.zeros(len(table), dtype=dtype, device=device)
    if table.is_full(column):
        return torch.stack([x.to(device, dtype) for x in table[column]])
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.stack([zero if x is None else x.to(device, dtype) for x in table[column]])


def _keep(table: TensorTable, column: str, values: Tensor, rows: Sequence[bool]) -> None:
    """Writes the numbers of these rows, in one launch."""
    each = zip(table[column], values.unbind(), rows, strict=True)
    written = [(x, value) for x, value, takes_part in each if x is not None and takes_part]
    if written:
        torch._foreach_copy_([x for x, _ in written], [value for _, value in written])


def _need(table: TensorTable, name: str, rows: Sequence[bool]) -> None:
    if table.is_full(name):
        return
    for row, (there, takes_part) in enumerate(zip(table.present(name), rows, strict=True)):
        if takes_part and not there:
            raise ValueError(f"row {row} takes part, but column {name!r} has no tensor for it")
