"""The ops as ``torch.library`` operators on lists of tensors, for ``torch.compile`` and ``torch.export``.

``torch.ops.looksam.sums``, ``perturb_``, ``restore_`` and ``sgd_``, ``adamw_``, ... : the same backends as
:mod:`looksam_kernels.ops`, for callers that hold plain lists and one coefficient a tensor. They build a table in each
call; who steps often keeps a :class:`looksam_kernels.TensorTable`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from looksam_kernels import ops
from looksam_kernels.formulas import Coefficients
from looksam_kernels.table import TensorTable


@custom_op("looksam::sums", mutates_args=())
def sums(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """<x_p, y_p> of each tensor; float64, shape [tensors]."""
    table = TensorTable(x, g=x, s=y)
    return ops.sums(table, [("g", "s")]).values[0].clone()


@sums.register_fake
def _(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(x), dtype=torch.float64, device=x[0].device if x else "cpu")


@custom_op("looksam::perturb_", mutates_args=("w", "backup"))
def perturb_(w: Sequence[Tensor], backup: Sequence[Tensor], g: Sequence[Tensor], c: Tensor) -> None:
    """backup <- w, w <- w + c_p g_p.

    Args:
        c: shape [tensors].
    """
    ops.perturb(TensorTable(w, b=backup, g=g), _coefficients(("g",), c.reshape(1, -1)))


@custom_op("looksam::restore_", mutates_args=("w",))
def restore_(w: Sequence[Tensor], backup: Sequence[Tensor]) -> None:
    """w <- backup, bit for bit."""
    table = TensorTable(w, b=backup)
    table.perturbed = [True] * len(table)
    ops.restore(table)


@custom_op("looksam::sgd_", mutates_args=("w", "momentum_buffer", "step"))
def sgd_(
    w: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    step: Sequence[Tensor],
    g: Sequence[Tensor],
    q: Sequence[Tensor],
    c: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """SGD with the direction g_p + c_p q_p; formula: :func:`looksam_kernels.step`.

    Args:
        step: float32 scalars, the update counts.
        c: shape [tensors].
    """
    table = TensorTable(w, g=g, q=q, momentum_buffer=momentum_buffer, step=step)
    group = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
    ops.step(table, "sgd", _with_reuse(c), [group])


def _adaptive(base: str) -> None:
    """Defines ``looksam::<base>_``."""

    @custom_op(f"looksam::{base}_", mutates_args=("w", "exp_avg", "exp_avg_sq", "step"))
    def op(
        w: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        step: Sequence[Tensor],
        g: Sequence[Tensor],
        q: Sequence[Tensor],
        c: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        table = TensorTable(w, g=g, q=q, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step)
        group = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        ops.step(table, base, _with_reuse(c), [{**group, "always_adapt": False, "trust_clip": False}])

    op.register_fake(lambda *_: None)


def _with_reuse(c: Tensor) -> Coefficients:
    return _coefficients(("g", "q"), torch.stack([torch.ones_like(c), c]))


def _coefficients(inputs: tuple[str, ...], d: Tensor) -> Coefficients:
    return Coefficients(inputs, d.to(torch.float64), None, torch.zeros((), device=d.device))


for _base in ("adam", "adamw", "lamb"):
    _adaptive(_base)
for _op in (perturb_, restore_, sgd_):
    _op.register_fake(lambda *_: None)
