"""Sentences 36 and 37: FSDP2's shards, and checkpoints of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.contract.support import BACKENDS, PERIODIC, VARIANTS, network, works
from tests.distributed.ranks import Ranks
from tests.distributed.training import alone, arrays, build, half, train

STEPS = 5


def sharded(replicate: int = 1, seed: int = 0, reshard: bool = True) -> Any:
    """7 and 3 rows on 2 ranks: uneven shards."""
    mesh = (
        init_device_mesh("cpu", (2,))
        if replicate == 1
        else init_device_mesh("cpu", (replicate, 2 // replicate), mesh_dim_names=("replicate", "shard"))
    )
    model = network(seed, torch.float64)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not reshard:
        model.set_reshard_after_backward(False)
    return model


def full(model: nn.Module) -> list[np.ndarray]:
    return arrays(p.full_tensor() for p in model.parameters())


def fsdp(
    rank: int, variant: str, base: str, kwargs: dict[str, Any], replicate: int, reshard: bool, give_model: bool
) -> list[np.ndarray]:
    model = sharded(replicate, reshard=reshard)
    if give_model:
        kwargs = {**kwargs, "model": model}
    if kwargs.pop("filtered", False):
        kwargs = {**kwargs, "layer_filter": lambda p: p.ndim > 1}
    train(model, build(model.parameters(), variant, base, **kwargs), STEPS, half(rank))
    return full(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "base"),
    [
        (variant, base)
        for variant in VARIANTS
        for base in ("sgd", "adamw", "lamb", "lars", "rmsprop", "wrapped rmsprop")
        if works(variant, base)
    ],
)
def test_contract_36_shards_equal_the_whole(ranks: Ranks, backend: str, variant: str, base: str) -> None:
    no_mask = {"beta": 1.0} if variant == "esam" else {}  # each rank draws for its own shard
    check(ranks, variant, base, backend=backend, **no_mask)


@pytest.mark.parametrize("variant", ["looksam", "looklayersam"])
@pytest.mark.parametrize("base", ["sgd", "lamb"])
def test_contract_36_per_tensor_scope(ranks: Ranks, variant: str, base: str) -> None:
    check(ranks, variant, base, norm_scope="tensor")


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0, "always_adapt": True},
        {"weight_decay": 0.0},
        {"trust_clip": True, "eps": 10.0},
        {"bias_correction": False},
    ],
)
def test_contract_36_the_trust_ratio_of_lamb(ranks: Ranks, options: dict[str, Any]) -> None:
    check(ranks, "sam", "lamb", **options)


@pytest.mark.parametrize("layer_scale", ["trust", "trust_global", "unit"])
def test_contract_36_layer_scales(ranks: Ranks, layer_scale: str) -> None:
    check(ranks, "layersam", "sgd", layer_scale=layer_scale)


def test_contract_36_adaptive(ranks: Ranks) -> None:
    check(ranks, "sam", "sgd", adaptive=True)


@pytest.mark.parametrize("base", ["adamw", "lamb"])
def test_contract_36_preconditioned(ranks: Ranks, base: str) -> None:
    check(ranks, "sam", base, precondition=True)


@pytest.mark.parametrize("variant", ["looksam", "looklayersam"])
def test_contract_36_replicas_count_once(ranks: Ranks, variant: str) -> None:
    check(ranks, variant, "lamb", replicate=2)


@pytest.mark.parametrize("give_model", [False, True])
def test_contract_36_modules_that_stay_gathered_are_resharded(ranks: Ranks, give_model: bool) -> None:
    check(ranks, "looksam", "sgd", reshard=False, give_model=give_model)


def check(
    ranks: Ranks,
    variant: str,
    base: str,
    replicate: int = 1,
    reshard: bool = True,
    give_model: bool = False,
    **kwargs: Any,
) -> None:
    first, second = ranks.run(fsdp, variant, base, kwargs, replicate, reshard, give_model)
    for a, b, c in zip(alone(variant, base, STEPS, torch.float64, **kwargs), first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(b, c)


def collectives(rank: int, variant: str, base: str) -> list[int]:
    """All-reduces of ours in a sharp and in a reuse or plain step; what would make a full tensor raises."""
    model = sharded()
    optimizer = build(model.parameters(), variant, base)
    train(model, optimizer, 2, half(rank))
    counts: Counter[str] = Counter()
    reduce = distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["sharp" if counts["step"] == 0 else "cheap"] += 1
        assert tensor.numel() <= 4 * 4, "a small table"
        return reduce(tensor, *args, **kwargs)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a full tensor")

    kept = DTensor.full_tensor, DTensor.redistribute
    distributed.all_reduce, DTensor.full_tensor, DTensor.redistribute = counted, forbidden, forbidden
    try:
        for step in range(2):
            counts["step"] = step
            train(model, optimizer, 1, half(rank))
    finally:
        distributed.all_reduce, (DTensor.full_tensor, DTensor.redistribute) = reduce, kept
    for p, state in optimizer.state.items():
        assert isinstance(p, DTensor)
        assert isinstance(state["exp_avg" if base == "lamb" else "momentum_buffer"], DTensor)
        assert "q" not in state or state["q"].to_local().shape == p.to_local().shape
    return [counts["sharp"], counts["cheap"]]


@pytest.mark.parametrize(
    ("variant", "base", "expected"),
    [("sam", "sgd", [2, 1]), ("looksam", "sgd", [3, 1]), ("looksam", "lamb", [4, 2])],
)
def test_contract_36_one_small_all_reduce_per_op(ranks: Ranks, variant: str, base: str, expected: list[int]) -> None:
    """One per measurement, one for the norms of a new q, one for LAMB's."""
    assert ranks.run(collectives, variant, base) == [expected, expected]


