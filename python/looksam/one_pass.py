"""The variants with one pass: the weights rest perturbed between the steps, and the gradient is taken there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from looksam.at_rest import OnePass
from looksam.steps import RunningStep
from looksam.types import BackendName, BaseOptimizer, LayerScale, ParameterFilter
from looksam_kernels.one_pass import DECAY_IS_COUPLED, MOMENTS


class MSAM(OnePass):
    """Momentum SAM: perturbs against the base's momentum, at no cost in passes. Becker, Altrock & Risse 2024.

    Between the steps the weights rest at w - rho v / (||v|| + perturb_eps), v the momentum: ``momentum_buffer`` of SGD,
    ``exp_avg`` of Adam, over all tensors. A step takes the gradient there, goes back to w, updates w and v with it, and perturbs
    again, all in one pass over the memory. Call ``eval()`` before validation and saving, ``train()`` after it:
    :class:`looksam.at_rest.OnePass`.

    Passes per step: 1. Extra memory: none.
    When: a second pass is too expensive.

    Args:
        base_optimizer: ``"sgd"`` with momentum, ``"adam"`` or ``"adamw"``. The decay of the first two is that of the perturbed
            weights, as in the authors' code.
        rho: as SAM's, but larger: the authors' code has 0.3 over SGD and 1 over AdamW.
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
    :class:`looksam.at_rest.OnePass`.

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
