"""``q_dtype="bfloat16"``: LookSAM's stored component in half the memory."""

from typing import Any

import pytest
import torch
from torch import nn

import looksam
from tests.contract.support import (
    OPTIONS,
    Closure,
    assert_goes_on_from_a_checkpoint,
    build,
    network,
    train,
    weights,
)
from tests.optim.cases import BACKENDS, QUICK

pytestmark = pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
KEEPING_Q = ["looksam", "looklayersam", "aelooksam"]
on_backends = pytest.mark.parametrize("backend", QUICK)
SHORT = {"q_dtype": "bfloat16"}


@on_backends
@pytest.mark.parametrize("variant", KEEPING_Q)
@pytest.mark.parametrize("base", ["sgd", "lamb", "wrapped rmsprop"])
def test_q_is_stored_in_half_the_bytes_and_the_run_learns(backend: str, variant: str, base: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, base, backend=backend, **SHORT)
    losses = train(model, optimizer, 6)
    assert losses[-1] < losses[0]
    for p in model.parameters():
        q = optimizer.state[p]["q"]
        assert q.dtype == torch.bfloat16
        assert q.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_scope", ["global", "tensor"])
def test_a_reuse_step_is_off_by_no_more_than_the_rounding_of_q(backend: str, norm_scope: str) -> None:
    """d = g + alpha (||g|| / ||q||) q: an element of q is off by at most 2^-9 of itself, so d by 2^-9 alpha ||g||, w by lr times
    that. ||q|| is made of q before it was rounded."""
    lr, alpha, rounding = 0.5, 0.7, 2.0**-9
    ends = []
    for options in ({}, SHORT):
        model = network()
        optimizer = looksam.LookSAM(
            model.parameters(), "sgd", lr=lr, alpha=alpha, k=2, norm_scope=norm_scope, backend=backend, **options
        )
        train(model, optimizer, 1)
        g = Closure(model, optimizer, after=lambda call: None)
        g()
        norm = float(sum(p.grad.square().sum() for p in model.parameters()).sqrt())
        train(model, optimizer, 1)
        ends.append(weights(model))
    off = float(sum((a - b).square().sum() for a, b in zip(*ends, strict=True)).sqrt())
    assert 0 < off <= lr * alpha * norm * rounding * (1 + 2**-8)


@on_backends
@pytest.mark.parametrize("variant", KEEPING_Q)
def test_a_run_continues_from_a_checkpoint_bit_for_bit(backend: str, variant: str) -> None:
    """The kept norm is that of q before the rounding, and stays."""
    model = network()
    optimizer = build(model.parameters(), variant, "adamw", k=3, backend=backend, **SHORT)
    train(model, optimizer, 4)
    other = network(1)
    second = build(other.parameters(), variant, "adamw", k=3, backend=backend, **SHORT)
    assert_goes_on_from_a_checkpoint((model, optimizer), (other, second), train, 4)


@on_backends
def test_a_q_that_others_change_has_its_norm_again(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), "looksam", backend=backend, **SHORT)
    train(model, optimizer, 1)
    p = next(model.parameters())
    before = optimizer.state[p]["q_norm_sq"].item()
    optimizer.state[p]["q"].mul_(2)
    train(model, optimizer, 1)
    assert optimizer.state[p]["q_norm_sq"].item() == pytest.approx(4 * before, rel=2**-6)


def test_what_cannot_be_is_refused() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="q_dtype must be one of 'bfloat16', or None, not 'float16'"):
        looksam.LookSAM(params, "sgd", lr=0.1, q_dtype="float16")
    with pytest.raises(TypeError, match="q_dtype must be a name"):
        looksam.LookSAM(params, "sgd", lr=0.1, q_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="no argument 'q_dtype'"):
        looksam.SAM(params, "sgd", lr=0.1, q_dtype="bfloat16")


@pytest.mark.parametrize("variant", KEEPING_Q)
def test_older_checkpoints_lack_it(variant: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant)
    saved: dict[str, Any] = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["q_dtype"]
    second = build(model.parameters(), variant, **OPTIONS.get(variant, {}), **SHORT)
    second.load_state_dict(saved)
    train(model, second, 1)
    assert all(second.state[p]["q"].dtype == torch.bfloat16 for p in model.parameters())
