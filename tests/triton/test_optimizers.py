"""Every optimizer on the Triton backend, over whole cycles of k."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam
from tests import bases

pytest.importorskip("triton")

STEPS, K = 12, 3
SHAPES = ((33, 17), (17,), ())
OPTIMIZERS: dict[str, Callable[..., looksam.SharpnessAware]] = {
    "SAM over sgd": lambda p, **o: looksam.SAM(p, "sgd", k=K, lr=0.05, momentum=0.9, weight_decay=1e-2, **o),
    "ASAM over lamb": lambda p, **o: looksam.SAM(p, "lamb", rho=0.5, adaptive=True, k=K, lr=0.02, **o),
    "LookSAM over adam": lambda p, **o: looksam.LookSAM(p, "adam", rho=0.1, k=K, lr=0.02, weight_decay=1e-2, **o),
    "LayerSAM over adamw": lambda p, **o: looksam.LayerSAM(p, "adamw", rho=0.1, k=K, lr=0.02, **o),
    "LookLayerSAM over lamb": lambda p, **o: looksam.LookLayerSAM(p, "lamb", rho=0.1, k=K, lr=0.02, **o),
    "GSAM over adamw": lambda p, **o: looksam.GSAM(p, "adamw", rho=0.1, k=K, lr=0.02, **o),
    "WSAM over lamb": lambda p, **o: looksam.WSAM(p, "lamb", rho=0.1, k=K, lr=0.02, **o),
    "VaSSO over sgd": lambda p, **o: looksam.VaSSO(p, "sgd", rho=0.1, theta=0.5, lr=0.05, momentum=0.9, **o),
    "ASAM by its own name over sgd": lambda p, **o: looksam.ASAM(p, "sgd", k=K, lr=0.05, **o),
    "SSAM over adamw": lambda p, **o: looksam.SSAM(p, "adamw", rho=0.1, k=K, lr=0.02, **o),
    "CRSAM over sgd": lambda p, **o: looksam.CRSAM(p, "sgd", rho=0.1, k=K, lr=0.05, momentum=0.9, **o),
    "FriendlySAM over adamw": lambda p, **o: looksam.FriendlySAM(p, "adamw", rho=0.1, lr=0.02, **o),
    "LookSAM over adamw, vectors perturbed": lambda p, **o: looksam.LookSAM(
        p, "adamw", rho=0.1, k=K, lr=0.02, perturb_filter=lambda x: x.ndim == 1, **o
    ),
    "SAMPa over sgd": lambda p, **o: looksam.SAMPa(
        p, "sgd", rho=0.1, lr=0.05, momentum=0.9, weight_decay=0.01, previous_batch=False, sgd_step=True, **o
    ),
    "ESAM over sgd": lambda p, **o: looksam.ESAM(p, "sgd", rho=0.1, k=K, lr=0.05, momentum=0.9, **o),
    "AESAM over sgd": lambda p, **o: looksam.AESAM(p, "sgd", total_steps=STEPS, rho=0.1, lr=0.05, momentum=0.9, **o),
    "AELookSAM over adam": lambda p, **o: looksam.AELookSAM(p, "adam", total_steps=STEPS, rho=0.1, lr=0.02, **o),
    "MSAM over adamw": lambda p, **o: looksam.MSAM(p, "adamw", rho=0.1, lr=0.02, **o),
    "MSAM over sgd, layer by layer": lambda p, **o: looksam.MSAM(
        p, "sgd", rho=0.1, layer_scale="trust_global", lr=0.05, momentum=0.9, weight_decay=0.01, max_grad_norm=0.5, **o
    ),
    "S2SAM over sgd": lambda p, **o: looksam.S2SAM(p, "sgd", rho=0.1, lr=0.05, momentum=0.9, weight_decay=0.01, **o),
    "S2SAM over lion": lambda p, **o: looksam.S2SAM(p, "lion", rho=0.1, lr=0.01, weight_decay=0.1, **o),
    **{
        f"SAM over {name}": lambda p, name=name, base=base, **o: looksam.SAM(p, name, k=K, **base.options, **o)
        for name, base in bases.BASES.items()
        if name not in ("sgd", "adam", "adamw", "lamb")  # those above
    },
    "LARS": lambda p, **o: looksam.LARS(p, lr=0.5, trust_coefficient=0.05, nesterov=True, **o),
    "LAMB": lambda p, **o: looksam.LAMB(p, lr=0.02, **o),
    "Lion": lambda p, **o: looksam.Lion(p, lr=0.01, **o),
}


def _train(build: Callable[..., Any], backend: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    x = torch.randn(64, 33, generator=generator, dtype=torch.float64).to(dtype)
    params = [torch.nn.Parameter(w.to(dtype)) for w in start]
    optimizer = build(params, backend=backend)

    def losses(kept: Tensor | None = None) -> Tensor:
        optimizer.zero_grad()
        matrix, bias, scale = params
        samples = x if kept is None else x[kept]
        return ((torch.tanh(samples @ matrix + bias) * scale) ** 2).mean(1)

    def closure() -> Tensor:
        loss = losses().mean()
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(losses if isinstance(optimizer, looksam.ESAM) else closure)
    return [p.detach().double() for p in params]


def _error(weights: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(weights, exact, strict=True))


def test_no_optimizer_is_left_out() -> None:
    built = {type(build([torch.nn.Parameter(torch.zeros(2, 2))])) for build in OPTIMIZERS.values()}
    assert built == {*looksam.VARIANTS.values(), looksam.LAMB, looksam.LARS, looksam.Lion}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_12_steps_agree_with_the_reference(name: str) -> None:
    """The error in float32 is at most twice the reference's, which takes the same roundings in another order, plus one
    ulp of the largest weight a step for the sums that differ."""
    exact = _train(OPTIMIZERS[name], "reference", torch.float64)
    ulp = torch.finfo(torch.float32).eps * max(float(w.abs().max()) for w in exact)
    reference = _error(_train(OPTIMIZERS[name], "reference", torch.float32), exact)
    assert _error(_train(OPTIMIZERS[name], "triton", torch.float32), exact) <= 2 * reference + STEPS * ulp
