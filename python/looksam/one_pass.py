"""The variants with one pass: the weights rest perturbed between the steps, and the gradient is taken there."""

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
from looksam.types import BackendName, BaseOptimizer, LayerScale, ParameterFilter
from looksam_kernels.one_pass import DECAY_IS_COUPLED, LAYERWISE, MOMENTS


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
        """In eval mode: what each weight was before, and the version that it has got."""

    @property
    def is_perturbed(self) -> bool:
        """Are the weights perturbed now? Not in eval mode, and not before the first step."""
        return bool(self.param_groups[0]["train_mode"]) and any(self.state.values())

    @torch.no_grad()
    def eval(self) -> None:
        """Moves the weights to w, for validation and saving, until :meth:`train`. Keeps one model copy for so long."""
        own = self._original()
        if own.param_groups[0]["train_mode"]:
            for p, place, e in own._perturbations():
                before = place.clone()
                place.sub_(e)
                own._left[p] = before, p._version
            own._set_mode(False)
            own._left = {p: (before, p._version) for p, (before, _) in own._left.items()}

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
                yield p, place, x.to(place.dtype) * c.to(place.dtype)

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


class MSAM(OnePass):
    """Momentum SAM: perturbs against the base's momentum, at no cost in passes. Becker, Altrock & Risse 2024.

    Between the steps the weights rest at w - rho v / (||v|| + perturb_eps), v the momentum: ``momentum_buffer`` of SGD,
    ``exp_avg`` of Adam, over all tensors. A step takes the gradient there, goes back to w, updates w and v with it, and perturbs
    again, all in one pass over the memory. Call ``eval()`` before validation and saving, ``train()`` after it:
    :class:`looksam.one_pass.OnePass`.

    Passes per step: 1. Extra memory: none.
    When: a second pass is too expensive.

    Args:
        base_optimizer: ``"sgd"`` with momentum, ``"adam"`` or ``"adamw"``. The decay of the first two is that of the perturbed
            weights, as in the authors' code.
        rho: as SAM's, but several times as large: 0.3 to 3 in the paper.
        layer_scale: ``None``, or as in :class:`looksam.LayerSAM` with v for g, and w where it rests.
        perturb_eps, layer_filter: as there.

    State per parameter beside the base's: ``momentum_buffer_scale`` or ``exp_avg_scale``, the factor of v in the perturbation.

    Raises:
        ValueError: another base, SGD without momentum or with dampening. The others: :class:`looksam.SAM`.
    """

    bases = tuple(MOMENTS)

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.3,
        layer_scale: LayerScale | None = None,
        layer_filter: ParameterFilter | None = None,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        base = self._checked(base_optimizer, base_kwargs)
        hyper = {"rho": rho, "perturb_eps": perturb_eps, "layer_scale": layer_scale, "layer_filter": layer_filter}
        super().__init__(params, base_optimizer, f"msam_{base}", hyper, backend, base_kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_momentum()
        except ValueError:
            self.param_groups.pop()
            raise

    def _begun(self) -> RunningStep:
        self._check_momentum()
        return super()._begun()

    def _check_momentum(self) -> None:
        """
        Raises:
            ValueError: a group without momentum, or with one that is no plain sum.
        """
        if self._plan.along == "momentum_buffer":
            for group in self.param_groups:
                if not group.get("momentum", 1.0) or group.get("dampening"):
                    raise ValueError("MSAM over sgd needs its momentum, undamped: give momentum=0.9, and no dampening")


class S2SAM(OnePass):
    """S2-SAM, "stale" SAM: perturbs along the gradient of the step before. Ji et al. 2024.

    Between the steps the weights rest at w + rho y / (||y|| + perturb_eps), y the last gradient, which was itself taken at
    perturbed weights. Otherwise as :class:`looksam.MSAM`. Call ``eval()`` before validation and saving, ``train()`` after it:
    :class:`looksam.one_pass.OnePass`.

    Passes per step: 1. Extra memory: 1 model copy (y).
    When: a second pass is too expensive, and the base has no momentum.

    Args:
        base_optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"adagrad"``, ``"rmsprop"``, ``"adadelta"`` or ``"lion"``.
        rho: as SAM's.
        layer_scale: ``None``, or as in :class:`looksam.LayerSAM`, with w where it rests.
        perturb_eps, layer_filter: as there.

    State per parameter beside the base's: ``y``, and ``y_scale``, the factor of y in the perturbation.

    Raises:
        ValueError: another base. The others: :class:`looksam.SAM`.
    """

    bases = tuple(DECAY_IS_COUPLED)

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        layer_scale: LayerScale | None = None,
        layer_filter: ParameterFilter | None = None,
        perturb_eps: float = 1e-12,
        backend: BackendName | None = None,
        **base_kwargs: Any,
    ) -> None:
        base = self._checked(base_optimizer, base_kwargs)
        rule = "s2sam_coupled" if DECAY_IS_COUPLED[base] else "s2sam_decoupled"
        hyper = {"rho": rho, "perturb_eps": perturb_eps, "layer_scale": layer_scale, "layer_filter": layer_filter}
        super().__init__(params, base_optimizer, rule, hyper, backend, base_kwargs)
