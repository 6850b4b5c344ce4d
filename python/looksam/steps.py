"""RunningStep: one step under way, from the first gradient to the updated weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from looksam import bases, hyper
from looksam.binding import Binding
from looksam.hyper import Group
from looksam.passes import PassRunner
from looksam.plans import Pass, Plan, spent
from looksam.ranks import Replicas, TwoRanks
from looksam_kernels import ops, snapshot
from looksam_kernels.formulas import ASCENTS, Sums
from looksam_kernels.ops import Adaptive


class RunningStep:
    """Takes gradients, perturbs and updates as the plan says; the caller runs the forwards and backwards in between.

    Until :meth:`update` has returned, :meth:`abandon` goes back to where the step began.
    """

    def __init__(
        self,
        plan: Plan,
        binding: Binding,
        base: bases.Fused | bases.Wrapped,
        passes: PassRunner,
        radius: hyper.Radius | None = None,
    ) -> None:
        self.plan, self._radius = plan, radius
        self.perturbed = False
        """Are the weights away from where the step began?"""
        self._binding, self._base, self._passes = binding, base, passes
        self._begun = self._has_gradients = False
        self._sums: Sums | None = None
        self._found_inf: Tensor | None = None

    def take_gradients(self, current: Pass, keep_grad: bool = False) -> None:
        """Takes the gradients of now into the table: the tensors themselves, or copies where they must also stay."""
        plan, binding = self.plan, self._binding
        last = current is plan.passes[-1]
        self._follow(binding.take(current.column, plan.writes if last else None, plan.writes_everywhere))
        table = binding.table
        self._check_kept(current)
        self._check_gradients(current)
        if binding.inside is not None and not last and plan.measures(current.column):
            kept = zip(table[current.column], binding.inside, strict=True)
            table[current.column] = [g if inside else None for g, inside in kept]
        if keep_grad or (not last and snapshot.any_shared(table, current.column)):
            # the next backward writes into them, or over the buffer of which they are parts (DDP's buckets)
            table[current.column] = _copies(table[current.column])
        if not (keep_grad or last):
            snapshot.clear_gradients(binding.params)

    def _check_kept(self, current: Pass) -> None:
        """
        Raises:
            RuntimeError: a gradient that is kept was overwritten by this pass.
        """
        table = self._binding.table
        for kept in self.plan.passes[: self.plan.passes.index(current)]:
            row = snapshot.first_same_place(table, kept.column, current.column) if kept.column in table else -1
            if row >= 0:
                raise RuntimeError(
                    f"the gradient of parameter {self._binding.number[row]} was written to the same memory as in the pass "
                    "before, which is still needed; let every pass make its own: p.grad = new_gradient.clone()"
                )

    def _check_gradients(self, current: Pass) -> None:
        """
        Raises:
            RuntimeError: this pass has no gradient at all though the first had.
        """
        passes = self.plan.passes
        has_any = any(self._binding.table.present(current.column))
        if current is passes[0]:
            self._has_gradients = has_any
        elif self._has_gradients and not has_any:
            raise RuntimeError(
                f"pass {passes.index(current) + 1} of {len(passes)} made no gradient, though the first did: a closure must zero "
                "the gradients, compute the loss anew, call backward and return the loss each time it is called; in the "
                "two-call style that is to be done between first_step() and second_step()"
            )

    def exchange_gradients(self, pair: TwoRanks) -> None:
        """In place of two :meth:`take_gradients`: this rank has made one gradient of the plan's two, its partner the other."""
        binding, (first, last) = self._binding, self.plan.passes
        self._follow(binding.follow())
        mine = [p.grad for p in binding.params]
        theirs = pair.exchange(mine)
        if pair.rank == 0:
            for p, x in zip(binding.params, theirs, strict=True):
                p.grad = x
        self.take_gradients(last)
        binding.table[first.column] = mine if pair.rank == 0 else theirs

    def perturb(self, current: Pass, grad_scale: Tensor | None) -> None:
        """Measures the gradients collected so far and moves the weights to where ``current`` takes its gradient."""
        assert current.ascent is not None
        binding, rule = self._binding, current.ascent
        if not self._begun:
            self._follow(binding.follow())
        if self.perturbed and "w" in ASCENTS[rule].inputs:
            binding.restore()
        if not self.perturbed:
            binding.make_backups(ASCENTS[rule].inputs[0])
        groups = binding.hyper
        adaptive: Adaptive = binding.etas()
        if binding.preconditions:
            assert isinstance(self._base, bases.Fused)
            adaptive = ops.preconditioner(binding.table, self._base.name, groups, grad_scale)
        if adaptive is not None:
            rule = ASCENTS[rule].adaptive or rule
        self.perturbed = True
        self._sums, self._found_inf = ops.measure_and_perturb(
            binding.table,
            rule,
            hyper.for_ops(groups, self._radius),
            known=self._sums,
            adaptive=adaptive,
            mask=hyper.mask(groups),
            all_reduce=binding.shards.all_reduce,
            grad_scale=grad_scale,
            found_inf=self._found_inf,
            trust_ratio=self._base.takes_trust_ratio,
            inside=binding.inside,
        )
        binding.drop(spent(self.plan, current))
        self._weights_changed()

    def norm_sq(self, grad_scale: Tensor | None) -> Tensor:
        """||g||^2 of the first pass, over all tensors, without the loss scale."""
        binding = self._binding
        self._sums, scalars = ops.measure(
            binding.table,
            "at_w",
            self._groups(),
            known=self._sums,
            all_reduce=binding.shards.all_reduce,
            grad_scale=grad_scale,
            found_inf=self._found_inf,
            trust_ratio=self._base.takes_trust_ratio,
        )
        self._found_inf = scalars.found_inf
        gg = self._sums.of("g", "g")
        inside = binding.inside
        total = (gg if inside is None else gg * torch.tensor(inside, dtype=gg.dtype, device=gg.device)).sum()
        return total if grad_scale is None else total / grad_scale.to(total) ** 2

    def update(self, grad_scale: Tensor | None, check: bool) -> Tensor:
        """Measures what is still unknown, combines, restores and updates.

        Args:
            check: leave the update out if a gradient is not finite. Else the gradients are not read for that alone.

        Returns:
            1.0 if the update was left out, else 0.0.
        """
        binding, plan = self._binding, self.plan
        if self._passes.m_sharpness and self.perturbed:
            replicas = Replicas(self._passes.model)
            self._found_inf = replicas.agree(binding.table, plan.descent, plan.passes[-1].column, self._found_inf)
            self._sums = self._sums and self._sums.stored()
        groups = self._groups()
        found_inf = self._base.update(
            binding,
            plan.descent,
            groups,
            known=self._sums,
            grad_scale=grad_scale,
            found_inf=self._found_inf,
            max_grad_norm=groups[0]["max_grad_norm"] if self._base.clips else None,
            check=check,
        )
        if plan.writes or plan.along:
            binding.written()
        self._weights_changed()
        self._end()
        return found_inf

    def create_state(self) -> None:
        """Instead of a step: creates the state of all parameters that have a gradient; moves no weight.

        torch.distributed.checkpoint asks for this, by a step with zero gradients on a fresh optimizer.
        """
        plan = self.plan
        self._follow(self._binding.take(plan.passes[-1].column, plan.writes, plan.writes_everywhere))
        self._base.create_state(self._binding)
        self._end()

    def abandon(self) -> None:
        """Every weight is as before the step."""
        self._binding.restore()
        if self.perturbed:
            self._weights_changed()
        self._end()

    def _follow(self, before: list[int | None] | None) -> None:
        """The sums of this step belong to the rows of now, which may have been others ``before``."""
        self._begun = True
        if before is not None and self._sums is not None:
            values = self._sums.values.new_zeros(len(self._sums.pairs), len(before))
            for row, old in enumerate(before):
                if old is not None:
                    values[:, row] = self._sums.values[:, old]
            self._sums = Sums(self._sums.pairs, values)

    def _groups(self) -> list[Group]:
        return hyper.for_ops(self._binding.hyper, self._radius)

    def _weights_changed(self) -> None:
        """Copies of the weights that others keep are out of date: autocast's casts, gathered shards."""
        torch.clear_autocast_cache()
        self._binding.shards.reshard(self._passes.model)

    def _end(self) -> None:
        self._binding.masters.written()
        self.perturbed = False
        self._passes.close()
        self._binding.drop([x.column for x in self.plan.passes])


def _copies(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copied together: one at a time, a GPU would wait for the host between them."""
    given = [g for g in gradients if g is not None]
    made = [torch.empty_like(g) for g in given]
    if made:
        torch._foreach_copy_(made, given)
    copies = iter(made)
    return [None if g is None else next(copies) for g in gradients]