def overflow_on_one_shard(rank: int, call: int) -> bool:
    model = sharded()
    optimizer = build(model.parameters(), "looksam", "lamb")
    train(model, optimizer, 2, half(rank))
    before = [p.to_local().clone() for p in model.parameters()]
    state = [{n: getattr(x, "_local_tensor", x).clone() for n, x in s.items()} for s in optimizer.state.values()]

    def poison(now: int) -> None:
        if rank == 1 and now == call:
            next(model.parameters()).grad.to_local()[0, 0] = torch.inf

    train(model, optimizer, 1, half(rank), after=poison)
    same = [torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True)]
    for old, new in zip(state, optimizer.state.values(), strict=True):
        same += [torch.equal(x, getattr(new[n], "_local_tensor", new[n])) for n, x in old.items()]
    return all(same)


@pytest.mark.parametrize("call", [0, 1])
def test_contract_36_overflow_on_one_shard_skips_the_step_of_all(ranks: Ranks, call: int) -> None:
    assert ranks.run(overflow_on_one_shard, call) == [True, True]


def round_trip(
    rank: int, variant: str, base: str, whole: bool, steps: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]:
    """Straight on; from a checkpoint in a fresh sharded optimizer; from a full one in an unsharded one (rank 0)."""
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    model = sharded()
    optimizer = build(model.parameters(), variant, base)
    train(model, optimizer, steps, half(rank))
    weights = get_model_state_dict(model, options=options)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    restored = sharded(seed=3)
    second = build(restored.parameters(), variant, base)
    into = StateDictOptions(full_state_dict=whole, broadcast_from_rank0=whole)
    clone = _copy(dict(weights))
    set_model_state_dict(restored, _copy(clone) if not whole or rank == 0 else {}, options=into)
    set_optimizer_state_dict(restored, second, _copy(saved) if not whole or rank == 0 else {}, options=into)
    plain = None
    if whole and rank == 0:
        single = network(4, torch.float64)
        third = build(single.parameters(), variant, base)
        set_model_state_dict(single, _copy(clone))
        set_optimizer_state_dict(single, third, _copy(saved))
        train(single, third, 3)
        plain = arrays(single.parameters())
    train(model, optimizer, 3, half(rank))
    train(restored, second, 3, half(rank))
    return full(model), full(restored), plain


def _copy(saved: Any) -> Any:
    if isinstance(saved, torch.Tensor):
        return saved.clone()
    if isinstance(saved, dict):
        return {k: _copy(v) for k, v in saved.items()}
    return [_copy(v) for v in saved] if isinstance(saved, list) else saved


@pytest.mark.parametrize(("variant", "base"), [("looksam", "adamw"), ("looklayersam", "lamb"), ("sam", "sgd")])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("steps", [3, 4])
def test_contract_37_optimizer_state_dict_round_trip(
    ranks: Ranks, variant: str, base: str, whole: bool, steps: int
) -> None:
    for straight, restored, plain in ranks.run(round_trip, variant, base, whole, steps):
        for a, b in zip(straight, restored, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(straight, plain or [], strict=bool(plain)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "base"),
    [(v, b) for v in VARIANTS for b in ("adamw", "lamb", "rmsprop", "wrapped rmsprop") if works(v, b)],
)
def test_contract_37_round_trip_in_one_process(backend: str, variant: str, base: str) -> None:
    model, other = network(dtype=torch.float64), network(1, torch.float64)
    optimizer = build(model.parameters(), variant, base, backend=backend)
    second = build(other.parameters(), variant, base, backend=backend)
    train(model, optimizer, 3)
    set_model_state_dict(other, _copy(get_model_state_dict(model)))
    set_optimizer_state_dict(other, second, _copy(get_optimizer_state_dict(model, optimizer)))
    assert second.param_groups[0]["phase"] == (1 if variant in PERIODIC else 0)
    train(model, optimizer, 3)
    train(other, second, 3)
    for a, b in zip(arrays(model.parameters()), arrays(other.parameters()), strict=True):
        np.testing.assert_array_equal(a, b)
