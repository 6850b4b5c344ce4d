"""What the variants share whose weights rest perturbed between the steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from looksam.bases import fused_name
from looksam.hyper import RANGES, none_or_one_of
from looksam.optimizer import SharpnessAware
from looksam.plans import Pass, Plan, Variant
from looksam.reminder import Reminder
from looksam.steps import RunningStep
from looksam.types import BackendName, BaseOptimizer
from looksam_kernels.one_pass import LAYERWISE


class OnePass(SharpnessAware):
    """Weights that rest at w + c x between the steps, x a column of the state.

    One call of the closure a step, or ``backward()`` and ``step()``; the loss is the one at the perturbed weights. In front
    of everything that is to see w itself, as validation or saving, stands ``optimizer.eval()``, and behind it
    ``optimizer.train()``, as with the schedule-free optimizers; or ``with optimizer.plain_weights():`` around it. The mode is
    ``train_mode`` in every group; checkpoints hold it. With ``model`` a warning is given, once, where the model is used in its
    eval mode at perturbed weights.

    Raises:
        RuntimeError: from ``step``: the optimizer is in eval mode.
    """

    perturbed_at_rest = True
    counted = ("phase", "train_mode")
    ranges = RANGES | {"layer_scale": none_or_one_of("trust_normalized", "trust", "trust_global", "unit")}

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rule: str,
        hyper: Mapping[str, Any],
        backend: BackendName | None,
        base_kwargs: Mapping[str, Any],
    ) -> None:
        for name in ("m_sharpness", "same_rng"):
            if base_kwargs.get(name):
                raise ValueError(f"{name}=True is for two passes; {type(self).__name__} has one")
        plan = Plan((Pass("g"),), rule if hyper["layer_scale"] is None else rule + LAYERWISE)
        hyper = {**hyper, "train_mode": True}
        super().__init__(params, base_optimizer, Variant(plan, plan), hyper, backend=backend, base_kwargs=base_kwargs)
        if self._passes.model is not None:
            Reminder(self).watch(self._passes.model)

    @classmethod
    def _checked(cls, base_optimizer: Any, kwargs: Mapping[str, Any]) -> str:
        """The name of the fused base.

        Raises:
            ValueError: the method does not work with it.
        """
        assert cls.bases is not None
        name = fused_name(base_optimizer, kwargs, cls.__name__)
        if name not in cls.bases:
            given = repr(base_optimizer) if isinstance(base_optimizer, str) else base_optimizer.__name__
            raise ValueError(f"{cls.__name__} works over {', '.join(map(repr, cls.bases))}, not over {given}")
        return name

    def _forget(self) -> None:
        super()._forget()
        self._left: dict[Tensor, tuple[Tensor, int]] = {}
        """In eval mode: what each perturbed weight was, and the version that it has got."""

    @property
    def is_perturbed(self) -> bool:
        """Are the weights perturbed now? Not in eval mode, and not before the first step."""
        return bool(self.param_groups[0]["train_mode"]) and any(self.state.values())

    @torch.no_grad()
    def eval(self) -> None:
        """Moves the weights to w, for validation and saving, until :meth:`train`. Keeps one model copy for so long."""
        own = self._original()
        if own.param_groups[0]["train_mode"]:
            left = {}
            for p, place, e in own._perturbations():
                left[p] = place.clone()
                place.sub_(e)
            own._set_mode(False)
            own._left = {p: (before, p._version) for p, before in left.items()}

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Moves the weights back to where they were before :meth:`eval`, bit for bit. Those that other code has written since are
        perturbed from where they are. ``train(False)`` is :meth:`eval`."""
        own = self._original()
        if not mode:
            own.eval()
        elif not own.param_groups[0]["train_mode"]:
            for p, place, e in own._perturbations():
                before, version = own._left.get(p, (None, -1))
                place.add_(e) if before is None or version != p._version else place.copy_(before)
            own._set_mode(True)
            own._left = {}

    @contextmanager
    def plain_weights(self) -> Iterator[Self]:
        """The weights are w inside, and in the end what they were before."""
        own, before = self._original(), self.param_groups[0]["train_mode"]
        own.eval()
        try:
            yield self
        finally:
            own.train(before)

    def _perturbations(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each parameter that is, or would be, perturbed, where its weight stands in full precision, and the perturbation."""
        binding, along = self._bound(), self._plan.along
        assert along is not None
        binding.follow()
        table = binding.table
        columns = (table[name] for name in ("w", "b", along, f"{along}_scale"))
        for row, (p, w, b, x, c) in enumerate(zip(binding.params, *columns, strict=True)):
            if x is not None and c is not None:
                place = b if table.has_master(row) else w
                yield p, place, x.to(table.arithmetic(row)) * c.to(table.arithmetic(row))

    def _set_mode(self, mode: bool) -> None:
        binding = self._bound()
        for row, w in enumerate(binding.table["w"]):
            if binding.table.has_master(row):
                w.copy_(binding.table["b"][row])
        binding.weights_changed(self._passes.model)
        for group in self.param_groups:
            group["train_mode"] = mode

    def _begun(self) -> RunningStep:
        if not self.param_groups[0].get("train_mode", True):
            raise RuntimeError(
                "the optimizer is in eval mode, and the weights are not perturbed: call optimizer.train() first"
            )
        return super()._begun()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. A checkpoint of eval mode belongs to plain weights, one of train mode to perturbed ones."""
        super().load_state_dict(state_dict)
        self._left = {}
