"""Sentences 33 to 35: replicas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import looksam
from tests.contract.support import BACKENDS, DECIDING, REUSING, SHARP, VARIANTS, network, works
from tests.distributed.ranks import Ranks
from tests.distributed.training import alone, arrays, batch, build, half, train

STEPS = 5
KEEPING = (*REUSING, "aelooksam", "vasso", "friendlysam", "sampa", "s2sam")


def ddp(
    rank: int, variant: str, base: str, steps: int, wrapper: dict[str, Any], kwargs: dict[str, Any], poison: int = -1
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights, and what the variant keeps, after training."""
    model = DistributedDataParallel(network(rank, torch.float64), **wrapper)  # rank 0's weights are broadcast
    if kwargs.get("m_sharpness"):
        kwargs = {**kwargs, "model": model}
    optimizer = build(model.parameters(), variant, base, **kwargs)

    def spoil(call: int) -> None:
        if rank == 0 and call == poison:
            next(model.parameters()).grad[0, 0] = torch.inf

    train(model, optimizer, steps, half(rank), after=spoil)
    return arrays(model.parameters()), arrays(s[kept] for s in optimizer.state.values() for kept in "qmy" if kept in s)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "base"), [(v, b) for v in VARIANTS for b in ("sgd", "lamb", "lars", "wrapped rmsprop") if works(v, b)]
)
def test_contract_33_replicas_stay_equal(ranks: Ranks, backend: str, variant: str, base: str) -> None:
    (w0, q0), (w1, q1) = ranks.run(ddp, variant, base, STEPS, {}, {"backend": backend})
    assert bool(q0) == (variant in KEEPING)
    for a, b in zip([*w0, *q0], [*w1, *q1], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(alone(variant, base, STEPS, torch.float64, backend=backend), w0, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def m_sharpness_by_hand(steps: int, k: int, variant: str) -> list[np.ndarray]:
    """SAM, LookSAM or GSAM over SGD with momentum where each half of the batch perturbs by itself, in one process."""
    model = network(dtype=torch.float64)
    params = list(model.parameters())
    descent = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2)
    x, y = batch(torch.float64)

    def gradient(part: slice) -> list[Tensor]:
        return list(torch.autograd.grad(F.mse_loss(model(x[part]), y[part]), params))

    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum(((u * v).sum() for u, v in zip(a, b, strict=True)), start=torch.zeros(()))

    q = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        own_g, own_s = [], []
        start = [p.detach().clone() for p in params]
        for rank in range(2):
            g = gradient(half(rank))
            own_g.append(g)
            if step % k == 0:
                with torch.no_grad():
                    for p, v in zip(params, g, strict=True):
                        p += 0.1 * v / dot(g, g).sqrt()
                own_s.append(gradient(half(rank)))
                with torch.no_grad():
                    for p, v in zip(params, start, strict=True):
                        p.copy_(v)
        g = [(a + b) / 2 for a, b in zip(*own_g, strict=True)]
        if step % k == 0:
            d = [(a + b) / 2 for a, b in zip(*own_s, strict=True)]
            q = [s - dot(g, d) / dot(g, g) * v for s, v in zip(d, g, strict=True)]
            if variant == "gsam":
                c = dot(g, d) / dot(d, d)
                d = [(1 + 0.4 * c) * s - 0.4 * v for s, v in zip(d, g, strict=True)]
        elif variant == "looksam":
            d = [v + 0.7 * (dot(g, g) / dot(q, q)).sqrt() * o for v, o in zip(g, q, strict=True)]
        else:
            d = g
        for p, v in zip(params, d, strict=True):
            p.grad = v.clone()
        nn.utils.clip_grad_norm_(params, 0.5)
        descent.step()
    return arrays(params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["sam", "looksam", "gsam"])
@pytest.mark.parametrize("views", [False, True])
def test_contract_34_m_sharpness(ranks: Ranks, backend: str, variant: str, views: bool) -> None:
    wrapper = {"gradient_as_bucket_view": views}
    (w0, q0), (w1, q1) = ranks.run(ddp, variant, "sgd", STEPS, wrapper, {"backend": backend, "m_sharpness": True})
    for a, b in zip([*w0, *q0], [*w1, *q1], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(m_sharpness_by_hand(STEPS, 2, variant), w0, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # clip_grad_norm_ adds 1e-6 to the norm
    (synced, _), _ = ranks.run(ddp, variant, "sgd", STEPS, wrapper, {"backend": backend})
    assert np.abs(synced[0] - w0[0]).max() > 1e-5


@pytest.mark.parametrize("variant", [name for name in SHARP if name not in DECIDING])
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_contract_34_replicas_perturbed_apart_stay_equal(ranks: Ranks, variant: str, base: str) -> None:
    """Whatever the direction uses, a norm of g as in SSAM included, is the average's."""
    (w0, kept0), (w1, kept1) = ranks.run(ddp, variant, base, STEPS, {}, {"m_sharpness": True})
    for a, b in zip([*w0, *kept0], [*w1, *kept1], strict=True):
        np.testing.assert_array_equal(a, b)
    if variant != "sampa":  # its perturbation is along y, which is an average
        (synced, _), _ = ranks.run(ddp, variant, base, STEPS, {}, {})
        assert np.abs(synced[0] - w0[0]).max() > 1e-6


@pytest.mark.parametrize("m_sharpness", [False, True])
def test_esam_replicas_stay_equal_though_each_chooses_of_its_own_samples(ranks: Ranks, m_sharpness: bool) -> None:
    chosen, of_all = (
        ranks.run(ddp, "esam", "sgd", STEPS, {}, {"gamma": gamma, "m_sharpness": m_sharpness}) for gamma in (0.5, 1.0)
    )
    (w0, _), (w1, _) = chosen
    for a, b in zip(w0, w1, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(w0[0] - of_all[0][0][0]).max() > 1e-6


def ddp_with_own_closure(rank: int) -> list[np.ndarray]:
    """The closure does the ``no_sync`` itself, and says so with its keyword."""
    model = DistributedDataParallel(network(rank, torch.float64))
    optimizer = build(model.parameters(), "looksam", "sgd", m_sharpness=True)
    x, y = (t[half(rank)] for t in batch(torch.float64))

    def closure(ddp_sync: bool = True) -> Tensor:
        optimizer.zero_grad()
        model.require_backward_grad_sync = ddp_sync
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    return arrays(model.parameters())


def test_contract_34_closure_with_ddp_sync(ranks: Ranks) -> None:
    ours, _ = ranks.run(ddp_with_own_closure)
    (expected, _), _ = ranks.run(ddp, "looksam", "sgd", STEPS, {}, {"m_sharpness": True})
    for a, b in zip(expected, ours, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", ["sam", "looksam"])
def test_contract_34_overflow_of_one_rank_skips_the_step_of_all(ranks: Ranks, variant: str) -> None:
    """Its first pass is nobody else's."""
    (w0, _), (w1, _) = ranks.run(ddp, variant, "sgd", 1, {}, {"m_sharpness": True}, 0)
    for start, a, b in zip(arrays(network(dtype=torch.float64).parameters()), w0, w1, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(start, a)


def test_contract_34_needs_a_model_that_can() -> None:
    model = network()
    with pytest.raises(ValueError, match="no_sync"):
        build(model.parameters(), "sam", "sgd", model=model, m_sharpness=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["looksam", "looklayersam"])
def test_contract_35_bucket_views(ranks: Ranks, backend: str, variant: str) -> None:
    """The second backward writes over the first gradients, which LookSAM still needs."""
    with_views, without = (
        ranks.run(ddp, variant, "adamw", STEPS, {"gradient_as_bucket_view": views}, {"backend": backend})
        for views in (True, False)
    )
    for (w, q), (expected_w, expected_q) in zip(with_views, without, strict=True):
        for a, b in zip([*expected_w, *expected_q], [*w, *q], strict=True):
            np.testing.assert_array_equal(a, b)


def _with_batch_norm(rank: int) -> list[Any]:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    replica = DistributedDataParallel(model)
    optimizer = looksam.LookSAM(replica.parameters(), "sgd", k=2, lr=0.1, model=replica)
    train(replica, optimizer, 4, half(rank))
    return [*arrays(model.parameters()), *arrays(model.buffers())]


def test_contract_33_buffers_that_ddp_broadcasts(ranks: Ranks) -> None:
    """DDP broadcasts batch-norm buffers before each forward, the second pass of a sharp step included."""
    first, second = ranks.run(_with_batch_norm)
    for a, b in zip(first[:6], second[:6], strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[-1] == 4, "num_batches_tracked moves once a step"
