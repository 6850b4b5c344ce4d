"""The variant whose two passes can run side by side, on two ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from looksam.hyper import COMMON, Group
from looksam.optimizer import SharpnessAware
from looksam.plans import Pass, Plan, Variant
from looksam.ranks import TwoRanks
from looksam.shards import Whole, shards_of
from looksam.steps import RunningStep
from looksam.types import BackendName, BaseOptimizer, Closure


class SAMPa(SharpnessAware):
    """SAMPa: two independent gradients, computable in parallel. Xie et al. 2024.

    With y, r of the step before: s at w + rho y / (||y|| + perturb_eps) on the batch of the step before, which y is of;
    r at w - lr y on the batch of this step; base update with d = (1 - lambda) s + lambda r. In the first step, which has
    no y, both are taken at w. The passes run one after the other, and the loss returned is the first one's; there is no
    ``first_step``.

    The closure is not that of the other variants: ``closure(previous)`` computes the loss on the batch of the step before
    where ``previous`` is true, and on that of this step where it is false (in the first step there is only one).

    With a ``process_group`` of two ranks, which must be given the same batches, the passes run side by side: rank 0 makes
    s, rank 1 makes r, and one all-gather a dtype brings each the other's, so that both take the very step of one process,
    bit for bit (random numbers of the passes apart). The closure is called once a step on each rank, and ``step`` returns
    its loss. Both must have gradients of the same parameters; running statistics are those of a rank's own passes.

    Passes per step: 2. Extra memory: 2 model copies (w, y).
    When: SAM's two passes should run side by side.

    Args:
        lambda_: weight of r, in [0, 1]; per group.
        previous_batch: as above. With ``False`` both passes are on the batch of this step, and the closure takes nothing.
        sgd_step: r at w - lr (y + weight_decay w + momentum buf), where SGD would step with y. For the base ``"sgd"``.
        process_group: two ranks with the same parameters (``torch.distributed.group.WORLD``, where there are no others).
            Not for sharded parameters, nor with ``m_sharpness``; copied by ``state_dict`` only.

    The others, and the errors: :class:`looksam.SAM`. State per parameter beside the base's: ``y``.

    Raises:
        TypeError: from ``step``: the closure takes no ``previous``.
        ValueError: ``sgd_step`` over another base.
    """

    shared = (*COMMON, "previous_batch", "sgd_step")
    _pair: TwoRanks | None = None

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        lambda_: float = 0.2,
        perturb_eps: float = 1e-12,
        previous_batch: bool = True,
        sgd_step: bool = False,
        process_group: Any = None,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        if process_group is not None:
            if base_kwargs.get("m_sharpness"):
                raise ValueError("SAMPa takes process_group or m_sharpness, not both")
            self._pair = TwoRanks(process_group)
        hyper: dict[str, Any] = {"rho": rho, "lambda_": lambda_, "perturb_eps": perturb_eps}
        hyper |= {"previous_batch": previous_batch, "sgd_step": sgd_step}
        extrapolate = "extrapolate_sgd" if sgd_step else "extrapolate"
        plan = Plan((Pass("s", "along_previous"), Pass("r", extrapolate)), "sampa")
        super().__init__(params, base_optimizer, Variant(plan, plan), hyper, backend=backend, base_kwargs=base_kwargs)
        if sgd_step and getattr(self._base, "name", None) != "sgd":
            raise ValueError('sgd_step=True is for the base "sgd", whose decay and momentum it reads')

    def _run_passes(self, closure: Closure, step: RunningStep, grad_scale: Tensor | None) -> Any:
        if self.param_groups[0]["previous_batch"]:
            check_closure(closure)
        if self._pair is None:
            return super()._run_passes(closure, step, grad_scale)
        step.perturb(step.plan.passes[self._pair.rank], grad_scale)
        loss = self._pass(closure, 0, 1)
        step.exchange_gradients(self._pair)
        return loss

    def _pass(self, closure: Closure, number: int, of: int) -> Any:
        if self.param_groups[0]["previous_batch"]:
            makes_s = number == 0 if self._pair is None else self._pair.rank == 0
            closure = functools.partial(closure, previous=makes_s)
        return super()._pass(closure, number, of)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's.

        Raises:
            TypeError: sharded parameters, with a ``process_group``.
        """
        super().add_param_group(param_group)
        if self._pair is not None and type(shards_of(self.param_groups[-1]["params"])) is not Whole:
            self.param_groups.pop()
            raise TypeError("SAMPa with a process_group takes no sharded parameters")

    def __getstate__(self) -> dict[str, Any]:
        if self._pair is not None:
            raise RuntimeError("an optimizer with a process_group cannot be copied or pickled: use state_dict()")
        return super().__getstate__()


def check_closure(closure: Closure) -> None:
    """
    Raises:
        TypeError: the closure cannot be told which batch.
    """
    try:
        inspect.signature(closure).bind(previous=True)
    except TypeError as error:
        raise TypeError(
            f"the closure cannot be told which batch ({error}): SAMPa calls closure(previous=True) for the loss on the batch "
            "of the step before and closure(previous=False) for that of this step, each with its backward; "
            "previous_batch=False takes both on this step's, and calls closure()"
        ) from None
